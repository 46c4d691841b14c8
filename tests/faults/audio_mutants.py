"""Small valid audio files of 41 formats, and damaged copies of them: the material of fuzz_audio.py.

A mutant follows from (seed, index) and the version of libsndfile. The order of the random draws
matters: changing it changes all mutants.
"""
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf


class Original(NamedTuple):
    suffix: str
    format: str  # these two as libsndfile names them
    subtype: str
    channels: int
    rate: int  # Hz
    weight: int  # how often it is damaged, compared with others


ORIGINALS = {
    "WAV PCM_16": Original(".wav", "WAV", "PCM_16", 1, 16000, 4),
    "WAV PCM_24": Original(".wav", "WAV", "PCM_24", 2, 44100, 4),
    "WAV FLOAT": Original(".wav", "WAV", "FLOAT", 2, 16000, 4),
    "FLAC PCM_16": Original(".flac", "FLAC", "PCM_16", 2, 16000, 4),
    "FLAC PCM_24": Original(".flac", "FLAC", "PCM_24", 1, 44100, 2),
    "OGG VORBIS": Original(".ogg", "OGG", "VORBIS", 2, 22050, 4),
    "OGG OPUS": Original(".opus", "OGG", "OPUS", 1, 48000, 3),
    "MP3": Original(".mp3", "MP3", "MPEG_LAYER_III", 2, 44100, 4),
    "MP3 in WAV": Original(".wav", "MP3", "MPEG_LAYER_III", 1, 44100, 1),
    "WAV PCM_U8": Original(".wav", "WAV", "PCM_U8", 1, 8000, 1),
    "WAV DOUBLE": Original(".wav", "WAV", "DOUBLE", 1, 16000, 1),
    "WAV ULAW": Original(".wav", "WAV", "ULAW", 1, 8000, 1),
    "WAV IMA_ADPCM": Original(".wav", "WAV", "IMA_ADPCM", 2, 16000, 1),
    "WAV MS_ADPCM": Original(".wav", "WAV", "MS_ADPCM", 2, 16000, 1),
    "WAV GSM610": Original(".wav", "WAV", "GSM610", 1, 8000, 1),
    "WAV G721_32": Original(".wav", "WAV", "G721_32", 1, 8000, 1),
    "WAV NMS_ADPCM_24": Original(".wav", "WAV", "NMS_ADPCM_24", 1, 8000, 1),
    "WAVEX PCM_16": Original(".wav", "WAVEX", "PCM_16", 6, 48000, 1),
    "RF64 PCM_16": Original(".rf64", "RF64", "PCM_16", 2, 16000, 1),
    "W64 PCM_16": Original(".w64", "W64", "PCM_16", 2, 16000, 1),
    "W64 MS_ADPCM": Original(".w64", "W64", "MS_ADPCM", 1, 16000, 1),
    "AIFF PCM_16": Original(".aiff", "AIFF", "PCM_16", 2, 16000, 1),
    "AIFF FLOAT": Original(".aif", "AIFF", "FLOAT", 1, 16000, 1),
    "AIFF IMA_ADPCM": Original(".aifc", "AIFF", "IMA_ADPCM", 1, 16000, 1),
    "AU PCM_16": Original(".au", "AU", "PCM_16", 2, 16000, 1),
    "AU G723_24": Original(".au", "AU", "G723_24", 1, 8000, 1),
    "CAF PCM_16": Original(".caf", "CAF", "PCM_16", 2, 16000, 1),
    "CAF ALAC_16": Original(".caf", "CAF", "ALAC_16", 2, 16000, 2),
    "CAF ALAC_24": Original(".caf", "CAF", "ALAC_24", 1, 16000, 1),
    # The following formats have a suffix that is not theirs.
    "VOC PCM_16": Original(".wav", "VOC", "PCM_16", 2, 16000, 1),
    "PAF PCM_24": Original(".wav", "PAF", "PCM_24", 2, 16000, 1),
    "NIST PCM_16": Original(".wav", "NIST", "PCM_16", 2, 16000, 1),
    "IRCAM FLOAT": Original(".wav", "IRCAM", "FLOAT", 2, 16000, 1),
    "SVX PCM_16": Original(".wav", "SVX", "PCM_16", 1, 16000, 1),
    "MAT4 DOUBLE": Original(".wav", "MAT4", "DOUBLE", 2, 16000, 1),
    "MAT5 FLOAT": Original(".wav", "MAT5", "FLOAT", 2, 16000, 1),
    "PVF PCM_32": Original(".wav", "PVF", "PCM_32", 2, 16000, 1),
    "SDS PCM_16": Original(".wav", "SDS", "PCM_16", 1, 16000, 1),
    "AVR PCM_16": Original(".wav", "AVR", "PCM_16", 2, 16000, 1),
    "MPC2K PCM_16": Original(".wav", "MPC2K", "PCM_16", 2, 16000, 1),
    "XI DPCM_16": Original(".wav", "XI", "DPCM_16", 1, 44100, 1),
}

