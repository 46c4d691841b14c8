"""Recordings of any length to windows, with constant memory; windows to batches.

A recording is decoded and resampled once, block by block. The content of a batch follows from
the list of recordings and their headers alone.
"""
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import soxr

from .audio import (
    SHORT,
    AudioError,
    AudioFile,
    AudioInfo,
    TruncatedError,
    decode_mono,
    fit,
    length_at,
    open_audio,
    probe,
    tile_starts,
)
from .files import IgnoredFiles, find_audio
from .manifest import DataError
from .scan import WORKERS

BLOCK = 1 << 16  # frames decoded at a time, or one window if that is longer
BATCHES_PER_GROUP = 8  # see `number_groups`
UNSAFE = frozenset('/\\:*?"<>|')  # characters that some systems do not allow in file names
MAX_NAME_BYTES = 150  # a suffix is added later, and file systems allow 255


@dataclass(frozen=True)
class Windows:
    """How recordings are cut into windows.

    Windows of `samples` samples start every `hop` samples. The last one is moved back to end with
    the recording. short: for recordings shorter than a window, see audio.fit.
    """
    rate: int  # Hz
    samples: int
    hop: int
    short: str

    def __post_init__(self):
        if self.short not in SHORT or not 0 < self.hop <= self.samples:
            raise ValueError(f"windows of {self.samples} samples, hop {self.hop}, {self.short!r}")

    def total(self, info: AudioInfo) -> int:
        """Samples of a recording, the same number as in evaluation.

        Evaluation rounds seconds in float32. That is too coarse for recordings of several minutes,
        so the result differs from the exact length by one sample at most.
        """
        exact = length_at(info, self.rate)
        as_evaluation = round(float(np.float32(info.seconds)) * self.rate)
        return min(max(exact, as_evaluation), exact + 1)

    def starts(self, info: AudioInfo) -> list[int]:
        """Starts of the windows of a recording, in samples."""
        return tile_starts(self.total(info), self.samples, self.hop)


@dataclass(slots=True)
class Recording:
    path: str  # as given by the user, or below a folder given by the user
    file: str  # the same as an absolute path
    name: str  # unique relative path for result files, of safe characters
    size: int = -1  # bytes
    mtime_ns: int = -1
    info: AudioInfo | None = None
    reason: str | None = None  # why it cannot be used
    windows: int = 0  # how many
    truncated: str | None = None  # why only its beginning was used

    @property
    def key(self) -> str:
        """A hash of the file's path, used as a file name."""
        return hashlib.blake2b(os.fsencode(self.file), digest_size=16).hexdigest()


def find_recordings(inputs: Sequence[str], log: Callable[[str], None] = print
                    ) -> list[Recording]:
    """Find all given files, and all audio files below given folders, sorted by path, each once.

    log: receives a line on recordings that cannot be decoded here. Raises DataError if a path does
    not exist or there are no audio files.
    """
    paths = {}  # absolute path -> path as the user gave it
    folders = []  # of all inputs, absolute
    ignored = IgnoredFiles()
    for given in inputs:
        absolute = os.path.abspath(given)
        if os.path.isdir(absolute):
            folders.append(absolute)
            for path in _audio_in(absolute, ignored):
                paths.setdefault(os.path.join(absolute, path), os.path.join(given, path))
        elif os.path.lexists(absolute):
            folders.append(os.path.dirname(absolute))
            paths.setdefault(absolute, given)
        else:
            raise DataError(f"{given}: no such file or folder; check the path")
    if not paths:
        others = [f"{n} x {suffix or 'no suffix'}" for suffix, n in ignored.most_common(3)]
        listed = f" ({', '.join(others)})" if others else ""
        advice = "give recordings or a folder of them"
        if ignored.undecodable:
            advice = "they cannot be decoded here: convert them to wav or flac"
        raise DataError(f"{inputs[0]}: no audio files{listed}; {advice}")
    for line in ignored.describe() if ignored.undecodable else ():
        log(f"  {line}")

    common = os.path.commonpath(folders)
    recordings = []
    for file in sorted(paths, key=os.fsencode):
        parts = os.path.relpath(file, common).split("/")
        recordings.append(Recording(paths[file], file, "/".join(map(safe_name, parts))))
    return recordings


