"""Decoded recordings kept as int16 at the model's rate: on the disk, shared by all runs, or in one tensor.

Where a clip comes from changes nothing in it: with a cache every recording is decoded whole and rounded to 16 bits
of its own scale, also the first time and also where nothing can be kept. A scale is a power of two, so a 16-bit
recording at the model's rate stays what it is, bit for bit.
"""
import hashlib
import os
import shutil
import struct
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .audio import AudioError, fit, read, stretch

LONGEST = 30 * 60  # seconds: of longer recordings only the wanted stretch is decoded, each time
RESERVE = 2 << 30  # bytes left free on the disk: checkpoints have to find room
HEAD = struct.Struct("<8s4qdI12x")  # magic, source size, mtime and inode, samples, scale, CRC-32 of all the rest
MAGIC = b"warble 2"
CACHES = ("auto", "off", "disk", "ram", "device")
THREADS = min(8, 2 * (os.cpu_count() or 1))


def quantise(wave):
    """(samples,) float32 -> (samples,) int16 and the power of two that gives it back within half a step."""
    top = max(float(wave.max(initial=0)) / 32767, -float(wave.min(initial=0)) / 32768, 2.0**-100)
    scale = 2.0 ** np.ceil(np.log2(top))
    return np.rint(wave / np.float32(scale)).astype(np.int16), scale


class WaveCache:
    """Clips as int16 at `rate`, one file each below `folder`; nothing is written where `write` is False.

    A file of the cache is named after the recording's path and the clip's place in it, and says the size, mtime and
    inode of what it was made from, so a changed recording is decoded anew and takes its place. It is written beside
    and renamed, and its checksum is looked at once in each process: a crash, another run or a full disk leave
    nothing that is believed.
    """

    def __init__(self, folder, rate, write=True):
        self.folder, self.rate, self.write = Path(folder) / str(rate), rate, write
        self.trouble = None  # why nothing is written any more
        self._checked = set()  # entries whose checksum was right
        self._last = None  # the last clip that was decoded, for its next tile where nothing is written

    def read(self, path, begin, total, start=0, length=None):
        """Of the clip of `total` samples that begins at `begin` in a recording, the stretch of `length` from `start`
        on -> (length,) int16 and their scale, a float. Raises AudioError like audio.read."""
        raw = os.fsencode(os.path.abspath(path))
        try:
            state = _state(raw)
        except OSError:
            state = None  # gone or closed: audio.read has the words for it
        name = hashlib.blake2b(raw + b"\0%d %d" % (begin, total), digest_size=16).hexdigest()
        entry = self.folder / name[:2] / name[2:]
        found = self._load(entry, state, start, length)
        if found is not None:
            return found
        last = self._last  # looked at once: other threads write it
        if last is None or last[0] != (entry, state):
            last = self._last = (entry, state), *quantise(read(path, self.rate, begin, total))
            if self.write:
                self._save(entry, state, *last[1:], raw)
        _, clip, scale = last
        first, last = stretch(len(clip), start, length, self.rate)
        return clip[first:last], scale

    def _load(self, entry, state, start, length):
        """What `read` returns, or None where there is no sound entry of the recording as it is now."""
        try:
            handle = os.open(entry, os.O_RDONLY)
        except OSError:
            return None
        try:
            head = os.pread(handle, HEAD.size, 0)
            if len(head) < HEAD.size:
                return None
            magic, *source, frames, scale, checksum = HEAD.unpack(head)
            if magic != MAGIC or tuple(source) != state or os.fstat(handle).st_size != HEAD.size + 2 * frames:
                return None
            mark = int(entry.name[:14], 16) ^ checksum
            if mark not in self._checked:
                if _checksum(source, scale, os.pread(handle, 2 * frames, HEAD.size)) != checksum:
                    return None
                self._checked.add(mark)
            first, last = stretch(frames, start, length, self.rate)
            return np.frombuffer(os.pread(handle, 2 * (last - first), HEAD.size + 2 * first), np.int16), scale
        except OSError:
            return None
        finally:
            os.close(handle)

    def _save(self, entry, state, clip, scale, raw):
        temporary = None
        try:
            if _state(raw) != state:  # it changed while it was decoded
                return
            entry.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(entry.parent).free < RESERVE + 2 * len(clip):
                raise OSError(f"less than {RESERVE >> 30} GB would be left on the disk")
            handle, temporary = tempfile.mkstemp(dir=entry.parent, prefix="new.")
            with open(handle, "wb") as file:
                file.write(HEAD.pack(MAGIC, *state, len(clip), scale, _checksum(state, scale, clip)) + clip.tobytes())
            os.replace(temporary, entry)
        except OSError as error:
            self.write, self.trouble = False, f"{self.folder}: {error.strerror or error}; decoded audio is kept no more"
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)


