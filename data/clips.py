"""Rows of a manifest to batches of waveforms: random crops in training, fixed tiles in evaluation.

Clip ids. In training, a clip id decides the random numbers of a clip. It is the row of the clip in
the manifest, n rows in all. With --sampler sqrt or balanced, a row may occur again within an epoch:
its k-th repeat has the id row + k * n, so that it gets another crop and another augmentation. The
row is clip_id % n.

The crop of a clip depends on (seed, epoch, clip id) only, and the order of an epoch on
(seed, epoch) only. So neither the number of workers nor an interruption changes a run.
"""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from .audio import SHORT, AudioError, fit, read, tile_starts
from .cache import MAX_SECONDS, InMemoryClips, WaveCache
from .clip_rng import Purpose, uniform
from .manifest import Manifest
from .sampling import SAMPLERS, draw_rows, epoch_order, epoch_size, epoch_steps
from .workers import HANGS_SECONDS, Loader, ignore_signals


class CropKey(NamedTuple):
    """The training crop of a clip in an epoch."""
    clip_id: int
    epoch: int  # counted from 0


class TileKey(NamedTuple):
    """A tile of a clip, for evaluation."""
    row: int
    start: int  # in samples from the beginning of the clip


@dataclass
class Batch:
    wave: torch.Tensor  # (B, samples) float32
    target: torch.Tensor  # (B,) class indices, or (B, classes) float32: see Manifest.targets
    rows: np.ndarray  # (B,) row of each clip in the manifest
    broken: list[tuple[int, str]]  # (row, reason) of unreadable clips, which are not in the batch
    cache_problem: str | None = None  # why decoded audio is not cached any more
    noise: torch.Tensor | None = None  # (B, samples) float32 background noise; zeros: none
    clip_ids: np.ndarray | None = None  # (B,), see the top of this file; default: rows

    def __post_init__(self):
        if self.clip_ids is None:
            self.clip_ids = self.rows

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory, for asynchronous copies; for DataLoader."""
        noise = None if self.noise is None else self.noise.pin_memory()
        return replace(
            self, wave=self.wave.pin_memory(), target=self.target.pin_memory(), noise=noise
        )


class Clips(Dataset):
    """Waveforms of `samples` samples at `rate` Hz, one clip per row of a manifest.

    short: what happens to clips shorter than that, see audio.fit. "place" draws a place per epoch
        in training and takes the middle in evaluation.
    cache: a WaveCache, or None to decode the needed part of a clip each time.
    crop: how training crops are placed: "random", "start", or "active" (biased to loud segments).
    """

    def __init__(
        self,
        manifest: Manifest,
        rate: int,
        samples: int,
        short: str = "repeat",
        seed: int = 0,
        cache: WaveCache | None = None,
        crop: str = "random",
    ):
        if short not in SHORT:
            raise ValueError(f"short is {short!r}: use {', '.join(SHORT)}")
        self.manifest = manifest
        self.needs_matrix = manifest.needs_matrix
        self.rate = rate
        self.samples = samples
        self.short = short
        self.seed = seed
        self.cache = cache
        self.crop = crop
        self.in_memory: InMemoryClips | None = None
        self.begin = self._in_samples(manifest.start)  # (n,) within the file
        self.total = np.maximum(1, self._in_samples(manifest.duration))  # (n,)
        self._noise_source, self._noise_rows, self._noise_p = self, np.zeros(0, np.int64), 0.0
        self._activity = {}  # row -> cumulative activity of its blocks, see `activity`

    def _in_samples(self, seconds):
        return np.round(seconds.astype(np.float64) * self.rate).astype(np.int64)

    def __len__(self):
        return len(self.manifest)

    @property
    def bytes(self) -> int:
        """Size of all clips as int16."""
        return 2 * int(self.total.sum())

    @property
    def longest(self) -> float:
        """Seconds of the longest clip."""
        return float(self.total.max(initial=0)) / self.rate

    def tiles(self, row: int) -> list[int]:
        """Starts of the evaluation tiles of a row, in samples from its beginning."""
        return tile_starts(int(self.total[row]), self.samples)

    def set_noise(self, p: float, rows: ArrayLike, source: "Clips | None" = None) -> None:
        """Give a training clip background noise with probability p, from these rows of `source`.

        source: other Clips of the same rate and length; default: these clips.
        """
        self._noise_source = source or self
        self._noise_rows = np.asarray(rows, np.int64)
        self._noise_p = p

    def load_into_memory(self, device: torch.device, show_progress: bool = False) -> None:
        """Decode all clips into one tensor on a device. Batches then come from there."""
        def fetch(row):
            return self.cache.read(
                self.manifest.file(row), int(self.begin[row]), int(self.total[row])
            )

        self.in_memory = InMemoryClips(self.total, fetch, device, show_progress)

    def crop_start(self, clip_ids: ArrayLike, epoch: int) -> np.ndarray:
        """Starts of the training crops of clips (n,) in an epoch, in samples: (n,) int64."""
        clip_ids = np.asarray(clip_ids, np.int64)
        rows = clip_ids % len(self)
        spare = np.maximum(0, self.total[rows] - self.samples)
        if self.crop == "start":
            return np.zeros_like(spare)
        u = uniform(self.seed, epoch, clip_ids, Purpose.CROP, 1)[:, 0]
        starts = (u * (spare + 1)).astype(np.int64)
        if self.crop == "active":
            # Very long clips keep their random crop: it would take too long to decode them.
            short_enough = self.total[rows] <= MAX_SECONDS * self.rate
            for i in np.flatnonzero((spare > 0) & short_enough):
                starts[i] = self._active_start(int(rows[i]), u[i], int(spare[i]))
        return starts

    def _active_start(self, row, u, spare):
        """A start in [0, spare], drawn in proportion to the activity within the crop.

        u: uniform number in [0, 1). Starts are equally likely if there is no activity.
        """
        block = self.rate // 20  # samples
        cumulative = self._cumulative_activity(row, block)
        first = np.arange(spare // block + 1)  # block in which each possible crop starts
        last = np.minimum(first + self.samples // block, len(cumulative) - 1)
        first_inside = np.minimum(first, last)
        crop_activity = np.maximum(0, cumulative[last] - cumulative[first_inside])
        weight = np.cumsum(crop_activity + 1e-3)
        # Invert the cumulative weights, linearly within a block.
        target = u * weight[-1]
        i = int(np.searchsorted(weight, target, side="right"))
        below = weight[i - 1] if i else 0.0
        fraction = (target - below) / (weight[i] - below)
        return min(spare, int((i + fraction) * block))

    def _cumulative_activity(self, row, block):
        if row not in self._activity:
            try:
                wave = self._read(row, 0, int(self.total[row]))
                self._activity[row] = activity(wave, block)
            except AudioError:  # reported when the crop itself is read
                return np.zeros(1)
        return self._activity[row]

    def batch(self, keys: Sequence[CropKey] | Sequence[TileKey]) -> Batch:
        """Load the crops or the tiles of these keys, which are all of one kind and one epoch.

        Plain tuples are taken for TileKeys.
        """
        if len(keys) and isinstance(keys[0], CropKey):
            epoch = keys[0].epoch
            clip_ids = np.array([key.clip_id for key in keys], np.int64)
            starts = self.crop_start(clip_ids, epoch)
            noise = self._noise(clip_ids, epoch)
            positions = uniform(self.seed, epoch, clip_ids, "place", 1)[:, 0]
        else:
            clip_ids = np.array([row for row, _ in keys], np.int64)
            starts = np.array([start for _, start in keys], np.int64)
            noise, positions = None, None

        rows = clip_ids % len(self)
        wave, readable, broken = self._waves(rows, starts, self.short, positions)
        rows = rows[readable]
        if self.needs_matrix:
            target = self.manifest.targets(rows)
        else:
            target = self.manifest.labels[rows].astype(np.int64)
        return Batch(
            wave,
            torch.from_numpy(target),
            rows,
            broken,
            cache_problem=self.cache.problem if self.cache else None,
            noise=None if noise is None else noise.index_select(0, _indices(readable, noise)),
            clip_ids=clip_ids[readable],
        )

    __getitems__ = batch  # DataLoader calls this with the keys of a batch

    def _waves(self, rows, starts, short, positions=None):
        """(readable, samples) float32, a mask of readable rows (B,), [(row, reason)] of others."""
        if positions is None:
            positions = np.full(len(rows), 0.5)  # the middle
        if self.in_memory is not None:
            return self._waves_in_memory(rows, starts, short, positions)
        wave = np.empty((len(rows), self.samples), np.float32)
        readable = np.ones(len(rows), bool)
        broken = []
        for i, (row, start) in enumerate(zip(rows.tolist(), starts.tolist())):
            length = min(self.samples, int(self.total[row]) - start)
            try:
                part = self._read(row, start, length)
                wave[i] = fit(part, self.samples, short, positions[i])
            except AudioError as error:
                readable[i] = False
                broken.append((row, str(error)))
        if not readable.all():  # indexing copies
            wave = wave[readable]
        return torch.from_numpy(wave), readable, broken

    def _waves_in_memory(self, rows, starts, short, positions):
        reasons = self.in_memory.reasons
        broken = [(row, reasons[row]) for row in rows.tolist() if row in reasons]
        readable = np.array([row not in reasons for row in rows.tolist()], bool)
        rows, starts, positions = rows[readable], starts[readable], positions[readable]
        lengths = np.minimum(self.samples, self.total[rows] - starts)
        wave = self.in_memory.cut(rows, starts, lengths, self.samples, short, positions)
        return wave, readable, broken

    def _noise(self, clip_ids, epoch):
        """A random crop of a noise row for each clip (B, samples), zeros for clips without noise.

        None if no clip ever gets noise.
        """
        if not (self._noise_p and len(self._noise_rows)):
            return None
        source = self._noise_source
        u = uniform(self.seed, epoch, clip_ids, Purpose.NOISE, 3)  # (B, 3)
        noisy = u[:, 0] < self._noise_p
        choice = (u[:, 1] * len(self._noise_rows)).astype(np.int64)
        if source is self:  # take the next row instead of the clip's own
            choice += self._noise_rows[choice] == clip_ids % len(self)
        rows = self._noise_rows[choice % len(self._noise_rows)]
        spare = np.maximum(0, source.total[rows] - self.samples)
        starts = (u[:, 2] * (spare + 1)).astype(np.int64)
        # Noise fills the window, so a short noise row is not placed in silence.
        short = "repeat" if source.short == "place" else source.short
        # A broken noise row gives no noise; it is reported when it comes as a clip.
        waves, readable, _ = source._waves(rows[noisy], starts[noisy], short)
        noise = waves.new_zeros(len(clip_ids), self.samples)
        noisy[noisy] = readable
        return noise.index_copy_(0, _indices(noisy, noise), waves)

    def _read(self, row, start, length):
        """(length,) float32 of a row, from `start` on."""
        file, begin, total = self.manifest.file(row), int(self.begin[row]), int(self.total[row])
        if self.cache is None or total > MAX_SECONDS * self.rate:
            return read(file, self.rate, begin + start, length)
        samples, scale = self.cache.read(file, begin, total, start, length)
        return samples * np.float32(scale)


def _indices(mask, like):
    """Indices of the true values of a mask (B,), on the device of `like`.

    A mask, or indices on the host, would make the host wait for the device.
    """
    return torch.from_numpy(np.flatnonzero(mask)).to(like.device, non_blocking=True)


def activity(wave: np.ndarray, block: int) -> np.ndarray:
    """Cumulative activity of the blocks of a wave, in dB: (samples // block + 1,).

    block: in samples. The activity of a block is its level above the background, at most 30 dB. The
    background is 3 dB above the 20% quantile of the block levels.
    """
    blocks = wave[:len(wave) // block * block].reshape(-1, block)
    level = 10 * np.log10(np.square(blocks, dtype=np.float32).mean(axis=1) + 1e-10)
    background = np.quantile(level, 0.2) + 3 if len(level) else 0
    return np.concatenate([[0.0], np.cumsum(np.clip(level - background, 0, 30))])


def _unchanged(batch):
    """The collate function: `Clips.batch` returns complete batches."""
    return batch


class TrainLoader:
    """The micro-batches of training, by epoch and optimizer step."""

    def __init__(
        self,
        clips: Clips,
        rows: ArrayLike,
        batch_size: int,
        effective_batch: int,
        seed: int = 0,
        workers: int = 0,
        pin: bool = False,
        sampler: str = "shuffle",
        negative_share: float = 1.0,
    ):
        self.clips = clips
        self.rows = np.asarray(rows)
        has_label = clips.manifest.has_label[self.rows]
        self.labelled, self.unlabelled = self.rows[has_label], self.rows[~has_label]
        self.clips_per_epoch = epoch_size(clips.manifest, rows, negative_share)
        self.seed = seed
        self.power = SAMPLERS[sampler]
        self.batch_size = batch_size
        self.effective_batch = effective_batch
        self._keys = []  # of all micro-batches to load; replaced for each epoch, the workers stay
        self._loader = _loader(clips, _ListSampler(self._keys), workers, pin,
                               persistent_workers=workers > 0)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.clips_per_epoch // self.effective_batch)  # rounded up

    def order(self, epoch: int) -> np.ndarray:
        """The clip ids of an epoch in their order, see sampling.epoch_order."""
        labels = self.clips.manifest.labels[self.labelled]
        n_unlabelled = self.clips_per_epoch - len(self.labelled)
        others = draw_rows(self.unlabelled, n_unlabelled, self.seed, epoch)
        return epoch_order(self.labelled, self.seed, epoch, labels, self.power, len(self.clips),
                           others)

    def steps(
        self, epoch: int, start: int = 0, rank: int = 0, n_ranks: int = 1
    ) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each optimizer step of an epoch (counted from 0).

        start: the first step. A rank gets the micro-batches rank, rank + n_ranks, ... of each step.
        So the content of a micro-batch does not depend on the number of ranks.
        """
        plan = epoch_steps(self.order(epoch), self.batch_size, self.effective_batch)
        plan = [micro_batches[rank::n_ranks] for micro_batches in plan[start:]]
        self._keys[:] = [
            [CropKey(clip_id, epoch) for clip_id in clip_ids]
            for micro_batches in plan
            for clip_ids in micro_batches
        ]
        if self.clips.in_memory is not None:
            batches = map(self.clips.batch, list(self._keys))
        else:
            batches = iter(self._loader)
        for micro_batches in plan:
            yield [next(batches) for _ in micro_batches]


class _ListSampler:
    """A batch sampler that reads a list whenever an epoch begins.

    It refers to the list only. With a reference to the TrainLoader, the two would keep each other
    and the worker processes alive.
    """

    def __init__(self, keys):
        self.keys = keys

    def __iter__(self):
        return iter(list(self.keys))


def evaluation_batches(
    clips: Clips, rows: Iterable[int], batch_size: int, workers: int = 0, pin: bool = False
) -> Iterable[Batch]:
    """Batches of every tile of every row, in order. The tiles of a row may be in two batches."""
    keys = [TileKey(int(row), start) for row in rows for start in clips.tiles(row)]
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    if clips.in_memory is not None:
        return map(clips.batch, batches)
    return _loader(clips, batches, workers, pin)


def _loader(clips, batch_sampler, workers, pin, persistent_workers=False):
    """Loads the batches of these keys, which `Clips.batch` makes complete."""
    return Loader(
        clips, batch_sampler=batch_sampler, collate_fn=_unchanged, num_workers=workers,
        pin_memory=pin, persistent_workers=persistent_workers,
        timeout=HANGS_SECONDS if workers else 0, worker_init_fn=ignore_signals)