# Header fields: marker -> [(offset from the marker's start, bytes)].
FIELDS = {
    b"RIFF": [(4, 4)],
    b"FORM": [(4, 4)],
    b"fact": [(4, 4), (8, 4)],
    b"PEAK": [(4, 4), (8, 4)],
    b"fmt ": [
        (4, 4), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2), (22, 2), (24, 2), (26, 2), (28, 4),
    ],
    b"data": [(4, 4), (4, 8)],
    b"ds64": [(4, 4), (8, 8), (16, 8), (24, 8), (32, 4)],
    b"COMM": [(4, 4), (8, 2), (10, 4), (14, 2), (16, 2), (18, 8)],
    b"SSND": [(4, 4), (8, 4), (12, 4)],
    b"desc": [(4, 8), (12, 8), (20, 4), (24, 4), (28, 4), (32, 4), (36, 4), (40, 4)],
    b"pakt": [(4, 8), (12, 8), (20, 8), (28, 4), (32, 4)],
    b"kuki": [(4, 8), (12, 4), (17, 1), (21, 1), (36, 4)],
    b".snd": [(4, 4), (8, 4), (12, 4), (16, 4), (20, 4)],
    b"fLaC": [(4, 4), (8, 2), (10, 2), (12, 3), (15, 3), (18, 3), (20, 2), (21, 1), (22, 4)],
    b"OggS": [(4, 1), (5, 1), (6, 8), (14, 4), (18, 4), (26, 1), (27, 1)],
    b"\x01vorbis": [(7, 4), (11, 1), (12, 4), (16, 4), (20, 4), (24, 4), (28, 1)],
    b"OpusHead": [(8, 1), (9, 1), (10, 2), (12, 4), (16, 2), (18, 1)],
    b"Xing": [(4, 4), (8, 4), (12, 4), (120, 4)],
    b"Info": [(4, 4), (8, 4), (12, 4), (120, 4)],
}
EXTREMES = [  # values of header fields
    0, 1, 2, 3, 7, 64, 255, 256, 1024, 1025, 2**15 - 1, 2**15, 2**16 - 1, 2**24, 2**24 - 1,
    2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1, 2**32, 2**33, 2**62, 2**63 - 1, 2**63,
    2**64 - 1,
]


# --- valid files ---

def original(name):
    """Bytes of a small valid file, the same at every call: dates and serial numbers are removed."""
    _, form, subtype, channels, rate, _ = ORIGINALS[name]
    rng = np.random.default_rng([len(name), channels, rate])
    t = np.arange(5000)[:, None] / rate
    tone = 0.3 * np.sin(2 * np.pi * 500 * t + np.arange(channels))
    wave = tone + 0.1 * rng.standard_normal((len(t), channels))
    with tempfile.TemporaryDirectory() as folder:  # not every format can be written to memory
        path = Path(folder, "a." + form.lower())
        sf.write(path, wave, rate, format=form, subtype=subtype)
        data = bytearray(path.read_bytes())
    peak = data.find(b"PEAK", 0, 200)
    if peak >= 0:
        data[peak + 12:peak + 16] = bytes(4)
    if form == "MAT5":
        text = slice(20, data.find(b"\0"))
        data[text] = b" " * len(data[text])
    if form == "OGG":
        data = seal_ogg(data, serial=7)
    if name == "MP3 in WAV":
        data = put_mp3_in_wav(data, channels, rate)
    return bytes(data)


def put_mp3_in_wav(mp3, channels, rate):
    fmt = struct.pack("<HHIIHHHHIHHH", 0x55, channels, rate, 16000, 1, 0, 12, 1, 2, 417, 1, 1393)
    head = b"RIFF" + struct.pack("<I", 50 + len(mp3)) + b"WAVE"
    fmt_chunk = b"fmt " + struct.pack("<I", len(fmt)) + fmt
    return head + fmt_chunk + b"data" + struct.pack("<I", len(mp3)) + mp3


def make_ogg_table():
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1) ^ (0x104C11DB7 if value & 0x80000000 else 0)
        table.append(value)
    return table


OGG_TABLE = make_ogg_table()


