"""A file on disk -> mono float32 samples at one rate, or the reason why not.

soundfile (libsndfile) decodes WAV, FLAC, OGG, MP3 and the rest of its list; soxr resamples. Nothing
here ever replaces what cannot be read: every failure is an `AudioError` that says why.
"""
import math
import os
import stat
from dataclasses import dataclass

import numpy as np
import soundfile as sf
import soxr

AUDIO_SUFFIXES = frozenset(".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .w64 .rf64".split())
BLOCK = 1 << 20  # frames decoded at a time, so that a lying header cannot ask for the whole memory
CHUNKS = {b"RIFF": ("little", b"data"), b"FORM": ("big", b"SSND")}  # byte order, and the chunk of the samples
UNKNOWN = 0xFFFFFFFF  # the length in the header of a WAV that was written to a pipe
HEADER_SLACK = 64  # bytes: some writers count the header in
LOUDEST = 1e10  # 32-bit integers written as floats reach 2e9; the square of 1e19 is beyond float32
MP3_SLACK = 4 * 1152  # an MP3 without a length header is counted by estimate: four frames of grace


class AudioError(ValueError):
    """Why a file cannot be used; the caller adds the file's name."""


@dataclass(frozen=True)
class AudioInfo:
    rate: int  # Hz
    frames: int  # samples per channel, as the header says
    channels: int
    format: str  # libsndfile's "WAV PCM_16" and so on

    @property
    def seconds(self):
        return self.frames / self.rate


