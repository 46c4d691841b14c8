"""Which training clips an epoch is made of, in which order, and what has been heard of each recording by then."""
import csv
import io
import os

import numpy as np

from .draws import ORDER, uniform
from util import atomic_write

SAMPLERS = {"shuffle": 1.0, "sqrt": 0.5, "balanced": 0.0}  # a class's share goes by its number of clips to this power


def quotas(counts, total, power):
    """How often each class comes in an epoch of `total` clips: in proportion to counts ** power, rounded to the
    largest remainders. counts (C,) -> (C,) ints that add up to `total`; a class without clips gets none."""
    counts = np.asarray(counts, np.float64)
    share = np.where(counts > 0, np.maximum(counts, 1) ** power, 0.0)
    exact = total * share / share.sum()
    whole = np.floor(exact + 1e-9).astype(np.int64)
    rest = np.argsort(whole - exact, kind="stable")[:total - whole.sum()]
    whole[rest] += 1
    return whole


def epoch_order(rows, seed, epoch, labels=None, power=1.0, stride=0):
    """The clips of an epoch in their order, (len(rows),) int64.

    rows (n,): with power 1 each comes exactly once. Otherwise each class, by `labels` (n,), comes as often as
    `quotas` says, its rows in turn. The k-th time that a row comes it goes by the number row + k * stride, so that it
    gets other random numbers and sounds different; stride is more than any row.
    """
    rows = np.asarray(rows, np.int64)
    shuffled = np.argsort(uniform(seed, epoch, rows, ORDER, 1)[:, 0], kind="stable")
    order = rows[shuffled]
    if power == 1:
        return order
    ordered = np.asarray(labels)[shuffled]
    clips = []
    for c, n in enumerate(quotas(np.bincount(labels), len(rows), power)):
        own = order[ordered == c]
        turn = np.arange(n)
        clips.append(own[turn % max(1, len(own))] + turn // max(1, len(own)) * stride if n else own[:0])
    clips = np.concatenate(clips)
    return clips[np.argsort(uniform(seed, epoch, clips, ORDER, 1)[:, 0], kind="stable")]


def epoch_windows(order, batch_size, effective_batch):
    """Cut an epoch's order into windows of `effective_batch` clips, one optimiser step each, and those into
    micro-batches of `batch_size`; the last window and micro-batch may be smaller, nothing is dropped.

    Returns a list of windows, each a list of micro-batches, each a list of clips.
    """
    windows = [order[i:i + effective_batch] for i in range(0, len(order), effective_batch)]
    return [[window[i:i + batch_size].tolist() for i in range(0, len(window), batch_size)] for window in windows]


def heard(rows, starts, total, samples):
    """How much of each row has been heard after crops of `samples` samples.

    rows, starts (k,): of each crop; total (n,): length of each row in samples.
    Returns (n,) shares in [0, 1] and (n,) numbers of crops.
    """
    order = np.lexsort((starts, rows))
    rows, starts = np.asarray(rows)[order], np.asarray(starts)[order]
    ends = np.minimum(starts + samples, total[rows])
    last = np.append(rows[1:] != rows[:-1], True)
    until = np.where(last, ends, np.minimum(ends, np.append(starts[1:], 0)))  # what the next crop does not cover as well
    covered = np.bincount(rows, until - starts, minlength=len(total))
    return covered / total, np.bincount(rows, minlength=len(total))


def tenths(rows, starts, total, samples):
    """In which tenth of its row each crop has its middle -> (n, 10) numbers of crops. Arguments as in `heard`."""
    length = total[rows]
    middle = starts + np.minimum(samples, length) / 2
    part = np.minimum(10 * middle // length, 9).astype(np.int64)
    return np.bincount(10 * np.asarray(rows, np.int64) + part, minlength=10 * len(total)).reshape(-1, 10)


def write_heard(loader, epochs, path):
    """Write heard.csv: of each training clip its length, how many crops of it were taken in so many epochs, what share of
    it has been heard in them, and how many crops have their middle in each tenth of it. epochs: at least 1. Returns a
    line for the person."""
    clips, manifest, taken = loader.clips, loader.clips.manifest, []
    for epoch in range(epochs):
        order = loader.order(epoch)
        taken.append((order % len(clips), clips.crop_start(order, epoch)))
    rows, starts = (np.concatenate(part) for part in zip(*taken, strict=True))
    share, crops = heard(rows, starts, clips.total, clips.samples)
    where = tenths(rows, starts, clips.total, clips.samples)
    text = io.StringIO(newline="")
    out = csv.writer(text)
    out.writerow(["path", "start", "seconds", "crops", "share_heard", "crops_by_tenth"])
    for row in loader.rows.tolist():
        out.writerow([manifest.paths[row], f"{manifest.start[row]:g}", f"{manifest.duration[row]:.2f}", crops[row],
                      f"{share[row]:.3f}", " ".join(map(str, where[row]))])
    with atomic_write(path, "wb") as file:
        file.write(os.fsencode(text.getvalue()))
    own = share[loader.rows]
    return (f"heard in {epochs} epochs: {np.average(own, weights=clips.total[loader.rows]):.0%} of the training audio, "
            f"{np.median(own):.0%} of the median clip, {own.min():.0%} of the least heard")