def seal_ogg(data, serial=None):
    """Correct the checksum of every page of an Ogg stream (RFC 3533).

    Otherwise decoders would refuse a damaged page by its checksum, without parsing it.
    """
    data = bytearray(data)
    page = data.find(b"OggS")
    while page >= 0 and page + 27 <= len(data):
        body = page + 27 + data[page + 26]
        end = body + sum(data[page + 27:body])
        if serial is not None:
            data[page + 14:page + 18] = struct.pack("<I", serial)
        data[page + 22:page + 26] = bytes(4)
        checksum = 0
        for byte in data[page:end]:
            checksum = ((checksum << 8) & 0xFFFFFFFF) ^ OGG_TABLE[(checksum >> 24) ^ byte]
        data[page + 22:page + 26] = struct.pack("<I", checksum)
        page = data.find(b"OggS", page + 27)
    return bytes(data)


# --- kinds of damage: functions of a generator, the bytes of a file, and those of another file ---

def random_range_end(rng, data):
    """Where damage may happen: anywhere, or half the time in the first 256 bytes."""
    return len(data) if rng.random() < 0.5 else min(len(data), 256)


def random_range(rng, data, longest=None):
    """Start and length of a random range; short ones are likelier."""
    end = random_range_end(rng, data)
    start = int(rng.integers(end)) if end else 0
    return start, int(2 ** rng.uniform(0, np.log2((longest or len(data)) + 1)))


def flip(rng, data, other):
    data = bytearray(data)
    end = random_range_end(rng, data)
    for _ in range(int(2 ** rng.uniform(0, 6))):
        position = rng.integers(end)
        data[position] ^= 1 << rng.integers(8)
    return bytes(data)


def overwrite(rng, data, other):
    start, length = random_range(rng, data)
    length = min(length, len(data) - start)
    choices = rng.bytes(length), bytes(length), b"\xff" * length
    return data[:start] + choices[rng.integers(3)] + data[start + length:]


def truncate(rng, data, other):
    return data[:random_range(rng, data)[0]]


def insert(rng, data, other):
    start, length = random_range(rng, data, longest=5000)
    choices = rng.bytes(length), bytes(length)
    return data[:start] + choices[rng.integers(2)] + data[start:]


def remove(rng, data, other):
    start, length = random_range(rng, data)
    return data[:start] + data[start + length:]


def double(rng, data, other):
    start, length = random_range(rng, data)
    target = random_range(rng, data)[0]
    return data[:target] + data[start:start + length] + data[target:]


def field(rng, data, other):
    """Set one to three header fields, or numbers near the start, to extremes."""
    known = known_fields(data)
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if known and rng.random() < 0.8:
            position, width = known[rng.integers(len(known))]
        else:
            position, width = int(rng.integers(0, 128)), int(rng.choice([1, 2, 4, 8]))
        position = min(position, len(data))
        value = EXTREMES[rng.integers(len(EXTREMES))] % 256**width
        byte_order = ("little", "big")[rng.integers(2)]
        data[position:position + width] = value.to_bytes(width, byte_order)
    return bytes(data)


def known_fields(data):
    """[(position, width)] of the header fields in a file."""
    known = []
    for marker, fields in FIELDS.items():
        start = data.find(marker, 0, 2000)
        if start >= 0:
            known += [(start + offset, width) for offset, width in fields]
    return known


def swap(rng, data, other):
    """Put the head of one file before the body, or the whole, of another."""
    cut = int(rng.integers(1, 300))
    return data[:cut] + other[cut if rng.random() < 0.5 else 0:]


KINDS = {
    kind.__name__: kind
    for kind in (flip, overwrite, truncate, insert, remove, double, field, swap)
}
PROBABILITIES = np.array([3, 3, 2, 1, 1, 1, 4, 1]) / 16  # of the kinds


class Mutant(NamedTuple):
    name: str  # of its original
    kind: str  # of damage, several joined by "+"
    suffix: str
    data: bytes


def mutant(seed, index, originals):
    """The mutant with that number. originals: name -> bytes."""
    rng = np.random.default_rng([seed, index])
    names = list(ORIGINALS)
    weights = np.array([ORIGINALS[name].weight for name in names])
    name, other = (names[i] for i in rng.choice(len(names), 2, p=weights / weights.sum()))
    data, kinds = originals[name], []
    while not kinds or rng.random() < 0.25:
        kind = str(rng.choice(list(KINDS), p=PROBABILITIES))
        kinds.append(kind)
        if data:
            data = KINDS[kind](rng, data, originals[other])
    if b"OggS" in data and rng.random() < 0.7:
        data = seal_ogg(data)
        kinds.append("sealed")
    suffix_of = other if rng.random() < 0.1 else name
    return Mutant(name, "+".join(kinds), ORIGINALS[suffix_of].suffix, data)
