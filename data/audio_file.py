"""Open audio files with libsndfile: limits in memory and time, and reasons in plain words.

The frames of an open file are those that it has, as far as that is known without decoding it.
"""
import contextlib
import functools
import os
import queue
import stat
import threading
from dataclasses import dataclass, field

import numpy as np
import soundfile as sf

from .containers import (
    HEADER_SLACK,
    UNKNOWN_LENGTH,
    DamagedHeaderError,
    Layout,
    View,
    describe_content,
    examine,
)
from .decoder_messages import collect_messages

BLOCK = 1 << 20  # frames decoded at a time, so that a false header cannot exhaust the memory
BLOCK_SAMPLES = 8 * BLOCK  # over all channels
# The densest encoding is a FLAC of silence: up to 65,535 frames in about ten bytes.
MAX_FRAMES_PER_BYTE = 1 << 14
# A file that decodes to this many samples, and to this many for each byte, is refused.
MAX_DENSE_SAMPLES, DENSE = 1 << 30, 256
OPEN_SECONDS = 60  # libsndfile can hang in a header
SOUNDFILE_ERRORS = (sf.SoundFileError, RuntimeError, OSError, ValueError)
# Messages of libsndfile that say nothing to a user.
OBSCURE = ("psf_fseek", "does not exist or is not a regular file", "format not recogni",
           "unknown error", "unspecified internal error", "system error")


class AudioError(ValueError):
    """The reason why a file cannot be used. The caller adds the name of the file."""


class AccessError(AudioError):
    """The system refuses to open or to read the file, which may be whole."""

    def __init__(self, verb: str, error: OSError):
        super().__init__(f"cannot be {verb}: {error.strerror or error}")
        self.errno = error.errno


class TruncatedError(AudioError):
    """The file ends before its header says, or is damaged from some place on."""


@dataclass(frozen=True)
class AudioInfo:
    rate: int  # Hz
    frames: int  # samples per channel: by the header, after `check` those that decode
    channels: int
    format: str  # of libsndfile, such as "WAV PCM_16"
    declared: int = 0  # samples per channel that the header declares, if those are more
    opposite: bool = False  # the channels cancel each other; only `check` sees this
    messages: tuple[str, ...] = ()  # that the decoder printed
    sound: bytes = field(default=b"", compare=False, repr=False)  # PRINT, only by `check`

    @property
    def seconds(self) -> float:
        return self.frames / self.rate

    @property
    def truncated(self) -> bool:
        return self.declared > self.frames

    def describe_truncation(self) -> str:
        """What a truncated file declares and what it has."""
        return (f"truncated: the header declares {self.declared} samples, {self.frames} "
                f"({self.seconds:.2f} s) can be decoded")


class _Decoder(sf.SoundFile):
    """A SoundFile that does not seek after each read.

    SoundFile seeks to where it is, for files open for reading and writing. In a truncated file that
    seek fails and loses the samples of the block.
    """
    _reads = False

    def read(self, *args, **options):
        self._reads = True
        try:
            return super().read(*args, **options)
        finally:
            self._reads = False

    def seek(self, frames, whence=os.SEEK_SET):
        return frames if self._reads and whence == os.SEEK_SET else super().seek(frames, whence)


class AudioFile:
    """An open file.

    frames: samples per channel that it has, as far as that is known; declared: by its header.
    """

    def __init__(self, file: sf.SoundFile, view: View | None, messages: list[str]):
        self.file, self._view, self.messages = file, view, messages
        self.frames = self.declared = file.frames
        self.rate, self.channels = file.samplerate, file.channels
        self.format = f"{file.format} {file.subtype}"
        self.is_mpeg = "MP3" in self.format or "MPEG" in self.format
        self.seekable = file.seekable()

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        if self._view is not None:
            self._view.close()

    def info(self) -> AudioInfo:
        return AudioInfo(self.rate, self.frames, self.channels, self.format, self.declared,
                         messages=tuple(self.messages))

    def seek(self, frame: int) -> None:
        """Raises TruncatedError."""
        try:
            self.file.seek(frame)
        except (sf.SoundFileError, RuntimeError) as error:
            raise TruncatedError(f"cannot seek to {frame / self.rate:.1f} s: {reason_of(error)}"
                                 ) from None

    def read(self, frames: int) -> tuple[np.ndarray, str | None]:
        """Decode up to `frames` frames. -> (samples (k, channels) float32, error of the decoder).

        After an error, the samples are those before the damaged place.
        """
        if not self.is_mpeg:
            return _read_until_error(self.file, frames)
        with collect_messages(self.messages):
            return _read_until_error(self.file, frames)


def _read_until_error(file, frames):
    """Samples and error of `AudioFile.read`."""
    block = np.empty((frames, file.channels), np.float32)
    before = file.tell() if file.seekable() else None
    try:
        return file.read(out=block), None
    except (*SOUNDFILE_ERRORS, MemoryError) as error:
        n_read = 0
        with contextlib.suppress(*SOUNDFILE_ERRORS):
            n_read = file.tell() - before if before is not None else 0
        return block[:min(max(0, n_read), frames)], reason_of(error)


