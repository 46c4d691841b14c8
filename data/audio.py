"""Decode an audio file to mono float32 samples at a given rate.

soundfile (libsndfile) decodes WAV, FLAC, OGG, MP3 and its other formats; soxr resamples. A file
that cannot be read raises AudioError with the reason. Nothing replaces missing samples.

A file is what decodes, not what its header says: memory and time are bounded by what it has.
"""
import math
import os
from collections.abc import Iterator

import numpy as np
import soxr
from numpy.typing import ArrayLike

from .audio_file import (
    BLOCK,
    AccessError,
    AudioError,
    AudioFile,
    AudioInfo,
    TruncatedError,
    block_frames_for,
    open_audio,
    raise_if_not_accessible,
    with_messages,
)
from .sound_print import SECONDS, sound_print

__all__ = ["AccessError", "AudioError", "AudioFile", "AudioInfo", "TruncatedError"]

AUDIO_SUFFIXES = frozenset({
    ".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".mp3",
    ".aif", ".aiff", ".aifc", ".au", ".caf",
})
MAX_RESAMPLED_AT_ONCE = 1 << 28  # samples, 1 GB
MAX_LEVEL = 1e10  # integers stored as floats reach 2e9; the square of 1e19 overflows float32
MP3_SLACK = 4 * 1152  # samples: without a length header, the length of an MP3 is an estimate
# Two channels of independent noise have a mean of half their energy; this is 17 dB less.
CANCELLED = 0.01
MIN_CANCELLED = 256  # frames: in a shorter block it may be chance


def probe(path: str | os.PathLike) -> AudioInfo:
    """Read the header without decoding. Raises AudioError."""
    with open_audio(path) as file:
        return file.info()


def check(path: str | os.PathLike) -> AudioInfo:
    """Decode the whole file, block by block. Its `frames` are those that decode.

    Its `sound` is the print (data/sound_print.py) of the beginning, empty for silence.
    Raises AudioError if nothing decodes or a sample is impossible.
    """
    done, energy, mean_energy = 0, 0.0, 0.0
    head = []  # mono, for the print
    with open_audio(path) as file:
        head_frames = math.ceil(SECONDS * file.rate)
        try:
            for block in _decode(file, file.frames, BLOCK):
                if done < head_frames:
                    head.append(_to_mono(block[:head_frames - done]))
                done += len(block)
                if file.channels == 2:
                    energy += float(np.square(block, dtype=np.float64).mean(axis=1).sum())
                    mean_energy += float(np.square(block.mean(axis=1), dtype=np.float64).sum())
        except TruncatedError:
            raise_if_not_accessible(os.fsencode(path))
            if done == 0 or not file.seekable:  # such codecs give noise at a damaged place
                raise
            declared = file.declared
        else:  # an MP3 may decode to fewer frames than its header estimates
            declared = file.declared if file.declared > file.frames else done
        opposite = mean_energy < CANCELLED * energy
        sound = sound_print(np.concatenate(head), file.rate) if head else None
        is_known = sound is not None and sound["words"].any()
        return AudioInfo(file.rate, done, file.channels, file.format, declared, opposite,
                         tuple(file.messages), sound.tobytes() if is_known else b"")


def decode_mono(
    file: AudioFile, frames: int, block_frames: int = BLOCK, required: int | None = None
) -> Iterator[np.ndarray]:
    """Yield the next `frames` frames as blocks (k,) float32: the mean of the channels.

    required: frames without which the file is truncated; default: all, but for the slack of MP3s.
    Raises AudioError if the file ends too early, cannot be decoded, or has impossible samples.
    """
    for block in _decode(file, frames, block_frames, required):
        yield _to_mono(block)


def _to_mono(block):
    """The mean of the channels (k,); one of two channels if they cancel each other."""
    if block.shape[1] == 1:
        return block[:, 0]
    mono = block.mean(axis=1)
    if block.shape[1] != 2 or len(block) < MIN_CANCELLED:
        return mono
    energies = np.einsum("kc,kc->c", block, block, dtype=np.float64)
    if np.dot(mono, mono) >= CANCELLED * energies.mean():
        return mono
    # Always the same channel if it has a signal, so that neighbouring blocks fit together.
    strongest = int(energies.argmax())
    channel = 0 if energies[0] >= energies[strongest] / 2 else strongest
    return block[:, channel]


