"""Decoded recordings as 16-bit samples at the model's rate: in files, in memory or on the GPU.

All cache modes but "off" give identical samples. Each clip is decoded as a whole and rounded to 16
bits of its own scale, also if it is not stored afterwards. The scale is a power of two, so a 16-bit
recording at the model's rate keeps its samples bit for bit.
"""
import contextlib
import hashlib
import os
import shutil
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from util import foreign_owner, is_own

from .audio import AudioError, clip_range, fit, place_offset, read

MAX_SECONDS = 30 * 60  # longer clips are not cached: only the needed part is decoded, each time
DISK_RESERVE = 2 << 30  # bytes that stay free on the disk, for checkpoints
# Magic, then size, mtime and inode of the source file, samples, scale, CRC-32 of all but the magic.
HEADER = struct.Struct("<8s4qdI12x")
MAGIC = b"warble 2"
CACHES = ("auto", "off", "disk", "ram", "device")
THREADS = min(8, 2 * (os.cpu_count() or 1))


class FileState(NamedTuple):
    """Tells whether a file has changed."""
    size: int  # bytes
    mtime_ns: int
    inode: int


class CachedClip(NamedTuple):
    """The clip that was decoded last."""
    entry: Path
    source: FileState | None
    samples: np.ndarray  # (n,) int16
    scale: float


def quantise(wave: np.ndarray) -> tuple[np.ndarray, float]:
    """Round a wave (samples,) float32 to int16. Returns the integers and their scale.

    The scale is a power of two; integers * scale differ from the wave by half a scale at most.
    """
    smallest = max(
        float(wave.max(initial=0)) / 32767,
        -float(wave.min(initial=0)) / 32768,
        2.0**-100,  # for digital silence
    )
    scale = 2.0 ** np.ceil(np.log2(smallest))
    return np.rint(wave / np.float32(scale)).astype(np.int16), scale


class WaveCache:
    """Clips as int16 at `rate` Hz, one file per clip in a folder.

    The name of an entry follows from the recording's path and the clip's place in it. Its header
    has size, mtime and inode of the recording, so the entry of a changed recording is ignored and
    replaced. An entry is renamed into place once it is complete, and each process checks its
    checksum once. So corrupt entries are ignored, and a full disk only disables caching.

    A folder of another user is not used, and an entry of another user is ignored and replaced:
    their owner could forge what the model hears.

    write: False reads existing entries but writes none.
    """

    def __init__(self, folder: str | os.PathLike, rate: int, write: bool = True):
        self.folder = Path(folder) / str(rate)
        self.rate = rate
        self.write = write
        self.problem: str | None = None  # why nothing is written any more
        owner = foreign_owner(self.folder.parent.parent, self.folder.parent, self.folder)
        self.is_used = owner is None
        if owner:
            self.write = False
            self.problem = f"{owner}: not used, so no audio is cached; give another --cache-dir"
        self._verified = set()  # entries whose checksum was right
        self._last: CachedClip | None = None  # serves the next tile of the clip if write is False

    def read(
        self,
        path: str | os.PathLike,
        begin: int,
        total: int,
        start: int = 0,
        length: int | None = None,
    ) -> tuple[np.ndarray, float]:
        """Read part of a clip. All numbers are samples at the model's rate.

        begin, total: the clip within the recording; start, length: the part within the clip.
        Returns (length,) int16 and their scale. Raises AudioError like audio.read.
        """
        raw = os.fsencode(os.path.abspath(path))
        try:
            source = _state_of(raw)
        except OSError:
            source = None  # audio.read raises AudioError with the reason
        name = hashlib.blake2b(raw + b"\0%d %d" % (begin, total), digest_size=16).hexdigest()
        entry = self.folder / name[:2] / name[2:]
        cached = self._load(entry, source, start, length)
        if cached is not None:
            return cached

        clip = self._last  # read once: another thread may replace it at any time
        if clip is None or (clip.entry, clip.source) != (entry, source):
            clip = CachedClip(entry, source, *quantise(read(path, self.rate, begin, total)))
            self._last = clip
            if self.write:
                self._save(clip, raw)
        first, end = self._range(len(clip.samples), start, length)
        return clip.samples[first:end], clip.scale

    def _load(self, entry, source, start, length):
        """What `read` returns, or None without a valid entry for the source as it is now."""
        if not self.is_used:
            return None
        try:
            handle = os.open(entry, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or not is_own(status):
                return None
            header = os.pread(handle, HEADER.size, 0)
            if len(header) < HEADER.size:
                return None
            magic, *entry_source, n_samples, scale, checksum = HEADER.unpack(header)
            size = HEADER.size + 2 * n_samples
            if magic != MAGIC or tuple(entry_source) != source or status.st_size != size:
                return None
            entry_key = int(entry.name[:14], 16) ^ checksum  # small, as there may be millions
            if entry_key not in self._verified:
                samples = os.pread(handle, 2 * n_samples, HEADER.size)
                if _checksum(source, scale, samples) != checksum:
                    return None
                self._verified.add(entry_key)
            first, end = self._range(n_samples, start, length)
            part = os.pread(handle, 2 * (end - first), HEADER.size + 2 * first)
            return np.frombuffer(part, np.int16), scale
        except OSError:
            return None
        finally:
            os.close(handle)

    def _range(self, n_samples, start, length):
        """First sample and end of a part of a clip that has decoded to `n_samples`.

        The clip as a whole is sound, so a part ends with it at the latest: an MP3 may decode to
        some samples fewer than its header says.
        """
        if length is not None:
            length = min(length, max(1, n_samples - start))
        return clip_range(n_samples, start, length, self.rate)

    def _save(self, clip, raw):
        """Write the entry of a clip. If that fails, write no more entries."""
        temporary = None
        try:
            if _state_of(raw) != clip.source:  # the recording changed while it was decoded
                return
            folder = clip.entry.parent
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < DISK_RESERVE + 2 * len(clip.samples):
                raise OSError(f"less than {DISK_RESERVE >> 30} GB would stay free on the disk")
            checksum = _checksum(clip.source, clip.scale, clip.samples)
            header = HEADER.pack(MAGIC, *clip.source, len(clip.samples), clip.scale, checksum)
            # Without fsync, which util.atomic_write does: the checksum finds an incomplete entry.
            handle, temporary = tempfile.mkstemp(dir=folder, prefix="new.")
            with open(handle, "wb") as file:
                file.write(header + clip.samples.tobytes())
            os.replace(temporary, clip.entry)
        except OSError as error:
            self.write = False
            self.problem = f"{self.folder}: {error.strerror or error}; no more audio is cached"
            if temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)


