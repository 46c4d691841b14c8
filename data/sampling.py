"""Which training clips an epoch has, in which order, and how much of each clip the crops cover."""
import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from util import CsvWriter, atomic_write

from .clip_rng import Purpose, uniform

if TYPE_CHECKING:
    from .clips import TrainLoader

# --sampler -> power: the share of a class in an epoch is proportional to (number of clips) ** power
SAMPLERS = {"shuffle": 1.0, "sqrt": 0.5, "balanced": 0.0}


def quotas(counts: ArrayLike, total: int, power: float) -> np.ndarray:
    """How often each class occurs in an epoch of `total` clips: in proportion to counts ** power.

    counts: (classes,) clips of each class. Returns (classes,) integers that sum to `total`, rounded
    by the largest remainders. A class without clips gets 0.
    """
    counts = np.asarray(counts, np.float64)
    share = np.where(counts > 0, np.maximum(counts, 1) ** power, 0.0)
    exact = total * share / share.sum()
    rounded = np.floor(exact + 1e-9).astype(np.int64)
    missing = total - rounded.sum()
    largest_remainders = np.argsort(rounded - exact, kind="stable")[:missing]
    rounded[largest_remainders] += 1
    return rounded


def epoch_order(
    rows: ArrayLike,
    seed: int,
    epoch: int,
    labels: np.ndarray | None = None,
    power: float = 1.0,
    n_clips: int = 0,
) -> np.ndarray:
    """The clip ids of an epoch in their order, (len(rows),) int64.

    rows: (n,) rows of the training clips. With a power of 1, each row occurs exactly once.
    Otherwise each class occurs as often as `quotas` says, and its rows take turns.
    labels: (n,) class of each row; n_clips: rows of the manifest. data/clips.py explains clip ids.
    """
    rows = np.asarray(rows, np.int64)
    keys = uniform(seed, epoch, rows, Purpose.ORDER, 1)[:, 0]
    shuffled = np.argsort(keys, kind="stable")
    order = rows[shuffled]
    if power == 1:
        return order

    labels_in_order = np.asarray(labels)[shuffled]
    clip_ids = []
    for c, quota in enumerate(quotas(np.bincount(labels), len(rows), power)):
        if quota == 0:
            continue
        class_rows = order[labels_in_order == c]
        repeat, turn = np.divmod(np.arange(quota), len(class_rows))
        clip_ids.append(class_rows[turn] + repeat * n_clips)
    clip_ids = np.concatenate(clip_ids)
    keys = uniform(seed, epoch, clip_ids, Purpose.ORDER, 1)[:, 0]
    return clip_ids[np.argsort(keys, kind="stable")]


def epoch_steps(order: np.ndarray, batch_size: int, effective_batch: int) -> list[list[list[int]]]:
    """Divide an epoch into optimizer steps, and the steps into micro-batches.

    order: (n,) clip ids. A step has `effective_batch` clips, a micro-batch has `batch_size`. The
    last ones may be smaller; no clip is dropped. Returns the clip ids by step and micro-batch.
    """
    steps = []
    for first in range(0, len(order), effective_batch):
        clip_ids = order[first:first + effective_batch].tolist()
        steps.append([clip_ids[i:i + batch_size] for i in range(0, len(clip_ids), batch_size)])
    return steps


def coverage(
    rows: ArrayLike, starts: ArrayLike, total: np.ndarray, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """How much of each row is covered by crops of `samples` samples.

    rows, starts: (k,) of each crop; total: (n,) length of each row in samples.
    Returns (n,) shares in [0, 1] and (n,) numbers of crops.
    """
    order = np.lexsort((starts, rows))
    rows, starts = np.asarray(rows)[order], np.asarray(starts)[order]
    ends = np.minimum(starts + samples, total[rows])
    # Count overlaps once: a crop counts only up to the start of the next crop of the same row.
    next_start = np.append(starts[1:], 0)
    is_last_of_row = np.append(rows[1:] != rows[:-1], True)
    counted_until = np.where(is_last_of_row, ends, np.minimum(ends, next_start))
    covered = np.bincount(rows, counted_until - starts, minlength=len(total))
    return covered / total, np.bincount(rows, minlength=len(total))


def crops_by_tenth(
    rows: ArrayLike, starts: np.ndarray, total: np.ndarray, samples: int
) -> np.ndarray:
    """How many crops have their middle in each tenth of their row. Arguments as in `coverage`.

    Returns (n, 10) numbers of crops.
    """
    rows = np.asarray(rows, np.int64)
    length = total[rows]
    middle = starts + np.minimum(samples, length) / 2
    tenth = np.minimum(10 * middle // length, 9).astype(np.int64)
    return np.bincount(10 * rows + tenth, minlength=10 * len(total)).reshape(-1, 10)


def write_coverage(loader: "TrainLoader", epochs: int, path: str | os.PathLike) -> str:
    """Write coverage.csv: how much of each training clip was covered by the crops of the epochs.

    epochs: at least 1. Returns a summary of one line.
    """
    clips, manifest = loader.clips, loader.clips.manifest
    orders = [loader.order(epoch) for epoch in range(epochs)]
    starts = [clips.crop_start(order, epoch) for epoch, order in enumerate(orders)]
    rows, starts = np.concatenate(orders) % len(clips), np.concatenate(starts)
    share, n_crops = coverage(rows, starts, clips.total, clips.samples)
    tenths = crops_by_tenth(rows, starts, clips.total, clips.samples)

    with atomic_write(path) as file:
        out = CsvWriter(file)
        out.writerow(["path", "start", "seconds", "crops", "share_covered", "crops_by_tenth"])
        for row in loader.rows.tolist():
            out.writerow([
                manifest.paths[row],
                f"{manifest.start[row]:g}",
                f"{manifest.duration[row]:.2f}",
                n_crops[row],
                f"{share[row]:.3f}",
                " ".join(map(str, tenths[row])),
            ])
    share = share[loader.rows]
    mean = np.average(share, weights=clips.total[loader.rows])
    return (f"coverage in {epochs} epochs: {mean:.0%} of the training audio, "
            f"{np.median(share):.0%} of the median clip, {share.min():.0%} of the least covered")
