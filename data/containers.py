"""What a file is, from its first bytes; and the headers that libsndfile misreads.

libsndfile hears only part of an MP3 with varying bit rate and no length header, takes a recording
whose writer was cut off for an empty one, and can hang in the chunks of a WAV. `examine` finds
such files. A `View` shows libsndfile the same samples under a header that is right.
"""
import contextlib
import io
import mmap
import os
import re
from typing import NamedTuple

WAV_HEADS = {b"RIFF": "little", b"RF64": "little", b"RIFX": "big"}
UNKNOWN_LENGTH = 0xFFFFFFFF  # in the header of a WAV that was written to a pipe
HEADER_SLACK = 64  # bytes: some writers include the header in the length
MP3_IN_WAV = 0x55  # format of a WAV
MAX_CHUNKS = 10_000
MAX_CHUNK_AFTER_SAMPLES = 1 << 30  # bytes; a larger size can wrap round in libsndfile, which hangs
PARSED_CHUNKS = (b"LIST", b"INFO", b"bext", b"cart", b"cue ", b"smpl", b"inst", b"acid", b"PEAK")
CHUNKS_AFTER_SAMPLES = (b"LIST", b"bext", b"id3 ", b"ID3 ", b"cue ", b"fact", b"iXML", b"JUNK")