def _checksum(state, scale, samples):
    return zlib.crc32(samples, zlib.crc32(struct.pack("<3qd", *state, scale)))


def _state(raw):
    status = os.stat(raw)
    return status.st_size, status.st_mtime_ns, status.st_ino & (2**63 - 1)


class Resident:
    """The `n` clips of a manifest in one int16 tensor on a device, cut there.

    fetch(row) -> ((samples,) int16, scale), raising AudioError, is called once for each, on a few threads.
    """

    def __init__(self, n, fetch, device, show=False):
        self.reasons = {}  # row -> why it could not be read
        self._first, self._length, self._scale = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.float32)

        def load(row):
            try:
                return row, *fetch(row)
            except AudioError as error:
                self.reasons[row] = str(error)
                return row, np.zeros(0, np.int16), 0.0

        parts, place = [], 0
        with ThreadPoolExecutor(THREADS) as pool:
            for row, samples, scale in tqdm(pool.map(load, range(n)), "decoding", n, leave=False, disable=not show):
                self._first[row], self._length[row], self._scale[row] = place, len(samples), scale
                place += len(samples)
                parts.append(torch.from_numpy(samples.copy()).to(device))
        self._samples = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int16, device=device)

    def cut(self, rows, starts, lengths, samples, short):
        """(B, samples) float32 on the device: of each row the stretch that starts at `starts` and is `lengths`
        long or ends with the row, made up to `samples` as audio.fit does it."""
        lengths = np.minimum(lengths, self._length[rows] - starts)
        first, scale = self._first[rows] + starts, self._scale[rows]
        if self._samples.device.type == "cpu":
            clips = zip(first.tolist(), lengths.tolist(), scale, strict=True)
            return torch.from_numpy(np.stack([fit(self._samples[i:i + n].numpy() * s, samples, short) for i, n, s in clips])
                                    if len(rows) else np.zeros((0, samples), np.float32))
        return _gather(self._samples, first, lengths, scale, samples, short)


def _gather(flat, first, lengths, scale, samples, short):
    """The cuts in one go, as a GPU likes it."""
    first, lengths, scale = (torch.from_numpy(values).to(flat.device, non_blocking=True)[:, None]
                             for values in (first, lengths, scale))
    place = torch.arange(samples, device=flat.device)[None, :]
    if short == "repeat":
        return flat[first + place % lengths] * scale
    return flat[first + place.minimum(lengths - 1)] * scale * (place < lengths)


def choose_cache(mode, size, longest, device, folder):
    """What becomes of `--cache` for clips of `size` bytes in all and of at most `longest` seconds -> (mode, why).

    auto: on the GPU where that takes at most a quarter of its free memory, else on the disk where that takes at most
    half of the free space, else off. device and ram, too, need clips of at most LONGEST and room; else it is disk,
    which gives the same samples.
    """
    amount = f"{size / 1e9:.2f} GB of 16-bit samples"
    if mode == "off":
        return mode, "each clip is decoded each time"
    if mode in ("auto", "device") and device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // (4 if mode == "auto" else 2)
    else:
        room = 0 if mode == "auto" else size
    if mode != "disk" and longest <= LONGEST and size <= room:
        return "device" if mode == "auto" else mode, amount
    above = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    if mode == "auto" and size > shutil.disk_usage(above).free // 2:
        return "off", f"{amount} would take more than half of what is free under {above}"
    return "disk", f"up to {amount} in {folder}"