def _decode(file, frames, block_frames, required=None):
    """Like `decode_mono`, but the blocks are (k, channels)."""
    if required is None:
        required = max(1, frames - (MP3_SLACK if file.is_mpeg else 0))
    block_frames = block_frames_for(block_frames, file.channels)
    done = 0
    while done < frames:
        requested = min(block_frames, frames - done)
        block, problem = _read_block(file, requested, done)
        done += len(block)
        if len(block):
            yield block
        if len(block) < requested:  # the end of the file
            if done < required:
                problem = problem or (f"truncated: the header declares {frames} samples, "
                                      f"the file has {done}")
                raise TruncatedError(with_messages(problem, file.messages))
            return


def _read_block(file, frames, done):
    """Decode up to `frames` frames and check them. -> (block, why it is short or None)."""
    block, problem = file.read(frames)
    if problem:
        seconds = (done + len(block)) / file.rate
        problem = f"decoding fails after {seconds:.1f} s: {problem}"
    lowest, highest = block.min(initial=0), block.max(initial=0)
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise AudioError("has samples that are not finite (NaN or infinity)")
    peak = max(-lowest, highest)
    if peak > MAX_LEVEL:
        raise AudioError(f"has a sample of {peak:.1g}; full scale is 1")
    return block, problem


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
        source = file.rate
        start, end = clip_range(length_at(file.info(), rate), start, length, rate)
        margin = 0 if source == rate else 128 * max(1, source // rate)
        # Cut where samples of both rates coincide, so that the resampler sees the same phase.
        step = source // math.gcd(source, rate)
        first = max(0, (start * source // rate - margin) // step * step)
        last = min(file.frames, math.ceil(end * source / rate) + margin)
        if not file.seekable:  # such as GSM and G.721 in WAV: decode from the beginning
            first = 0
        # Only the clip must be there, not the margin; all of it, but for rounding. To the end of a
        # truncated file is to the end of what decodes.
        needed = min(last, end * source // rate) - first - source // 100
        required = max(1, needed - (MP3_SLACK if file.is_mpeg else 0)) if length else 1
        if not file.seekable and not length:
            required = last - first
        wave = _decode_range(file, first, last, required)
    if source == rate:
        offset = start - first
    else:
        offset = start - first * rate // source
        wave = _resample(wave, source, rate)
    wave = wave[offset:offset + end - start]
    if len(wave) == 0:
        raise AudioError("truncated: no samples are left after resampling")
    return np.ascontiguousarray(wave, dtype=np.float32)


def _resample(wave, source, rate):
    """soxr in one go, or in pieces if that would take several copies of a large wave."""
    if len(wave) <= MAX_RESAMPLED_AT_ONCE:
        return soxr.resample(wave, source, rate, quality="HQ")
    resampler = soxr.ResampleStream(source, rate, 1, dtype="float32", quality="HQ")
    pieces = [resampler.resample_chunk(wave[begin:begin + BLOCK], last=begin + BLOCK >= len(wave))
              for begin in range(0, len(wave), BLOCK)]
    return np.concatenate(pieces)


def _decode_range(file, first, last, required):
    """Mono samples of an open file: (last - first,), or fewer but at least `required`."""
    if first:
        file.seek(first)
    blocks = list(decode_mono(file, last - first, required=required))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


SHORT = ("repeat", "pad", "place")  # what `fit` can do with a wave that is too short


def fit(wave: np.ndarray, length: int, short: str, position: float = 0.5) -> np.ndarray:
    """Make a wave (samples,) exactly `length` samples long.

    A longer wave is cut. A shorter wave is repeated (short="repeat"), padded with zeros at its end
    ("pad"), or placed among zeros ("place"). position: where, see `place_offset`.
    """
    if len(wave) >= length:
        return wave[:length]
    if short == "repeat":
        return np.resize(wave, length)
    before = int(place_offset(len(wave), length, position)) if short == "place" else 0
    return np.pad(wave, (before, length - len(wave) - before))


def place_offset(n_samples: ArrayLike, length: int, position: ArrayLike) -> np.ndarray:
    """Zeros before n_samples placed in `length` samples: int64 in [0, length - n_samples].

    position: in [0, 1). All offsets are equally likely if it is uniform; 0.5 is the middle.
    """
    return (np.asarray(position) * (length - np.asarray(n_samples) + 1)).astype(np.int64)


def tile_starts(total: int, length: int, hop: int | None = None) -> list[int]:
    """Starts, in samples, of the fixed tiles of evaluation.

    Tiles of `length` samples start every `hop` samples (default: `length`, side by side). The last
    tile is moved back to end with the clip. So every sample is covered and no tile needs padding,
    unless the clip is shorter than one tile.
    """
    hop = hop or length
    last = max(0, total - length)
    return [min(start, last) for start in range(0, last + hop, hop)]