def _checksum(source, scale, samples):
    return zlib.crc32(samples, zlib.crc32(struct.pack("<3qd", *source, scale)))


def _state_of(raw):
    status = os.stat(raw)
    inode = status.st_ino & (2**63 - 1)  # fits a signed 64-bit field
    return FileState(status.st_size, status.st_mtime_ns, inode)


class InMemoryClips:
    """All clips of a manifest in one int16 tensor on a device.

    lengths: (n,) samples that each row has at most; a row may decode to fewer. fetch(row) returns
    ((samples,) int16, scale) or raises AudioError. It is called once for each row, on several
    threads.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        fetch: Callable[[int], tuple[np.ndarray, float]],
        device: torch.device,
        show_progress: bool = False,
    ):
        self.reasons: dict[int, str] = {}  # row -> why it could not be read
        n = len(lengths)
        ends = np.cumsum(lengths, dtype=np.int64)
        self._first = ends - lengths  # where the samples of each row begin
        self._length = np.zeros(n, np.int64)
        self._scale = np.zeros(n, np.float32)

        def fetch_or_note(row):
            try:
                return fetch(row)
            except AudioError as error:
                self.reasons[row] = str(error)
                return np.zeros(0, np.int16), 0.0

        # Allocated as a whole: joining the clips in the end would take twice the memory.
        size = int(ends[-1]) if n else 0
        self._samples = torch.zeros(size, dtype=torch.int16, device=device)
        with ThreadPoolExecutor(THREADS) as pool:
            clips = pool.map(fetch_or_note, range(n))
            clips = tqdm(clips, "decoding", n, leave=False, disable=not show_progress)
            for row, (samples, scale) in enumerate(clips):
                samples = samples[:lengths[row]]
                self._length[row], self._scale[row] = len(samples), scale
                place = slice(self._first[row], self._first[row] + len(samples))
                self._samples[place] = torch.from_numpy(samples.copy())

    def cut(
        self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, samples: int, short: str,
        positions: np.ndarray,
    ) -> torch.Tensor:
        """Cut one part from each row. Returns (B, samples) float32 on the device.

        rows, starts, lengths: (B,); a part ends with its row at the latest. short, positions (B,):
        what happens to a part shorter than `samples`, see audio.fit.
        """
        lengths = np.minimum(lengths, self._length[rows] - starts)
        first, scale = self._first[rows] + starts, self._scale[rows]
        if self._samples.device.type != "cpu":
            return _gather(
                self._samples, first, lengths, scale, samples, short, positions
            )
        waves = np.empty((len(rows), samples), np.float32)
        for i in range(len(rows)):
            part = self._samples[first[i]:first[i] + lengths[i]].numpy()
            waves[i] = fit(part * scale[i], samples, short, positions[i])
        return torch.from_numpy(waves)


def _gather(flat, first, lengths, scale, samples, short, positions):
    """`InMemoryClips.cut` as a few operations over all rows, which suits a GPU."""
    def column(values):  # (B,) -> (B, 1) on the device
        return torch.from_numpy(values).to(flat.device, non_blocking=True)[:, None]

    before = place_offset(np.minimum(lengths, samples), samples, positions)
    first, lengths, scale = column(first), column(lengths), column(scale)
    place = torch.arange(samples, device=flat.device)[None, :]
    if short == "repeat":
        return flat[first + place % lengths] * scale
    if short == "place":
        place = place - column(before)
    inside = (place >= 0) & (place < lengths)
    return flat[first + place.clamp(min=0).minimum(lengths - 1)] * scale * inside


def choose_cache(
    mode: str, size: int, longest: float, device: torch.device, folder: Path
) -> tuple[str, str]:
    """Decide which cache the value of `--cache` means. Returns the mode and the reason for it.

    size: bytes of all clips as int16; longest: seconds of the longest clip. "auto" takes the GPU
    if that needs at most a quarter of its free memory, else the disk if that needs at most half of
    the free space, else no cache. "ram" and "device" become "disk" if a clip is longer than
    MAX_SECONDS, "device" also if it needs more than half of the GPU's free memory.
    """
    amount = f"{size / 1e9:.2f} GB of 16-bit samples"
    if mode == "off":
        return mode, "each clip is decoded each time"
    if mode in ("auto", "device") and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        room = free // 4 if mode == "auto" else free // 2
    elif mode == "auto":
        room = 0
    else:
        room = size  # the user knows how much memory there is
    if mode != "disk" and longest <= MAX_SECONDS and size <= room:
        return "device" if mode == "auto" else mode, amount

    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    if mode == "auto" and size > shutil.disk_usage(existing).free // 2:
        return "off", f"{amount} would take more than half of the free space in {existing}"
    return "disk", f"up to {amount} in {folder}"
