"""Recordings of any length -> windows, in memory that does not grow with them; windows -> batches.

A recording is decoded and resampled block by block, once, from its beginning to its end. What a batch holds is settled
by the list of recordings and their headers alone.
"""
import hashlib
import os
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import soxr

from .audio import AudioError, AudioInfo, decode_mono, fit, info_of, length_at, open_audio, probe, tile_starts
from .manifest import DataError
from .files import find_audio
from .scan import WORKERS

BLOCK = 1 << 16  # frames decoded at a time, or as many as a window has
GROUP = 8  # batches, see `number_groups`
UNSAFE = frozenset('/\\:*?"<>|')  # not taken into a file name; nor is what cannot be printed
ROOM = 150  # bytes of a name that are kept: some suffix follows, and 255 is the most


@dataclass(frozen=True)
class Windows:
    """How a recording is cut: `samples` samples at `rate` Hz, one window each `hop` samples, the last one moved back to
    end with the recording; short: what becomes of a recording shorter than a window, see audio.fit."""
    rate: int
    samples: int
    hop: int
    short: str

    def __post_init__(self):
        if self.short not in ("repeat", "pad") or not 0 < self.hop <= self.samples:
            raise ValueError(f"windows of {self.samples} samples, one each {self.hop}, {self.short!r}")

    def total(self, info):
        """Samples of a recording of that AudioInfo as evaluation counts them: its seconds, which are float32 there,
        rounded. From some minutes on float32 is too coarse for that, so never more than one off."""
        exact = length_at(info, self.rate)
        return min(max(exact, round(float(np.float32(info.seconds)) * self.rate)), exact + 1)

    def starts(self, info):
        return tile_starts(self.total(info), self.samples, self.hop)


@dataclass(slots=True)
class Recording:
    path: str  # as the person named it, or its folder
    file: str  # the same, absolute
    name: str  # a relative path for its results, of safe characters, which no other recording has
    size: int = -1  # bytes
    mtime_ns: int = -1
    info: AudioInfo | None = None
    reason: str | None = None  # why it cannot be used
    windows: int = 0

    @property
    def key(self):
        """A name for its file that has nothing of the file's own name in it."""
        return hashlib.blake2b(os.fsencode(self.file), digest_size=16).hexdigest()


def find_recordings(inputs):
    """Every file named, and every audio file below a folder named -> [Recording] sorted by path, each once.

    Raises DataError for a name that is not there, and where nothing is found.
    """
    found, tops, ignored = {}, [], Counter()
    for given in inputs:
        top = os.path.abspath(given)
        tops.append(top if os.path.isdir(top) else os.path.dirname(top))
        if not os.path.isdir(top):
            if not os.path.lexists(top):
                raise DataError(f"{given}: no such file or folder; mend the path")
            found.setdefault(top, given)
            continue
        above, name = os.path.split(top)
        try:
            for path in find_audio(above, name, ignored):
                inside = path.removeprefix(name + "/")
                found.setdefault(os.path.join(top, inside), os.path.join(given, inside))
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}; make it readable or take it away") from None
    if not found:
        seen = ", ".join(f"{n} x {suffix or 'no suffix'}" for suffix, n in ignored.most_common(3))
        raise DataError(f"{inputs[0]}: no audio files in there{f' ({seen})' if seen else ''}; give recordings, or a folder "
                        "that holds some")
    common = os.path.commonpath(tops)
    return [Recording(found[file], file, "/".join(map(safe, os.path.relpath(file, common).split("/"))))
            for file in sorted(found, key=os.fsencode)]


def safe(name):
    """The name of a file or folder as one that every system takes; what had to be changed, or could be mistaken for one
    that was, gets a hash of the name at its end."""
    plain = "".join(c if c.isprintable() and c not in UNSAFE else "_" for c in name)
    if plain == name and len(name.encode()) <= ROOM and not re.search("-[0-9a-f]{12}$", name):
        return name
    digest = hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()
    return f"{plain.encode()[:ROOM].decode(errors='ignore')}-{digest}"


