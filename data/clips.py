"""Rows of a manifest -> batches of waveforms: crops in training, fixed tiles in evaluation.

What a training clip sounds like depends on (seed, epoch, row) alone, and the order of an epoch on (seed,
epoch), so neither the number of workers nor an interruption changes a run.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .audio import AudioError, fit, read, tile_starts
from .draws import CROP, ORDER, uniform


@dataclass
class Batch:
    wave: torch.Tensor  # (B, samples) float32
    target: torch.Tensor  # (B,) class indices
    rows: np.ndarray  # (B,) row of each clip in the manifest
    broken: list  # [(row, reason)] of clips that could not be read and are not in the batch


class Clips(Dataset):
    """Waveforms of `samples` samples at `rate` Hz, by (row, start) with start in samples from the row's
    own beginning, or by (row, -1 - epoch) for the training crop of that epoch.

    short: "repeat" or "pad", see audio.fit.
    """

    def __init__(self, manifest, rate, samples, short="repeat", seed=0):
        if short not in ("repeat", "pad"):
            raise ValueError(f"short is {short!r}: repeat or pad")
        self.manifest, self.rate, self.samples, self.short, self.seed = manifest, rate, samples, short, seed
        self.begin = np.round(manifest.start.astype(np.float64) * rate).astype(np.int64)
        self.total = np.maximum(1, np.round(manifest.duration.astype(np.float64) * rate).astype(np.int64))

    def __len__(self):
        return len(self.manifest)

    def crop_start(self, row, epoch):
        """Start of the training crop: anywhere that it fits, another place each epoch."""
        spare = max(0, self.total[row] - self.samples)
        return int(uniform(self.seed, epoch, [row], CROP, 1)[0, 0] * (spare + 1))

    def tiles(self, row):
        return tile_starts(int(self.total[row]), self.samples)

    def __getitem__(self, key):
        row, start = key
        if start < 0:
            start = self.crop_start(row, -1 - start)
        length = min(self.samples, int(self.total[row]) - start)
        try:
            wave = read(self.manifest.file(row), self.rate, int(self.begin[row]) + start, length)
        except AudioError as error:
            return row, None, str(error)
        return row, fit(wave, self.samples, self.short), None

    def collate(self, items):
        good = [(row, wave) for row, wave, _ in items if wave is not None]
        rows = np.array([row for row, _ in good], dtype=np.int64)
        wave = np.stack([wave for _, wave in good]) if good else np.zeros((0, self.samples), np.float32)
        return Batch(torch.from_numpy(wave), torch.from_numpy(self.manifest.labels[rows].astype(np.int64)), rows,
                     [(row, reason) for row, wave, reason in items if wave is None])


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
        self._loader = DataLoader(clips, batch_sampler=_Live(self._keys), collate_fn=clips.collate, num_workers=workers,
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
        batches = iter(self._loader)
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
    return DataLoader(clips, batch_sampler=batches, collate_fn=clips.collate, num_workers=workers, pin_memory=pin)