def open_audio(path):
    """An open SoundFile with a believable header; raises AudioError."""
    raw = os.fsencode(path)  # bytes: a name need not be UTF-8
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
    except (sf.SoundFileError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise AudioError(f"not readable as audio: {_reason(error)}") from None
    if file.samplerate < 100 or file.samplerate > 10_000_000 or file.channels < 1:
        file.close()
        raise AudioError(f"impossible header: {file.samplerate} Hz, {file.channels} channels")
    if file.frames <= 0:
        file.close()
        raise AudioError("no samples")
    promised, there = _promised(raw)
    if there + HEADER_SLACK < promised != UNKNOWN:  # libsndfile takes what is left for the whole
        file.close()
        raise AudioError(f"truncated: {there} of {promised} promised bytes of samples are there")
    return file


def _promised(raw):
    """Bytes of samples that the header of a WAV or AIFF promises, and those there; (0, 0) for other formats."""
    try:
        with open(raw, "rb") as file:
            order, wanted = CHUNKS.get(file.read(12)[:4], ("", b""))
            while wanted and len(head := file.read(8)) == 8:
                size = int.from_bytes(head[4:], order)
                if head[:4] == wanted:
                    return size, os.fstat(file.fileno()).st_size - file.tell()
                file.seek(size + size % 2, os.SEEK_CUR)
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from None
    return 0, 0


def _reason(error):
    text = getattr(error, "error_string", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")


def info_of(file):
    return AudioInfo(file.samplerate, file.frames, file.channels, f"{file.format} {file.subtype}")


def probe(path):
    """What the header says, without decoding. Raises AudioError."""
    with open_audio(path) as file:
        return info_of(file)


def _decode(file, frames, most=BLOCK):
    """Yield float32 blocks (k, channels) of the next `frames` frames, at most `most` at a time; raises AudioError where
    the data ends before the header said, cannot be decoded, or is not finite or beyond LOUDEST."""
    done = 0
    while done < frames:
        ask = min(most, frames - done)
        try:
            block = file.read(ask, dtype="float32", always_2d=True)
        except (sf.SoundFileError, RuntimeError, OSError, MemoryError, ValueError) as error:
            at = file.tell() if file.seekable() else done
            raise AudioError(f"decoding fails after {at / file.samplerate:.1f} s: {_reason(error)}") from None
        low, high = block.min(initial=0), block.max(initial=0)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise AudioError("has samples that are not finite (NaN or infinity)")
        if max(-low, high) > LOUDEST:
            raise AudioError(f"has a sample of {max(-low, high):.1g}, where 1 is full scale")
        done += len(block)
        if len(block):
            yield block
        if len(block) < ask:
            slack = MP3_SLACK if "MP" in file.format + file.subtype else 0
            if frames - done > slack or done == 0:
                raise AudioError(f"truncated: {done} of {frames} promised samples are there")
            return


def decode_mono(file, frames, most=BLOCK):
    """The same as blocks (k,): the mean of the channels."""
    for block in _decode(file, frames, most):
        yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]


def check(path):
    """Decode the whole file in blocks and return its AudioInfo; raises AudioError for anything wrong."""
    with open_audio(path) as file:
        for _ in _decode(file, file.frames):
            pass
        return info_of(file)


def length_at(info, rate):
    """Length in samples of a file of that AudioInfo once resampled to `rate`."""
    return max(1, info.frames * rate // info.rate)


def stretch(total, start, length, rate):
    """First and last sample (excluded) of a stretch of a recording of `total` samples at `rate`; length None goes to
    the end. Raises AudioError where it is not in there, but for the 10 ms that a time in seconds may be rounded by."""
    if start >= total:
        raise AudioError(f"ends at {total / rate:.2f} s, before the wanted start at {start / rate:.2f} s")
    if length is not None and start + length > total + rate // 100:  # it has changed since it was scanned
        raise AudioError(f"ends at {total / rate:.2f} s, before the wanted end at {(start + length) / rate:.2f} s")
    return start, total if length is None else min(total, start + length)


def read(path, rate, start=0, length=None):
    """Mono float32 samples of one file at `rate`.

    start, length: in samples at `rate`; length None reads to the end. Only the wanted stretch is
    decoded and resampled, with enough of its neighbourhood that the result equals, to about 1e-5, that
    stretch of the whole file resampled. A stretch that the file, by its header, does not hold is refused;
    up to 10 ms beyond its end, the rounding of a time in seconds, are cut.

    Returns (samples,) float32. Raises AudioError.
    """
    with open_audio(path) as file:
        source = file.samplerate
        start, stop = stretch(length_at(info_of(file), rate), start, length, rate)
        # Cut where source and target samples coincide, so that the resampler meets the same phase.
        step = source // math.gcd(source, rate)
        margin = 0 if source == rate else 128 * max(1, source // rate)
        first = max(0, (start * source // rate - margin) // step * step)
        last = min(file.frames, math.ceil(stop * source / rate) + margin)
        if not file.seekable():  # GSM and G.721 in WAV, say: decode what comes before, too
            first = 0
        if first:
            try:
                file.seek(first)
            except (sf.SoundFileError, RuntimeError) as error:
                raise AudioError(f"cannot seek to {first / source:.1f} s: {_reason(error)}") from None
        mono = list(decode_mono(file, last - first))
    wave = mono[0] if len(mono) == 1 else np.concatenate(mono)
    if source != rate:
        wave = soxr.resample(wave, source, rate, quality="HQ")
        offset = start - first * rate // source
    else:
        offset = start - first
    wave = wave[offset:offset + stop - start]
    if len(wave) == 0:
        raise AudioError("truncated: nothing is left after resampling")
    return np.ascontiguousarray(wave, dtype=np.float32)


def fit(wave, length, short):
    """Make (samples,) exactly `length` long: cut a longer one; `short` says what becomes of a shorter
    one: "repeat" plays it again from its start, "pad" appends digital silence."""
    if len(wave) >= length:
        return wave[:length]
    if short == "repeat":
        return np.resize(wave, length)
    return np.pad(wave, (0, length - len(wave)))


def tile_starts(total, length, hop=None):
    """Starts, in samples, of the fixed tiles that evaluation uses: side by side (or one each `hop` samples) from the
    beginning, the last one moved back to end with the clip, so that every sample is heard and none is padded."""
    hop, last = hop or length, max(0, total - length)
    return [min(start, last) for start in range(0, last + hop, hop)]
