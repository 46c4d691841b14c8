"""Rows of a manifest -> batches of waveforms: crops in training, fixed tiles in evaluation.

What a training clip sounds like depends on (seed, epoch, row) alone, and the order of an epoch on (seed,
epoch), so neither the number of workers nor an interruption changes a run.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .audio import AudioError, fit, read, tile_starts
from .cache import LONGEST, Resident
from .draws import CROP, ORDER, uniform


@dataclass
class Batch:
    wave: torch.Tensor  # (B, samples) float32
    target: torch.Tensor  # (B,) class indices
    rows: np.ndarray  # (B,) row of each clip in the manifest
    broken: list  # [(row, reason)] of clips that could not be read and are not in the batch
    trouble: str | None = None  # why decoded audio is not kept any more

    def pin_memory(self):
        """The same in page-locked memory, from which a GPU copies without the host waiting; DataLoader calls it."""
        return replace(self, wave=self.wave.pin_memory(), target=self.target.pin_memory())


class Clips(Dataset):
    """Waveforms of `samples` samples at `rate` Hz, by (row, start) with start in samples from the row's
    own beginning, or by (row, -1 - epoch) for the training crop of that epoch.

    short: "repeat" or "pad", see audio.fit. cache: a WaveCache, or None to decode the wanted stretch each time.
    """

    def __init__(self, manifest, rate, samples, short="repeat", seed=0, cache=None):
        if short not in ("repeat", "pad"):
            raise ValueError(f"short is {short!r}: repeat or pad")
        self.manifest, self.rate, self.samples, self.short, self.seed = manifest, rate, samples, short, seed
        self.cache, self.resident = cache, None
        self.begin = np.round(manifest.start.astype(np.float64) * rate).astype(np.int64)
        self.total = np.maximum(1, np.round(manifest.duration.astype(np.float64) * rate).astype(np.int64))

    def __len__(self):
        return len(self.manifest)

    def crop_start(self, rows, epoch):
        """(n,) starts of the training crops of (n,) rows: anywhere that they fit, another place each epoch."""
        spare = np.maximum(0, self.total[rows] - self.samples)
        return (uniform(self.seed, epoch, rows, CROP, 1)[:, 0] * (spare + 1)).astype(np.int64)

    def tiles(self, row):
        return tile_starts(int(self.total[row]), self.samples)

    @property
    def bytes(self):
        """Of all clips as int16."""
        return 2 * int(self.total.sum())

    @property
    def longest(self):
        """Seconds of the longest clip."""
        return float(self.total.max(initial=0)) / self.rate

    def reside(self, device, show=False):
        """Decode every clip into one tensor on a device, from which `batch` cuts from now on."""
        self.resident = Resident(len(self), lambda row: self.cache.read(
            self.manifest.file(row), int(self.begin[row]), int(self.total[row])), device, show)

    def batch(self, keys):
        """A Batch of the keys (row, start) or (row, -1 - epoch)."""
        rows, starts = np.array(keys, np.int64).reshape(-1, 2).T
        for epoch in np.unique(-1 - starts[starts < 0]):
            of_epoch = starts == -1 - epoch
            starts[of_epoch] = self.crop_start(rows[of_epoch], int(epoch))
        if self.resident is not None:
            broken = [(row, self.resident.reasons[row]) for row in rows.tolist() if row in self.resident.reasons]
            good = ~np.isin(rows, [row for row, _ in broken])
            rows, starts = rows[good], starts[good]
            wave = self.resident.cut(rows, starts, np.minimum(self.samples, self.total[rows] - starts), self.samples,
                                     self.short)
        else:
            wave, good, broken = np.empty((len(rows), self.samples), np.float32), [], []
            for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
                try:
                    wave[len(good)] = fit(self._read(row, start), self.samples, self.short)
                    good.append(row)
                except AudioError as error:
                    broken.append((row, str(error)))
            rows, wave = np.array(good, np.int64), torch.from_numpy(wave[:len(good)])
        return Batch(wave, torch.from_numpy(self.manifest.labels[rows].astype(np.int64)), rows, broken,
                     self.cache and self.cache.trouble)

    __getitems__ = batch  # what DataLoader asks for a batch of

    def _read(self, row, start):
        """At most `samples` samples, float32, of a row from `start` on."""
        file, begin, total = self.manifest.file(row), int(self.begin[row]), int(self.total[row])
        length = min(self.samples, total - start)
        if self.cache is None or total > LONGEST * self.rate:
            return read(file, self.rate, begin + start, length)
        samples, scale = self.cache.read(file, begin, total, start, length)
        return samples * np.float32(scale)


def _same(batch):
    return batch


def epoch_order(rows, seed, epoch):
    """The rows in the order of that epoch: each exactly once."""
    rows = np.asarray(rows)
    return rows[np.argsort(uniform(seed, epoch, rows, ORDER, 1)[:, 0], kind="stable")]


def epoch_windows(order, batch_size, effective_batch):
    """Cut an epoch's order into windows of `effective_batch` clips, one optimiser step each, and those into
    micro-batches of `batch_size`; the last window and micro-batch may be smaller, nothing is dropped.

    Returns a list of windows, each a list of micro-batches, each a list of rows.
    """
    windows = [order[i:i + effective_batch] for i in range(0, len(order), effective_batch)]
    return [[window[i:i + batch_size].tolist() for i in range(0, len(window), batch_size)] for window in windows]


class TrainLoader:
    """Windows of training micro-batches, epoch by epoch, from any window on."""

    def __init__(self, clips, rows, batch_size, effective_batch, seed=0, workers=0, pin=False):
        self.clips, self.rows, self.seed = clips, np.asarray(rows), seed
        self.batch_size, self.effective_batch = batch_size, effective_batch
        self._keys = []  # the loader reads this list anew for each epoch, its workers live on
        self._loader = DataLoader(clips, batch_sampler=_Live(self._keys), collate_fn=_same, num_workers=workers,
                                  pin_memory=pin, persistent_workers=workers > 0)

    @property
    def steps_per_epoch(self):
        return -(-len(self.rows) // self.effective_batch)

    def windows(self, epoch, start=0, rank=0, ranks=1):
        """Yield the windows of an epoch (counted from 0), from window `start` on: lists of Batch. Of each window
        rank r of n gets the micro-batches r, r + n, r + 2n ..., so what a micro-batch holds does not depend
        on the number of ranks."""
        plan = epoch_windows(epoch_order(self.rows, self.seed, epoch), self.batch_size, self.effective_batch)[start:]
        plan = [window[rank::ranks] for window in plan]
        self._keys[:] = [[(row, -1 - epoch) for row in micro] for window in plan for micro in window]
        batches = map(self.clips.batch, list(self._keys)) if self.clips.resident else iter(self._loader)
        for window in plan:
            yield [next(batches) for _ in window]


class _Live:
    """A batch sampler that walks over what the list holds when an epoch begins. It knows the list and not its
    loader, or the two would keep each other, and the workers, alive."""

    def __init__(self, keys):
        self.keys = keys

    def __iter__(self):
        return iter(list(self.keys))


def evaluation_batches(clips, rows, batch_size, workers=0, pin=False):
    """Batches over every tile of every row, in order; a row's tiles may spread over two batches."""
    keys = [(int(row), start) for row in rows for start in clips.tiles(row)]
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    if clips.resident is not None:
        return map(clips.batch, batches)
    return DataLoader(clips, batch_sampler=batches, collate_fn=_same, num_workers=workers, pin_memory=pin)
