"""Decode an audio file to mono float32 samples at a given rate.

soundfile (libsndfile) decodes WAV, FLAC, OGG, MP3 and its other formats; soxr resamples. A file
that cannot be read raises AudioError with the reason. Nothing replaces missing samples.
"""
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soundfile as sf
import soxr

AUDIO_SUFFIXES = frozenset({
    ".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".mp3",
    ".aif", ".aiff", ".aifc", ".au", ".caf",
})
BLOCK = 1 << 20  # frames decoded at a time, so that a false header cannot exhaust the memory
SAMPLE_CHUNKS = {b"RIFF": ("little", b"data"), b"FORM": ("big", b"SSND")}  # WAV and AIFF
UNKNOWN_LENGTH = 0xFFFFFFFF  # in the header of a WAV that was written to a pipe
HEADER_SLACK = 64  # bytes: some writers include the header in the length
MAX_LEVEL = 1e10  # integers stored as floats reach 2e9; the square of 1e19 overflows float32
MP3_SLACK = 4 * 1152  # samples: without a length header, the length of an MP3 is an estimate
SOUNDFILE_ERRORS = (sf.SoundFileError, RuntimeError, OSError, ValueError)


class AudioError(ValueError):
    """The reason why a file cannot be used. The caller adds the name of the file."""


@dataclass(frozen=True)
class AudioInfo:
    rate: int  # Hz
    frames: int  # samples per channel, according to the header
    channels: int
    format: str  # of libsndfile, such as "WAV PCM_16"

    @property
    def seconds(self) -> float:
        return self.frames / self.rate