def _audio_in(folder, ignored):
    """Paths of the audio files below an absolute folder, relative to it. Raises DataError."""
    parent, name = os.path.split(folder)
    try:
        return [path.removeprefix(name + "/") for path in find_audio(parent, name, ignored)]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; make it readable "
                        "or remove it") from None


def safe_name(name: str) -> str:
    """Change the name of a file or folder so that every system allows it.

    A changed name ends in a hash of the original name, so that names stay different. So does a name
    that already looks like a changed one.
    """
    safe = "".join(c if c.isprintable() and c not in UNSAFE else "_" for c in name)
    looks_changed = re.search("-[0-9a-f]{12}$", name)
    if safe == name and len(name.encode()) <= MAX_NAME_BYTES and not looks_changed:
        return name
    digest = hashlib.blake2b(os.fsencode(name), digest_size=6).hexdigest()
    return f"{safe.encode()[:MAX_NAME_BYTES].decode(errors='ignore')}-{digest}"


def read_headers(recordings: Sequence[Recording], windows: Windows) -> None:
    """Fill in size, mtime_ns, info and windows of each recording, or reason if it is broken."""
    def read_header(recording):
        try:
            status = os.stat(recording.file)
            recording.size, recording.mtime_ns = status.st_size, status.st_mtime_ns
            recording.info = probe(recording.file)
            recording.windows = len(windows.starts(recording.info))
        except OSError as error:
            recording.reason = f"cannot be opened: {error.strerror}"
        except AudioError as error:
            recording.reason = str(error)

    pool = ThreadPoolExecutor(WORKERS)
    try:
        for _ in pool.map(read_header, recordings):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def number_groups(counts: Sequence[int], size: int) -> list[int]:
    """Assign recordings to groups, in their order.

    counts: (n,) windows of each recording; size: windows per batch. Neighbours share a group up to
    BATCHES_PER_GROUP * size windows; a longer recording has its own group. A batch never has
    windows of two groups. So if a stopped run continues with its first unfinished group, its
    batches are the same, and the scores are the same to the last bit.
    """
    groups, group, n_windows = [], 0, 0
    for count in counts:
        if n_windows and n_windows + count > BATCHES_PER_GROUP * size:
            group += 1
            n_windows = 0
        groups.append(group)
        n_windows += count
    return groups