def open_audio(path: str | os.PathLike) -> AudioFile:
    """Open a file and check its header. Raises AudioError."""
    raw = os.fsencode(path)  # a file name need not be UTF-8
    try:
        status = os.stat(raw)
        if stat.S_ISDIR(status.st_mode):
            raise AudioError("not a regular file, but a folder")
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
            raise AudioError("not a regular file")
        if status.st_size == 0:
            raise AudioError("empty file (0 bytes)")
        identity = (raw, status.st_size, status.st_mtime_ns, status.st_ino)
        layout = _layout(*identity)
        file = _open_region(raw, layout.region)
        if layout.frames > file.file.frames:  # it would not be heard to its end
            file.close()
            file = _open_region(raw, layout.repaired)
    except OSError as error:
        raise AccessError("opened", error) from None
    except DamagedHeaderError as error:
        raise AudioError(str(error)) from None
    try:
        file.frames, file.declared = _lengths(file.file, layout, identity)
    except AudioError:
        file.close()
        raise
    return file


def _open_region(raw, region):
    """An AudioFile of a file, or of a region of it."""
    view = View(raw, *region) if region else None
    messages = []
    return AudioFile(_open_in_time(raw, view, messages), view, messages)


@functools.lru_cache(maxsize=4096)
def _layout(raw: bytes, size: int, *_) -> Layout:
    """`examine`, once for each state of a file: it may have to walk through an MP3."""
    return examine(raw, size)


def _open_in_time(raw, view, messages):
    """Open a file with libsndfile, which can hang in a header, within OPEN_SECONDS."""
    answer = queue.SimpleQueue()

    def open_file():
        try:
            with collect_messages(messages):
                answer.put(_Decoder(raw if view is None else view))
        except BaseException as error:  # handed to the waiting thread
            answer.put(error)

    threading.Thread(target=open_file, daemon=True).start()
    try:
        result = answer.get(timeout=OPEN_SECONDS)
    except queue.Empty:
        raise AudioError(f"damaged header: it cannot be read within {OPEN_SECONDS} s") from None
    if isinstance(result, sf.SoundFile):
        if result.format != "RAW":
            return result
        result.close()  # libsndfile takes any unknown file called .au, .snd or .vox for raw samples
        result = ValueError("it is damaged, or not what its suffix says")
    if view is not None:
        view.close()
    if not isinstance(result, (*SOUNDFILE_ERRORS, TypeError)):
        raise result
    raise_if_not_accessible(raw)
    content = describe_content(raw)
    reason = f"it is {content}" if content else reason_of(result)
    raise AudioError(with_messages(f"not readable as audio: {reason}", messages))


def _lengths(file, layout, identity):
    """(frames, declared frames) of an open file. Raises AudioError for an impossible header."""
    rate, channels, frames, size = file.samplerate, file.channels, file.frames, identity[1]
    if not 100 <= rate <= 10_000_000 or channels < 1:
        raise AudioError(f"impossible header: {rate} Hz, {channels} channels")
    if frames <= 0:
        raise AudioError("no samples")
    declared = frames
    if layout.frames:  # of an MP3 whose header has no length, or a wrong one
        return (min(frames, layout.frames),) * 2
    if frames > size * MAX_FRAMES_PER_BYTE:  # or not known
        frames = _count_frames(*identity)
        if declared > 1 << 62:  # not known, in the header of a FLAC that was written to a pipe
            declared = frames
    elif UNKNOWN_LENGTH != layout.declared_bytes > layout.present_bytes + HEADER_SLACK:
        # libsndfile silently shortens such a file to the samples that are present.
        declared = frames * layout.declared_bytes // max(1, layout.present_bytes)
    if frames * channels > max(MAX_DENSE_SAMPLES, DENSE * size):
        raise AudioError(f"{size:,} bytes that decode to {frames * channels:,} samples: silence, "
                         "or made to exhaust the memory; cut it into shorter files")
    return frames, declared


@functools.lru_cache(maxsize=4096)
def _count_frames(raw, size, *_):
    """Frames that decode, of a file whose header does not know or makes an impossible claim."""
    done, messages = 0, []
    with _open_in_time(raw, None, messages) as file, collect_messages(messages):
        block = block_frames_for(BLOCK, file.channels)
        limit = max(MAX_DENSE_SAMPLES, DENSE * size) // file.channels
        while done <= limit:
            n_read = len(_read_until_error(file, block)[0])
            done += n_read
            if n_read < block:
                break
    if done == 0:
        raise AudioError("damaged: no samples can be decoded")
    return done


def block_frames_for(frames: int, channels: int) -> int:
    """At most `frames`, fewer with many channels, so that a block has a bounded size."""
    return max(1, min(frames, BLOCK_SAMPLES // channels))


def reason_of(error: Exception) -> str:
    """The message of an exception on one line, in plain words."""
    text = getattr(error, "error_string", None) or str(error) or type(error).__name__
    text = " ".join(text.split()).rstrip(".")
    if any(words in text.lower() for words in OBSCURE):
        return "it is damaged, or in a format that libsndfile does not know"
    return text


def with_messages(text: str, messages: list[str]) -> str:
    """`text` and what the decoder printed."""
    return f"{text} (the decoder: {messages[0][:150]})" if messages else text


def raise_if_not_accessible(raw: bytes) -> None:
    """Raise AccessError if the system cannot read some byte of the file."""
    try:
        with open(raw, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        raise AccessError("read", error) from None