CONVERT = "which cannot be decoded here; convert it to wav or flac"
# Beginnings of files, at an offset, and what they are.
SIGNATURES = [
    (4, b"ftyp", f"MP4 or M4A (AAC), {CONVERT}"),
    (0, b"\xff\xf1", f"AAC, {CONVERT}"), (0, b"\xff\xf9", f"AAC, {CONVERT}"),
    (0, b"ADIF", f"AAC, {CONVERT}"),
    (0, b"\x1a\x45\xdf\xa3", f"WebM or Matroska, {CONVERT}"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", f"WMA or ASF, {CONVERT}"),
    (0, b"#!AMR", f"AMR, {CONVERT}"), (0, b"MAC ", f"Monkey's Audio, {CONVERT}"),
    (0, b"wvpk", f"WavPack, {CONVERT}"), (0, b"DSD ", f"DSD, {CONVERT}"),
    (0, b"FRM8", f"DSD, {CONVERT}"), (0, b"TTA1", f"True Audio, {CONVERT}"),
    (0, b"FLV", f"Flash video, {CONVERT}"), (8, b"AVI ", f"AVI video, {CONVERT}"),
    (0, b"\x0bw", f"AC-3, {CONVERT}"), (0, b".RMF", f"RealAudio, {CONVERT}"),
    (0, b"MThd", "MIDI: notes, no recording"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the recording; run git lfs pull"),
    (0, b"\x89PNG", "a PNG picture"), (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"%PDF", "a PDF document"), (0, b"PK\x03\x04", "a ZIP archive; unpack it"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it"), (0, b"Rar!", "a RAR archive; unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it"),
]
LAYER_3_KBPS = {True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
                False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}
MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
MONO = 3
LENGTH_FRAMES = (b"Xing", b"Info", b"VBRI")


class DamagedHeaderError(ValueError):
    """A header that libsndfile must not see."""


class Layout(NamedTuple):
    """How to open a file, and what its header says about its length."""
    region: tuple[bytes, int, int] | None = None  # of the `View` to open instead of the file
    declared_bytes: int = 0  # of samples; 0: not known
    present_bytes: int = 0
    # Of an MP3 whose header has no length or a wrong one: the true number of samples per channel,
    # and the region of a view that libsndfile hears to its end.
    frames: int = 0
    repaired: tuple[bytes, int, int] | None = None


class View(io.RawIOBase):
    """A file that begins with `prefix` and continues with the bytes start to end of another."""

    def __init__(self, path: bytes, prefix: bytes, start: int, end: int):
        self._file = os.open(path, os.O_RDONLY)
        self._prefix, self._start = prefix, start
        self._size = len(prefix) + max(0, end - start)
        self._position = 0

    def readinto(self, buffer) -> int:
        memory = memoryview(buffer).cast("B")
        wanted = max(0, min(len(memory), self._size - self._position))
        content = self._prefix[self._position:self._position + wanted]
        if len(content) < wanted:
            offset = self._start + self._position + len(content) - len(self._prefix)
            with contextlib.suppress(OSError):  # the caller finds that samples are missing
                content += os.pread(self._file, wanted - len(content), offset)
        memory[:len(content)] = content
        self._position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


def examine(path: bytes, size: int) -> Layout:
    """Look at the header of a file of `size` bytes.

    Raises DamagedHeaderError if libsndfile must not open it, and OSError.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] in WAV_HEADS and head[8:] == b"WAVE":
            return _examine_wav(file, path, size, WAV_HEADS[head[:4]])
        if head[:4] == b"FORM":
            return _examine_aiff(file, size)
        if head[:3] == b"ID3" or _mp3_frame(head[:4]):
            return _examine_mp3(path, 0, size)
    return Layout()


def describe_content(path: bytes) -> str:
    """What a file that is no readable audio seems to be, or ""."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return ""
    for offset, signature, name in SIGNATURES:
        if head[offset:offset + len(signature)] == signature:
            return name
    if not head.strip(b"\0"):
        return "a file that begins with zero bytes only, as after a power cut or a broken copy"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, as after a failed download"
    if re.fullmatch(rb"[\t\r\n\x20-\x7e]+", head):
        return "a text file"
    return ""


# --- WAV and AIFF ---

def _chunks(file, size, byte_order):
    """Yield (name, declared size, start of the content) of each chunk after the first 12 bytes."""
    position = 12
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return
        declared = int.from_bytes(head[4:], byte_order)
        yield head[:4], declared, position + 8
        position += 8 + declared + declared % 2  # chunks are padded to an even length
    raise DamagedHeaderError(f"damaged header: more than {MAX_CHUNKS:,} chunks")


def _examine_wav(file, path, size, byte_order):
    kind, long_size, samples, is_damaged = 0, None, None, False
    for name, declared, start in _chunks(file, size, byte_order):
        if name == b"data" and samples is None:
            if declared == UNKNOWN_LENGTH and long_size is not None:  # an RF64
                samples = start, long_size
                break
            samples = start, declared
        elif start + declared > size:
            if samples is None:
                raise DamagedHeaderError(_too_large(name, declared, size - start))
            is_damaged = name in PARSED_CHUNKS and declared > MAX_CHUNK_AFTER_SAMPLES
            break
        elif name == b"fmt ":
            file.seek(start)
            kind = int.from_bytes(file.read(2), byte_order)
        elif name == b"ds64":
            file.seek(start + 8)
            long_size = int.from_bytes(file.read(8), byte_order)
    if samples is None:
        return Layout()
    layout = _wav_with_samples(file, path, size, byte_order, kind, samples)
    if is_damaged and layout.region is None:  # libsndfile sees the file without that chunk
        layout = layout._replace(region=(b"", 0, sum(samples)))
    return layout


def _too_large(name, declared, present):
    return (f"damaged header: its chunk {name.decode('latin-1')!r} declares {declared} bytes, the "
            f"file has {max(0, present)}")


def _wav_with_samples(file, path, size, byte_order, kind, samples):
    start, declared = samples
    present = size - start
    if declared == 0 and present > 0:
        file.seek(start)
        if file.read(4) in CHUNKS_AFTER_SAMPLES:
            return Layout()  # truly without samples
        # The recorder was cut off before it wrote the length.
        file.seek(0)
        head = bytearray(file.read(start))
        head[-4:] = min(present, UNKNOWN_LENGTH - 1).to_bytes(4, byte_order)
        declared = present
        region = bytes(head), start, size
    else:
        region = None
    if kind == MP3_IN_WAV:
        return _examine_mp3(path, start, min(size, start + declared))
    if declared == UNKNOWN_LENGTH:
        return Layout(region)
    return Layout(region, declared, min(declared, present))


def _examine_aiff(file, size):
    for name, declared, start in _chunks(file, size, "big"):
        if name == b"SSND":
            return Layout(None, declared, min(declared, size - start))
        if start + declared > size:
            raise DamagedHeaderError(_too_large(name, declared, size - start))
    return Layout()


# --- MP3 ---

class _Frame(NamedTuple):
    size: int  # bytes
    samples: int  # per channel
    rate: int
    side: int  # bytes before the place of a Xing header


def _mp3_frame(head):
    """The MP3 frame that these four bytes begin, or None."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # sync, layer 3
        return None
    version, kbps_index, rate_index = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or kbps_index in (0, 15) or rate_index == 3:
        return None
    is_v1 = version == 3
    rate = MP3_RATES[version][rate_index]
    kbps = LAYER_3_KBPS[is_v1][kbps_index]
    size = (144 if is_v1 else 72) * 1000 * kbps // rate + (head[2] >> 1 & 1)
    is_mono = head[3] >> 6 == MONO
    side = {(True, False): 36, (True, True): 21, (False, False): 21, (False, True): 13}
    return _Frame(size, 1152 if is_v1 else 576, rate, side[is_v1, is_mono])


def _examine_mp3(path, start, end):
    """The layout of the MP3 in these bytes of a file: its true length, if the header's is not."""
    is_part = start > 0
    plain = Layout((b"", start, end) if is_part else None)
    if end - start < 4:
        return plain
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        first = _next_mp3_frame(content, _skip_id3(content, start), end)
        if first is None:
            return plain
        frame = _mp3_frame(content[first:first + 4])
        head = content[first:first + min(frame.size, 200)]
        header = next((kind for kind in LENGTH_FRAMES if kind in head), None)
        if header is not None and _length_is_of_file(head, header, end - first):
            return plain
        audio = first + frame.size if header is not None else first
        n_frames, samples = _walk_mp3(content, audio, end)
        declared = _xing_frames(head, header)
        if n_frames == 0 or (declared is not None and n_frames <= declared + 1):
            return plain  # complete, or truncated: decoding shows it
        prefix = _xing_frame(content[audio:audio + 4], n_frames, end - audio)
    return plain._replace(frames=samples, repaired=(prefix, audio, end))


def _skip_id3(content, position):
    while content[position:position + 3] == b"ID3":
        size = content[position + 6:position + 10]
        if len(size) < 4:
            break
        position += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
    return position


def _next_mp3_frame(content, position, end):
    """The next place where a frame begins that another frame, or the end, follows."""
    limit = min(end, position + (1 << 16))
    while (position := content.find(b"\xff", position, limit)) >= 0:
        frame = _mp3_frame(content[position:position + 4])
        if frame:
            after = position + frame.size
            if after >= end or _mp3_frame(content[after:after + 4]):
                return position
        position += 1
    return None


def _walk_mp3(content, position, end):
    """(frames, samples per channel) from `position` on; damaged places are passed over."""
    n_frames = samples = 0
    while position is not None and position + 4 <= end:
        frame = _mp3_frame(content[position:position + 4])
        if frame is None:
            position = _next_mp3_frame(content, position + 1, end)
            continue
        n_frames += 1
        samples += frame.samples
        position += frame.size
    return n_frames, samples


def _xing_frames(head, kind):
    """The number of frames in a Xing or VBRI header, or None."""
    if kind is None:
        return None
    place = head.index(kind)
    if kind == b"VBRI":
        return int.from_bytes(head[place + 14:place + 18], "big")
    if len(head) < place + 12 or not head[place + 7] & 1:
        return None
    return int.from_bytes(head[place + 8:place + 12], "big")


def _length_is_of_file(head, kind, size):
    """Whether a length header also has the number of bytes, and that fits the file."""
    place = head.index(kind)
    if kind == b"VBRI":
        declared = int.from_bytes(head[place + 10:place + 14], "big")
    elif head[place + 7:place + 8] and head[place + 7] & 3 == 3:
        declared = int.from_bytes(head[place + 12:place + 16], "big")
    else:
        return False
    return declared >= size - 1 - (1 << 16)  # tags may follow; a shorter file is truncated


def _xing_frame(head, n_frames, n_bytes):
    """A frame like those of the file that holds a Xing header."""
    head = bytearray(head)
    head[1] |= 1  # no checksum
    head[2] = head[2] & 0x0D | 0x90  # 128 kbit/s or more, no padding
    frame = _mp3_frame(head)
    content = bytearray(frame.size)
    content[:4] = head
    place = frame.side
    content[place:place + 8] = b"Xing\0\0\0\x03"
    content[place + 8:place + 12] = min(n_frames, 2**32 - 1).to_bytes(4, "big")
    content[place + 12:place + 16] = min(n_bytes + frame.size, 2**32 - 1).to_bytes(4, "big")
    return bytes(content)