def read_windows(file: str, windows: Windows) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (start, end, (samples,) float32) of each window of a recording.

    start, end: in samples at `windows.rate`. To about 1e-5, a window equals the result of
    audio.read and audio.fit. Raises AudioError, possibly after some windows. A
    TruncatedError comes after the windows of what decodes, of which the last may be shorter. An
    MP3 that is shorter than its header says may lack the last window.
    """
    with open_audio(file) as audio:
        info = audio.info()
        starts = windows.starts(info)
        total = length_at(info, windows.rate)
        wave = np.zeros(0, np.float32)  # decoded samples that a window still needs
        first = 0  # place of wave[0] in the recording
        done = 0  # windows
        blocks, truncated = _resampled(audio, windows), None
        while True:
            try:
                block = next(blocks, None)
            except TruncatedError as error:
                block, truncated = None, error
            if block is None:
                break
            wave = np.concatenate([wave, block])
            while done < len(starts):
                start, end = starts[done], starts[done] + windows.samples
                if end > min(total, first + len(wave)):
                    break
                yield start, end, wave[start - first:end - first].copy()
                done += 1
            not_needed = starts[done] - first if done < len(starts) else len(wave)
            not_needed = min(not_needed, len(wave))
            wave = wave[not_needed:]
            first += not_needed

    # A window may be left that reaches beyond the end: of a short recording, or by rounding.
    end = min(total, first + len(wave))
    for start in starts[done:]:
        if start < end:
            part = wave[start - first:end - first]
            yield start, end, fit(part, windows.samples, windows.short)
            if truncated:  # the later windows have nothing else
                break
        elif start == 0 and not truncated:
            raise AudioError("truncated: no samples are left after resampling")
    if truncated:
        raise truncated


def _resampled(audio: AudioFile, windows: Windows) -> Iterator[np.ndarray]:
    """Yield an open recording as blocks (k,) float32, mono, at `windows.rate`."""
    source = audio.rate
    block_frames = max(BLOCK, windows.samples * source // windows.rate)
    blocks = decode_mono(audio, audio.frames, block_frames)
    if source == windows.rate:
        yield from blocks
        return
    resampler = soxr.ResampleStream(source, windows.rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


@dataclass
class WindowBatch:
    wave: np.ndarray  # (B, samples) float32
    windows: list[tuple[Recording, int, int]]  # (recording, start, end) of each, in samples
    # (recording, None or why it is broken): its last window is in this batch or an earlier one
    ended: list[tuple[Recording, str | None]]


def window_batches(
    recordings: Iterable[tuple[Recording, int]], windows: Windows, size: int, workers: int
) -> Iterator[WindowBatch]:
    """Yield batches of up to `size` windows.

    recordings: (recording, group) in their order, see `number_groups`. `workers` recordings are
    decoded at a time, on threads, each up to `size` windows ahead.
    """
    waves, places, ended = [], [], []  # of the batch that is being filled
    group = None

    def finish_batch():
        wave = np.stack(waves) if waves else np.zeros((0, windows.samples), np.float32)
        batch = WindowBatch(wave, places.copy(), ended.copy())
        waves.clear()
        places.clear()
        ended.clear()
        return batch

    for chunk in _decoded(recordings, windows, size, workers):
        if chunk.group != group and (places or ended):
            yield finish_batch()
        group = chunk.group
        for start, end, wave in chunk.windows:
            if len(places) == size:
                yield finish_batch()
            waves.append(wave)
            places.append((chunk.recording, start, end))
        if chunk.is_last:
            ended.append((chunk.recording, chunk.reason))
    if places or ended:
        yield finish_batch()


class _Chunk(NamedTuple):
    """Consecutive windows of one recording."""
    recording: Recording
    group: int
    windows: list[tuple[int, int, np.ndarray]]  # as read_windows yields them
    is_last: bool
    reason: str | None  # why the recording is broken


def _decoded(recordings, windows, size, workers):
    """Yield the recordings as _Chunks of up to `size` windows, in order."""
    def next_windows(iterator):
        found = []
        try:
            for window in islice(iterator, size):
                found.append(window)
        except TruncatedError as error:
            return found, error
        except AudioError as error:
            return [], error
        return found, None

    pool = ThreadPoolExecutor(workers)
    waiting = iter(recordings)
    queue = deque()  # recordings that are being decoded, in order

    def open_next():
        for recording, group in islice(waiting, 1):
            iterator = read_windows(recording.file, windows)
            queue.append((recording, group, iterator, pool.submit(next_windows, iterator)))

    try:
        for _ in range(workers):
            open_next()
        while queue:
            recording, group, iterator, future = queue.popleft()
            is_last, n_windows = False, 0
            while not is_last:
                found, error = future.result()
                n_windows += len(found)
                is_last = error is not None or len(found) < size
                reason = str(error) if error else None
                if n_windows and isinstance(error, TruncatedError):
                    recording.truncated, reason = reason, None
                if not is_last:
                    future = pool.submit(next_windows, iterator)
                yield _Chunk(recording, group, found, is_last, reason)
            open_next()
    finally:
        pool.shutdown(cancel_futures=True)
