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
from .draws import CROP, NOISE, uniform
from .sampling import SAMPLERS, epoch_order, epoch_windows


@dataclass
class Batch:
    wave: torch.Tensor  # (B, samples) float32
    target: torch.Tensor  # (B,) class indices; (B, classes) float32 where clips may have several, see Manifest.targets
    rows: np.ndarray  # (B,) row of each clip in the manifest
    broken: list  # [(row, reason)] of clips that could not be read and are not in the batch
    trouble: str | None = None  # why decoded audio is not kept any more
    noise: torch.Tensor | None = None  # (B, samples) float32 of other clips, zeros where there is to be none
    clips: np.ndarray | None = None  # (B,) what random numbers go by: the row, another number when it comes again

    def __post_init__(self):
        self.clips = self.rows if self.clips is None else self.clips

    def pin_memory(self):
        """The same in page-locked memory, from which a GPU copies without the host waiting; DataLoader calls it."""
        return replace(self, wave=self.wave.pin_memory(), target=self.target.pin_memory(),
                       noise=None if self.noise is None else self.noise.pin_memory())


class Clips(Dataset):
    """Waveforms of `samples` samples at `rate` Hz, by (row, start) with start in samples from the row's
    own beginning, or by (clip, -1 - epoch) for the training crop of that epoch, where clip is a row or, for the
    k-th time in an epoch, row + k * len(clips).

    short: "repeat" or "pad", see audio.fit. cache: a WaveCache, or None to decode the wanted stretch each time.
    crop: where training crops lie: "random", "start", or "active": the likelier the more goes on there.
    """

    def __init__(self, manifest, rate, samples, short="repeat", seed=0, cache=None, crop="random"):
        if short not in ("repeat", "pad"):
            raise ValueError(f"short is {short!r}: repeat or pad")
        self.manifest, self.rate, self.samples, self.short, self.seed = manifest, rate, samples, short, seed
        self.cache, self.resident, self.crop = cache, None, crop
        self._noise_source, self._noise_rows, self._noise_p = self, np.zeros(0, np.int64), 0.0
        self.begin = np.round(manifest.start.astype(np.float64) * rate).astype(np.int64)
        self.total = np.maximum(1, np.round(manifest.duration.astype(np.float64) * rate).astype(np.int64))
        self._activity = {}  # row -> what goes on in each of its blocks, added up from its beginning

    def __len__(self):
        return len(self.manifest)

    def crop_start(self, clips, epoch):
        """(n,) starts of the training crops of (n,) clips: another place each epoch, unless crop is "start"."""
        clips = np.asarray(clips, np.int64)
        rows = clips % len(self)
        spare = np.maximum(0, self.total[rows] - self.samples)
        if self.crop == "start":
            return np.zeros_like(spare)
        u = uniform(self.seed, epoch, clips, CROP, 1)[:, 0]
        starts = (u * (spare + 1)).astype(np.int64)
        if self.crop == "active":
            for i in np.flatnonzero((spare > 0) & (self.total[rows] <= LONGEST * self.rate)):  # longer ones anywhere
                starts[i] = self._active_start(int(rows[i]), u[i], int(spare[i]))
        return starts

    def _active_start(self, row, u, spare):
        """A start drawn in proportion to the activity of what would be heard; anywhere where nothing goes on."""
        size = self.rate // 20
        summed = self._activity.get(row)
        if summed is None:
            try:
                summed = self._activity[row] = activity(self._read(row, 0, int(self.total[row])), size)
            except AudioError:  # whoever reads it says so
                summed = np.zeros(1)
        first = np.arange(spare // size + 1)
        last = np.minimum(first + self.samples // size, len(summed) - 1)
        weight = np.cumsum(np.maximum(0, summed[last] - summed[np.minimum(first, last)]) + 1e-3)
        at = u * weight[-1]
        block = int(np.searchsorted(weight, at, side="right"))
        below = weight[block - 1] if block else 0.0
        return min(spare, int((block + (at - below) / (weight[block] - below)) * size))

    def tiles(self, row):
        return tile_starts(int(self.total[row]), self.samples)

    def add_noise(self, p, rows, source=None):
        """From now on give background noise to that share of the training clips, out of these rows of another Clips, by
        default of this one."""
        self._noise_source, self._noise_rows, self._noise_p = source or self, np.asarray(rows, np.int64), p

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
        """A Batch of the keys (row, start) or (clip, -1 - epoch)."""
        clips, starts = np.array(keys, np.int64).reshape(-1, 2).T
        rows, noise = clips % len(self), None
        for epoch in np.unique(-1 - starts[starts < 0]).tolist():
            of_epoch = starts == -1 - epoch
            starts[of_epoch] = self.crop_start(clips[of_epoch], epoch)
            if self._noise_p and len(self._noise_rows):  # training batches are of one epoch
                noise = self._noise(clips, epoch)
        wave, good, broken = self._waves(rows, starts)
        rows = rows[good]
        target = self.manifest.targets(rows) if self.manifest.multi_label else self.manifest.labels[rows].astype(np.int64)
        return Batch(wave, torch.from_numpy(target), rows, broken,
                     self.cache and self.cache.trouble, None if noise is None else noise[torch.from_numpy(good)], clips[good])

    def _waves(self, rows, starts):
        """(good, samples) float32, a mask of the good ones among the rows, and [(row, reason)] of the others."""
        if self.resident is not None:
            broken = [(row, self.resident.reasons[row]) for row in rows.tolist() if row in self.resident.reasons]
            good = ~np.isin(rows, [row for row, _ in broken])
            rows, starts = rows[good], starts[good]
            return self.resident.cut(rows, starts, np.minimum(self.samples, self.total[rows] - starts), self.samples,
                                     self.short), good, broken
        wave, good, broken = np.empty((len(rows), self.samples), np.float32), np.ones(len(rows), bool), []
        for i, (row, start) in enumerate(zip(rows.tolist(), starts.tolist(), strict=True)):
            try:
                length = min(self.samples, int(self.total[row]) - start)
                wave[i] = fit(self._read(row, start, length), self.samples, self.short)
            except AudioError as error:
                good[i] = False
                broken.append((row, str(error)))
        return torch.from_numpy(wave if good.all() else wave[good]), good, broken

    def _noise(self, clips, epoch):
        """(B, samples) float32: a crop of another clip for each, zeros for those that go without."""
        u, source = uniform(self.seed, epoch, clips, NOISE, 3), self._noise_source
        i = (u[:, 1] * len(self._noise_rows)).astype(np.int64)
        if source is self:
            i += self._noise_rows[i] == clips % len(self)  # not of itself
        rows = self._noise_rows[i % len(self._noise_rows)]
        starts = (u[:, 2] * (np.maximum(0, source.total[rows] - self.samples) + 1)).astype(np.int64)
        wanted = u[:, 0] < self._noise_p
        found, good, _ = source._waves(rows[wanted], starts[wanted])  # a broken one is named when its own turn comes
        noise = found.new_zeros(len(clips), self.samples)
        noise[torch.from_numpy(np.flatnonzero(wanted)[good])] = found
        return noise

    __getitems__ = batch  # what DataLoader asks for a batch of

    def _read(self, row, start, length):
        """(length,) float32 of a row from `start` on."""
        file, begin, total = self.manifest.file(row), int(self.begin[row]), int(self.total[row])
        if self.cache is None or total > LONGEST * self.rate:
            return read(file, self.rate, begin + start, length)
        samples, scale = self.cache.read(file, begin, total, start, length)
        return samples * np.float32(scale)


def activity(wave, size):
    """(samples,) -> (samples // size + 1,): how far each block of `size` samples lies above the quiet blocks of the
    recording (3 dB over its lowest fifth, at most 30 dB more), in dB, added up from the beginning."""
    blocks = wave[:len(wave) // size * size].reshape(-1, size)
    level = 10 * np.log10(np.square(blocks, dtype=np.float32).mean(axis=1) + 1e-10)
    floor = np.quantile(level, 0.2) + 3 if len(level) else 0
    return np.concatenate([[0.0], np.cumsum(np.clip(level - floor, 0, 30))])


def _same(batch):
    return batch


class TrainLoader:
    """Windows of training micro-batches, epoch by epoch, from any window on."""

    def __init__(self, clips, rows, batch_size, effective_batch, seed=0, workers=0, pin=False, sampler="shuffle"):
        self.clips, self.rows, self.seed, self.power = clips, np.asarray(rows), seed, SAMPLERS[sampler]
        self.batch_size, self.effective_batch = batch_size, effective_batch
        self._keys = []  # the loader reads this list anew for each epoch, its workers live on
        self._loader = DataLoader(clips, batch_sampler=_Live(self._keys), collate_fn=_same, num_workers=workers,
                                  pin_memory=pin, persistent_workers=workers > 0)

    @property
    def steps_per_epoch(self):
        return -(-len(self.rows) // self.effective_batch)

    def order(self, epoch):
        """The clips of an epoch, see sampling.epoch_order."""
        return epoch_order(self.rows, self.seed, epoch, self.clips.manifest.labels[self.rows], self.power, len(self.clips))

    def windows(self, epoch, start=0, rank=0, ranks=1):
        """Yield the windows of an epoch (counted from 0), from window `start` on: lists of Batch. Of each window
        rank r of n gets the micro-batches r, r + n, r + 2n ..., so what a micro-batch holds does not depend
        on the number of ranks."""
        plan = epoch_windows(self.order(epoch), self.batch_size, self.effective_batch)[start:]
        plan = [window[rank::ranks] for window in plan]
        self._keys[:] = [[(clip, -1 - epoch) for clip in micro] for window in plan for micro in window]
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