def open_audio(path: str | os.PathLike) -> sf.SoundFile:
    """Open a file and check its header. Raises AudioError."""
    raw = os.fsencode(path)  # a file name need not be UTF-8
    try:
        status = os.stat(raw)
    except OSError as error:
        raise AudioError(f"cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
        raise AudioError("not a regular file")
    if status.st_size == 0:
        raise AudioError("empty file (0 bytes)")
    try:
        file = sf.SoundFile(raw)
    except (*SOUNDFILE_ERRORS, TypeError) as error:
        raise AudioError(f"not readable as audio: {_reason(error)}") from None
    try:
        _check_header(file, raw)
    except AudioError:
        file.close()
        raise
    return file


def _check_header(file, raw):
    """Raise AudioError if the header is impossible or declares more samples than the file has."""
    if not 100 <= file.samplerate <= 10_000_000 or file.channels < 1:
        raise AudioError(f"impossible header: {file.samplerate} Hz, {file.channels} channels")
    if file.frames <= 0:
        raise AudioError("no samples")
    declared, present = _sample_bytes(raw)
    # libsndfile silently shortens such a file to the samples that are present.
    if declared != UNKNOWN_LENGTH and declared > present + HEADER_SLACK:
        raise AudioError(f"truncated: the header declares {declared} bytes of samples, "
                         f"the file has {present}")


def _sample_bytes(raw):
    """Bytes of samples that the header of a WAV or AIFF declares, and bytes that are present.

    (0, 0) for other formats.
    """
    try:
        with open(raw, "rb") as file:
            byte_order, sample_chunk = SAMPLE_CHUNKS.get(file.read(12)[:4], (None, None))
            if sample_chunk is None:
                return 0, 0
            while len(head := file.read(8)) == 8:
                size = int.from_bytes(head[4:], byte_order)
                if head[:4] == sample_chunk:
                    return size, os.fstat(file.fileno()).st_size - file.tell()
                file.seek(size + size % 2, os.SEEK_CUR)  # chunks are padded to an even length
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from None
    return 0, 0


def _reason(error):
    """The message of an exception on one line."""
    text = getattr(error, "error_string", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")


def info_of(file: sf.SoundFile) -> AudioInfo:
    return AudioInfo(file.samplerate, file.frames, file.channels, f"{file.format} {file.subtype}")


def probe(path: str | os.PathLike) -> AudioInfo:
    """Read the header without decoding. Raises AudioError."""
    with open_audio(path) as file:
        return info_of(file)


def check(path: str | os.PathLike) -> AudioInfo:
    """Decode the whole file, block by block. Raises AudioError if anything is wrong with it."""
    with open_audio(path) as file:
        for _ in _decode(file, file.frames, BLOCK):
            pass
        return info_of(file)


def decode_mono(file: sf.SoundFile, frames: int, block_frames: int = BLOCK) -> Iterator[np.ndarray]:
    """Yield the next `frames` frames as blocks (k,) float32: the mean of the channels.

    Raises AudioError if the file ends too early, cannot be decoded, or has impossible samples.
    """
    for block in _decode(file, frames, block_frames):
        yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]


def _decode(file, frames, block_frames):
    """Like `decode_mono`, but the blocks are (k, channels)."""
    done = 0
    while done < frames:
        requested = min(block_frames, frames - done)
        block = _read_block(file, requested, done)
        done += len(block)
        if len(block):
            yield block
        if len(block) < requested:  # the end of the file
            slack = MP3_SLACK if "MP" in file.format + file.subtype else 0
            if done == 0 or frames - done > slack:
                raise AudioError(f"truncated: the header declares {frames} samples, "
                                 f"the file has {done}")
            return


def _read_block(file, frames, done):
    """Decode up to `frames` frames and check that they are finite and not too loud."""
    try:
        block = file.read(frames, dtype="float32", always_2d=True)
    except (*SOUNDFILE_ERRORS, MemoryError) as error:
        seconds = (file.tell() if file.seekable() else done) / file.samplerate
        raise AudioError(f"decoding fails after {seconds:.1f} s: {_reason(error)}") from None
    lowest, highest = block.min(initial=0), block.max(initial=0)
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise AudioError("has samples that are not finite (NaN or infinity)")
    peak = max(-lowest, highest)
    if peak > MAX_LEVEL:
        raise AudioError(f"has a sample of {peak:.1g}; full scale is 1")
    return block


def length_at(info: AudioInfo, rate: int) -> int:
    """Length of a file in samples after resampling to `rate`."""
    return max(1, info.frames * rate // info.rate)


def clip_range(total: int, start: int, length: int | None, rate: int) -> tuple[int, int]:
    """First sample and end (excluded) of a clip in a recording of `total` samples at `rate`.

    length: None reaches to the end of the recording. A clip may end up to 10 ms later than the
    recording, because times in seconds are rounded; that part is cut off.
    Raises AudioError if the recording is shorter, for example because it changed after the scan.
    """
    if start >= total:
        raise AudioError(f"ends at {total / rate:.2f} s, before the requested start "
                         f"at {start / rate:.2f} s")
    if length is None:
        return start, total
    end = start + length
    if end > total + rate // 100:
        raise AudioError(f"ends at {total / rate:.2f} s, before the requested end "
                         f"at {end / rate:.2f} s")
    return start, min(total, end)


def read(
    path: str | os.PathLike, rate: int, start: int = 0, length: int | None = None
) -> np.ndarray:
    """Read a clip of a file as mono samples at `rate`.

    start, length: in samples at `rate`; a length of None reads to the end. Only the clip and a
    short margin are decoded and resampled. To about 1e-5, the result equals the same range of the
    whole file resampled. `clip_range` says what happens if the file is too short for the clip.
    Returns (samples,) float32. Raises AudioError.
    """
    with open_audio(path) as file:
        source = file.samplerate
        start, end = clip_range(length_at(info_of(file), rate), start, length, rate)
        margin = 0 if source == rate else 128 * max(1, source // rate)
        # Cut where samples of both rates coincide, so that the resampler sees the same phase.
        step = source // math.gcd(source, rate)
        first = max(0, (start * source // rate - margin) // step * step)
        last = min(file.frames, math.ceil(end * source / rate) + margin)
        if not file.seekable():  # such as GSM and G.721 in WAV: decode from the beginning
            first = 0
        wave = _decode_range(file, first, last)
    if source == rate:
        offset = start - first
    else:
        offset = start - first * rate // source
        wave = soxr.resample(wave, source, rate, quality="HQ")
    wave = wave[offset:offset + end - start]
    if len(wave) == 0:
        raise AudioError("truncated: no samples are left after resampling")
    return np.ascontiguousarray(wave, dtype=np.float32)


def _decode_range(file, first, last):
    """Mono samples (last - first,) of an open file; an MP3 may give fewer."""
    if first:
        try:
            file.seek(first)
        except (sf.SoundFileError, RuntimeError) as error:
            seconds = first / file.samplerate
            raise AudioError(f"cannot seek to {seconds:.1f} s: {_reason(error)}") from None
    blocks = list(decode_mono(file, last - first))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def fit(wave: np.ndarray, length: int, short: str) -> np.ndarray:
    """Make a wave (samples,) exactly `length` samples long.

    A longer wave is cut. A shorter wave is repeated (short="repeat") or padded with zeros ("pad").
    """
    if len(wave) >= length:
        return wave[:length]
    if short == "repeat":
        return np.resize(wave, length)
    return np.pad(wave, (0, length - len(wave)))


def tile_starts(total: int, length: int, hop: int | None = None) -> list[int]:
    """Starts, in samples, of the fixed tiles of evaluation.

    Tiles of `length` samples start every `hop` samples (default: `length`, side by side). The last
    tile is moved back to end with the clip. So every sample is covered and no tile needs padding,
    unless the clip is shorter than one tile.
    """
    hop = hop or length
    last = max(0, total - length)
    return [min(start, last) for start in range(0, last + hop, hop)]