def look(recordings, cut):
    """Read the headers: fills in size, mtime_ns, info and windows, or the reason, of each recording."""
    def one(recording):
        try:
            status = os.stat(recording.file)
            recording.size, recording.mtime_ns = status.st_size, status.st_mtime_ns
            recording.info = probe(recording.file)
            recording.windows = len(cut.starts(recording.info))
        except OSError as error:
            recording.reason = f"cannot be opened: {error.strerror}"
        except AudioError as error:
            recording.reason = str(error)

    pool = ThreadPoolExecutor(WORKERS)
    try:
        for _ in pool.map(one, recordings):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def number_groups(counts, size):
    """Numbers of windows (n,) of recordings in their order -> (n,) the group of each: neighbours are together up to
    GROUP * size windows; a longer recording is alone.

    A batch never holds windows of two groups. So it holds the same, and a score has the same last bit, when a
    stopped run goes on with the first group that is not done.
    """
    groups, group, filled = [], 0, 0
    for count in counts:
        if filled and filled + count > GROUP * size:
            group, filled = group + 1, 0
        groups.append(group)
        filled += count
    return groups


def windows_of(file, cut):
    """Yield (start, end, (samples,) float32) of each window of a recording, start and end in samples at the rate of
    `cut`; a window equals, to about 1e-5, what audio.read and audio.fit give for it.

    Raises AudioError, maybe after some windows. An MP3 that is shorter than its header says may lack the last.
    """
    with open_audio(file) as audio:
        info = info_of(audio)
        starts, there = cut.starts(info), length_at(info, cut.rate)
        wave, at, i = np.zeros(0, np.float32), 0, 0  # wave[0] is sample `at` of the recording
        for block in resampled(audio, cut):
            wave = np.concatenate([wave, block])
            while i < len(starts) and starts[i] + cut.samples <= min(there, at + len(wave)):
                yield starts[i], starts[i] + cut.samples, wave[starts[i] - at:][:cut.samples].copy()
                i += 1
            gone = min(starts[i] - at if i < len(starts) else len(wave), len(wave))
            wave, at = wave[gone:], at + gone
    end = min(there, at + len(wave))
    for start in starts[i:]:  # one at most, but for a recording that ends early
        if start < end:
            yield start, end, fit(wave[start - at:end - at], cut.samples, cut.short)
        elif start == 0:
            raise AudioError("truncated: nothing is left after resampling")


def resampled(audio, cut):
    """Yield blocks (k,) float32 of an open recording, mono, at the rate of `cut`."""
    most = max(BLOCK, cut.samples * audio.samplerate // cut.rate)
    blocks = decode_mono(audio, audio.frames, most)
    if audio.samplerate == cut.rate:
        yield from blocks
        return
    resampler = soxr.ResampleStream(audio.samplerate, cut.rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


@dataclass
class WindowBatch:
    wave: np.ndarray  # (B, samples) float32
    windows: list  # [(recording, start, end)] of each, in samples at the model's rate
    ended: list  # [(recording, None or why it cannot be used)] whose last window is in this batch or before


def window_batches(recordings, cut, size, workers):
    """Yield WindowBatch of up to `size` windows of the recordings [(recording, group)] in their order. `workers` of them
    are decoded at a time, on threads, each up to `size` windows ahead."""
    waves, windows, ended = [], [], []

    def batch():
        full = WindowBatch(np.stack(waves) if waves else np.zeros((0, cut.samples), np.float32), windows[:], ended[:])
        for held in (waves, windows, ended):
            held.clear()
        return full

    group = None
    for recording, its_group, found, last, reason in _decoded(recordings, cut, size, workers):
        if its_group != group and (windows or ended):
            yield batch()
        group = its_group
        for start, end, wave in found:
            if len(windows) == size:
                yield batch()
            waves.append(wave)
            windows.append((recording, start, end))
        if last:
            ended.append((recording, reason))
    if windows or ended:
        yield batch()


def _decoded(recordings, cut, size, workers):
    """Yield (recording, its group, up to `size` of its windows, whether these are the last, None or why it is broken)."""
    def more(windows):
        try:
            return list(islice(windows, size)), None
        except AudioError as error:
            return [], str(error)

    def open_next():
        for recording, group in islice(waiting, 1):
            windows = windows_of(recording.file, cut)
            line.append((recording, group, windows, pool.submit(more, windows)))

    waiting, line = iter(recordings), deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            open_next()
        while line:
            recording, group, windows, job = line.popleft()
            last = False
            while not last:
                found, reason = job.result()
                last = len(found) < size
                if not last:
                    job = pool.submit(more, windows)
                yield recording, group, found, last, reason
            open_next()
    finally:
        pool.shutdown(cancel_futures=True)
