"""Thousands of damaged audio files through the reading of data/audio.py, each judged against soundfile alone.

    python tests/faults/fuzz_audio.py --count 10000 --seed 0
    python tests/faults/fuzz_audio.py --seed 0 --only 1234 --keep /tmp/mutant

A mutant follows from (seed, index) and the version of libsndfile. Child processes read the mutants under a
limit of memory and a watchdog; a file may be refused by an AudioError or read as what is in it, and anything
else is a failure, which is printed so that it can be made again. The exit code is 1 where there is one.
"""
import argparse
import faulthandler
import importlib
import io
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2]))

from data.audio import AudioError, check, length_at, probe, read  # noqa: E402

TARGET = 16000  # Hz that a model would be given
TOLERANCE = 1e-4  # of the larger of full scale and the loudest sample
OUTCOMES = ("accepted", "refused", "crashes", "hangs", "wrong", "errors")
FAILURES = OUTCOMES[2:]

# What the mutants are made of: name -> (suffix, format, subtype, channels, rate, weight).
ORIGINALS = {
    "WAV PCM_16": (".wav", "WAV", "PCM_16", 1, 16000, 4),
    "WAV PCM_24": (".wav", "WAV", "PCM_24", 2, 44100, 4),
    "WAV FLOAT": (".wav", "WAV", "FLOAT", 2, 16000, 4),
    "FLAC PCM_16": (".flac", "FLAC", "PCM_16", 2, 16000, 4),
    "FLAC PCM_24": (".flac", "FLAC", "PCM_24", 1, 44100, 2),
    "OGG VORBIS": (".ogg", "OGG", "VORBIS", 2, 22050, 4),
    "OGG OPUS": (".opus", "OGG", "OPUS", 1, 48000, 3),
    "MP3": (".mp3", "MP3", "MPEG_LAYER_III", 2, 44100, 4),
    "MP3 in WAV": (".wav", "MP3", "MPEG_LAYER_III", 1, 44100, 1),
    "WAV PCM_U8": (".wav", "WAV", "PCM_U8", 1, 8000, 1),
    "WAV DOUBLE": (".wav", "WAV", "DOUBLE", 1, 16000, 1),
    "WAV ULAW": (".wav", "WAV", "ULAW", 1, 8000, 1),
    "WAV IMA_ADPCM": (".wav", "WAV", "IMA_ADPCM", 2, 16000, 1),
    "WAV MS_ADPCM": (".wav", "WAV", "MS_ADPCM", 2, 16000, 1),
    "WAV GSM610": (".wav", "WAV", "GSM610", 1, 8000, 1),
    "WAV G721_32": (".wav", "WAV", "G721_32", 1, 8000, 1),
    "WAV NMS_ADPCM_24": (".wav", "WAV", "NMS_ADPCM_24", 1, 8000, 1),
    "WAVEX PCM_16": (".wav", "WAVEX", "PCM_16", 6, 48000, 1),
    "RF64 PCM_16": (".rf64", "RF64", "PCM_16", 2, 16000, 1),
    "W64 PCM_16": (".w64", "W64", "PCM_16", 2, 16000, 1),
    "W64 MS_ADPCM": (".w64", "W64", "MS_ADPCM", 1, 16000, 1),
    "AIFF PCM_16": (".aiff", "AIFF", "PCM_16", 2, 16000, 1),
    "AIFF FLOAT": (".aif", "AIFF", "FLOAT", 1, 16000, 1),
    "AIFF IMA_ADPCM": (".aifc", "AIFF", "IMA_ADPCM", 1, 16000, 1),
    "AU PCM_16": (".au", "AU", "PCM_16", 2, 16000, 1),
    "AU G723_24": (".au", "AU", "G723_24", 1, 8000, 1),
    "CAF PCM_16": (".caf", "CAF", "PCM_16", 2, 16000, 1),
    "CAF ALAC_16": (".caf", "CAF", "ALAC_16", 2, 16000, 2),
    "CAF ALAC_24": (".caf", "CAF", "ALAC_24", 1, 16000, 1),
    "VOC PCM_16": (".wav", "VOC", "PCM_16", 2, 16000, 1),  # from here on under a name that is not theirs
    "PAF PCM_24": (".wav", "PAF", "PCM_24", 2, 16000, 1),
    "NIST PCM_16": (".wav", "NIST", "PCM_16", 2, 16000, 1),
    "IRCAM FLOAT": (".wav", "IRCAM", "FLOAT", 2, 16000, 1),
    "SVX PCM_16": (".wav", "SVX", "PCM_16", 1, 16000, 1),
    "MAT4 DOUBLE": (".wav", "MAT4", "DOUBLE", 2, 16000, 1),
    "MAT5 FLOAT": (".wav", "MAT5", "FLOAT", 2, 16000, 1),
    "PVF PCM_32": (".wav", "PVF", "PCM_32", 2, 16000, 1),
    "SDS PCM_16": (".wav", "SDS", "PCM_16", 1, 16000, 1),
    "AVR PCM_16": (".wav", "AVR", "PCM_16", 2, 16000, 1),
    "MPC2K PCM_16": (".wav", "MPC2K", "PCM_16", 2, 16000, 1),
    "XI DPCM_16": (".wav", "XI", "DPCM_16", 1, 44100, 1),
}

# Header fields worth an extreme: marker -> offsets from its start and widths in bytes.
FIELDS = {
    b"RIFF": [(4, 4)], b"FORM": [(4, 4)], b"fact": [(4, 4), (8, 4)], b"PEAK": [(4, 4), (8, 4)],
    b"fmt ": [(4, 4), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2), (22, 2), (24, 2), (26, 2), (28, 4)],
    b"data": [(4, 4), (4, 8)], b"ds64": [(4, 4), (8, 8), (16, 8), (24, 8), (32, 4)],
    b"COMM": [(4, 4), (8, 2), (10, 4), (14, 2), (16, 2), (18, 8)], b"SSND": [(4, 4), (8, 4), (12, 4)],
    b"desc": [(4, 8), (12, 8), (20, 4), (24, 4), (28, 4), (32, 4), (36, 4), (40, 4)],
    b"pakt": [(4, 8), (12, 8), (20, 8), (28, 4), (32, 4)], b"kuki": [(4, 8), (12, 4), (17, 1), (21, 1), (36, 4)],
    b".snd": [(4, 4), (8, 4), (12, 4), (16, 4), (20, 4)],
    b"fLaC": [(4, 4), (8, 2), (10, 2), (12, 3), (15, 3), (18, 3), (20, 2), (21, 1), (22, 4)],
    b"OggS": [(4, 1), (5, 1), (6, 8), (14, 4), (18, 4), (26, 1), (27, 1)],
    b"\x01vorbis": [(7, 4), (11, 1), (12, 4), (16, 4), (20, 4), (24, 4), (28, 1)],
    b"OpusHead": [(8, 1), (9, 1), (10, 2), (12, 4), (16, 2), (18, 1)],
    b"Xing": [(4, 4), (8, 4), (12, 4), (120, 4)], b"Info": [(4, 4), (8, 4), (12, 4), (120, 4)],
}
EXTREMES = [0, 1, 2, 3, 7, 64, 255, 256, 1024, 1025, 2**15 - 1, 2**15, 2**16 - 1, 2**24, 2**24 - 1, 2**31 - 1, 2**31,
            2**31 + 1, 2**32 - 2, 2**32 - 1, 2**32, 2**33, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


# ---- the files

def _ogg_table():
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1) ^ (0x104C11DB7 if value & 0x80000000 else 0)
        table.append(value)
    return table


OGG_TABLE = _ogg_table()


def seal_ogg(data, serial=None):
    """Every page of an Ogg stream with a checksum that is right (RFC 3533), so that damage gets past it."""
    data, at = bytearray(data), data.find(b"OggS")
    while at >= 0 and at + 27 <= len(data):
        body = at + 27 + data[at + 26]
        end = body + sum(data[at + 27:body])
        if serial is not None:
            data[at + 14:at + 18] = struct.pack("<I", serial)
        data[at + 22:at + 26] = bytes(4)
        total = 0
        for byte in data[at:end]:
            total = ((total << 8) & 0xFFFFFFFF) ^ OGG_TABLE[(total >> 24) ^ byte]
        data[at + 22:at + 26] = struct.pack("<I", total)
        at = data.find(b"OggS", at + 27)
    return bytes(data)


def original(name):
    """Bytes of a small valid file, the same at every call: dates and random serial numbers are taken out."""
    _, form, subtype, channels, rate, _ = ORIGINALS[name]
    rng = np.random.default_rng([len(name), channels, rate])
    t = np.arange(5000)[:, None] / rate
    wave = 0.3 * np.sin(2 * np.pi * 500 * t + np.arange(channels)) + 0.1 * rng.standard_normal((len(t), channels))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a." + form.lower())  # sf.write to memory cannot seek back in every format
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
        fmt = struct.pack("<HHIIHHHHIHHH", 0x55, channels, rate, 16000, 1, 0, 12, 1, 2, 417, 1, 1393)
        data = (b"RIFF" + struct.pack("<I", 50 + len(data)) + b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt
                + b"data" + struct.pack("<I", len(data)) + data)
    return bytes(data)


def _spot(rng, data, most=None):
    """Start and length of a stretch: anywhere, or half the time in the first 256 bytes."""
    top = len(data) if rng.random() < 0.5 else min(len(data), 256)
    start = int(rng.integers(top)) if top else 0
    return start, int(2 ** rng.uniform(0, np.log2((most or len(data)) + 1)))


def flip(rng, data, other):
    data = bytearray(data)
    top = len(data) if rng.random() < 0.5 else min(len(data), 256)
    for _ in range(int(2 ** rng.uniform(0, 6))):
        data[rng.integers(top)] ^= 1 << rng.integers(8)
    return bytes(data)


def overwrite(rng, data, other):
    start, length = _spot(rng, data)
    length = min(length, len(data) - start)
    fill = (rng.bytes(length), bytes(length), b"\xff" * length)[rng.integers(3)]
    return data[:start] + fill + data[start + length:]


def truncate(rng, data, other):
    return data[:_spot(rng, data)[0]]


def insert(rng, data, other):
    start, length = _spot(rng, data, 5000)
    return data[:start] + (rng.bytes(length), bytes(length))[rng.integers(2)] + data[start:]


def remove(rng, data, other):
    start, length = _spot(rng, data)
    return data[:start] + data[start + length:]


def double(rng, data, other):
    start, length = _spot(rng, data)
    to = _spot(rng, data)[0]
    return data[:to] + data[start:start + length] + data[to:]


def field(rng, data, other):
    """One to three header fields, known ones or any four bytes near the start, set to extremes."""
    places = [(at + offset, width) for marker, fields in FIELDS.items() if (at := data.find(marker, 0, 2000)) >= 0
              for offset, width in fields]
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if places and rng.random() < 0.8:
            at, width = places[rng.integers(len(places))]
        else:
            at, width = int(rng.integers(0, 128)), int(rng.choice([1, 2, 4, 8]))
        value = EXTREMES[rng.integers(len(EXTREMES))] % 256**width
        at = min(at, len(data))
        data[at:at + width] = value.to_bytes(width, ("little", "big")[rng.integers(2)])
    return bytes(data)


def swap(rng, data, other):
    """The head of one file on the body of another."""
    cut = int(rng.integers(1, 300))
    return data[:cut] + other[cut if rng.random() < 0.5 else 0:]


KINDS = {kind.__name__: kind for kind in (flip, overwrite, truncate, insert, remove, double, field, swap)}
LIKELIHOOD = np.array([3, 3, 2, 1, 1, 1, 4, 1]) / 16


def mutant(seed, index, files):
    """The mutant of that number -> (name of its original, kind, suffix, bytes). files: name -> original bytes."""
    rng = np.random.default_rng([seed, index])
    names = list(ORIGINALS)
    weights = np.array([ORIGINALS[name][-1] for name in names])
    name, other = (names[i] for i in rng.choice(len(names), 2, p=weights / weights.sum()))
    data, kinds = files[name], []
    while not kinds or rng.random() < 0.25:
        kinds.append(str(rng.choice(list(KINDS), p=LIKELIHOOD)))
        if data:
            data = KINDS[kinds[-1]](rng, data, files[other])
    if b"OggS" in data and rng.random() < 0.7:
        data = seal_ogg(data)
        kinds.append("sealed")
    suffix = ORIGINALS[other if rng.random() < 0.1 else name][0]
    return name, "+".join(kinds), suffix, data


# ---- readers, and controls that lack one protection each

def project(path):
    """What a scan and Clips do with a file -> dict; raises AudioError."""
    probe(path)
    info = check(path)
    start, length = info.frames // 3, max(1, info.frames // 3)
    return {"info": info, "whole": read(path, info.rate), "piece": (start, length, read(path, info.rate, start, length)),
            "resampled": read(path, TARGET)}


def _answer(wave):
    """As `project` answers, for a file that holds that wave at TARGET Hz."""
    class Info:
        rate, frames, channels = TARGET, len(wave), 1
    return {"info": Info, "whole": wave, "piece": (0, len(wave), wave), "resampled": wave}


def _control(instead):
    """A reader that does `instead(path, error)` where the project refuses a file."""
    def reader(path):
        try:
            return project(path)
        except AudioError as error:
            return instead(path, error)
    return reader


def _raise(error):
    raise error


silence = _control(lambda path, error: _answer(np.zeros(TARGET, np.float32)))
sleeper = _control(lambda path, error: time.sleep(1e6))
aborter = _control(lambda path, error: os.abort())
greedy = _control(lambda path, error: np.ones(2**40))
leaky = _control(lambda path, error: _raise(RuntimeError(str(error))))


def neighbour(path, last=[]):
    """Another clip in place of a broken one."""
    try:
        last[:] = [project(path)]
    except AudioError:
        if not last:
            raise
    return last[0]


def muted(path):
    """Silence of the right length in place of what is there."""
    answer = project(path)
    answer["whole"] = np.zeros_like(answer["whole"])
    return answer


def padded(path):
    """A tenth of a second of silence at the end."""
    answer = project(path)
    answer["whole"] = np.pad(answer["whole"], (0, answer["info"].rate // 10))
    return answer


def shifted(path):
    """Crops that start one sample late."""
    answer = project(path)
    start, length, piece = answer["piece"]
    answer["piece"] = start, length, np.roll(piece, -1)
    return answer


# ---- the judge

def decode(source, start=0, frames=None):
    """Rate, channels and the mono mean, float64, of what soundfile alone finds in a file from `start` on."""
    with sf.SoundFile(source) as file:
        skip = 0 if file.seekable() else start
        if start > skip:
            file.seek(start)
        mono, left = [np.zeros(0)], np.inf if frames is None else skip + frames
        while left > 0:
            ask = int(min(left, 16384))
            block = file.read(ask, dtype="float32", always_2d=True)
            mono.append(block.astype(np.float64).mean(axis=1))
            left = left - ask if len(block) == ask else 0  # a short block is the end, as for soundfile.read
        return file.samplerate, file.channels, np.concatenate(mono)[skip:]


def _differs(got, want):
    """Why `got` is not `want`, or ""."""
    if not np.isfinite(got).all():
        return "not finite"
    if len(got) != len(want):
        return f"{len(got)} samples, where soundfile finds {len(want)}"
    if not got.any() and want.any():
        return "silence, where soundfile finds sound"
    off = np.abs(got - want).max(initial=0) / max(1, np.abs(want).max(initial=0))
    return f"off by {off:.2g}" if not off <= TOLERANCE else ""


def wrong(answer, data, path):
    """What is wrong with a reader's answer, or "": judged by soundfile from memory, and by seeking in the file."""
    try:
        try:
            rate, channels, want = decode(io.BytesIO(data))
        except sf.SoundFileError:  # libsndfile tells some MP3s by their suffix alone
            rate, channels, want = decode(os.fsencode(path))
    except Exception as error:
        return f"accepted, but soundfile refuses it: {error}"
    info, whole = answer["info"], answer["whole"]
    if (info.rate, info.channels) != (rate, channels):
        return f"{info.rate} Hz, {info.channels} channels; soundfile says {rate} Hz, {channels}"
    if why := _differs(whole, want):
        return f"whole: {why}"
    start, length, piece = answer["piece"]
    if why := _differs(piece, decode(os.fsencode(path), start, length)[2]):
        return f"piece: {why}"
    resampled = answer["resampled"]
    want = soxr.resample(want.astype(np.float32), rate, TARGET, quality="HQ") if rate != TARGET else want
    short = abs(len(want) - len(resampled))
    if short > 1 and short > abs(len(want) - length_at(info, TARGET)) + 1:
        return f"resampled: {len(resampled)} samples, where soxr gives {len(want)}"
    if why := _differs(resampled[:len(want)], want[:len(resampled)]):
        return f"resampled: {why}"
    return ""


# ---- processes

def child(args):
    """Take numbers of mutants from stdin and answer each with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (args.memory, args.memory))
    module, name = args.reader.split(":")
    reader = getattr(importlib.import_module(module), name)
    files = {name: original(name) for name in ORIGINALS}
    answers.write("ready\n")
    for line in sys.stdin:
        _, _, suffix, data = mutant(args.seed, int(line), files)
        path = os.path.join(args.folder, "mutant" + suffix)
        with open(path, "wb") as file:
            file.write(data)
        try:
            outcome, why = "accepted", wrong(reader(path), data, path)
            if why:
                outcome = "wrong"
        except AudioError as error:
            outcome, why = "refused", str(error)
        except BaseException as error:
            outcome, why = "errors", f"{type(error).__name__}: {error}"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        answers.write(json.dumps([outcome, why, memory]) + "\n")


class Child:
    """A child process, and what it says."""

    def __init__(self, seed, reader, memory, folder):
        self.log = open(os.path.join(folder, "stderr"), "wb")
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, HERE, "--child", "--seed", str(seed), "--reader", reader, "--memory", str(memory),
             "--folder", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment)
        if self.line(60) != b"ready":
            self.end()
            raise RuntimeError(f"the child did not start:\n{Path(folder, 'stderr').read_text()}")

    def line(self, seconds):
        """The next line; None after `seconds` without one, b"" where the child has died."""
        got, until = b"", time.monotonic() + seconds
        while not got.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0, until - time.monotonic()))[0]:
                return None
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                return b""
            got += piece
        return got.strip()

    def ask(self, index, seconds):
        """Outcome, reason and MiB of memory for a mutant; the child is gone after a crash or a hang."""
        try:
            self.process.stdin.write(b"%d\n" % index)
            self.process.stdin.flush()
            line = self.line(seconds)
        except BrokenPipeError:
            line = b""
        if line:
            return json.loads(line)
        if line is None:
            return "hangs", f"no answer within {seconds:g} s", 0
        code = self.process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        last = Path(self.log.name).read_bytes()[-2000:].decode(errors="replace").split("\n\n")[-1].split("\n")
        return "crashes", f"{name}; {' | '.join(part.strip() for part in last[:8])}", 0

    def end(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            try:
                pipe.close()
            except BrokenPipeError:
                pass


def fuzz(count, seed=0, reader="fuzz_audio:project", only=None, watchdog=10, memory=4 << 30, say=print, batch=500):
    """Read mutants 0 .. count - 1 of a seed, or those in `only`, with a reader named "module:function".

    Children are started anew after `batch` mutants, a crash or a hang. Each failure is said as it comes.
    Returns (name of original -> Counter of OUTCOMES, [(index, name, kind, outcome, reason)] of the failures).
    """
    files = {name: original(name) for name in ORIGINALS}
    table, failures = {name: Counter() for name in ORIGINALS}, []
    worker, done, most, slowest = None, 0, 0, (0, 0)
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        try:
            for index in range(count) if only is None else only:
                if worker is None or done == batch:
                    if worker:
                        worker.end()
                    worker, done = Child(seed, reader, memory, folder), 0
                name, kind, suffix, _ = mutant(seed, index, files)
                began = time.monotonic()
                outcome, why, used = worker.ask(index, watchdog)
                slowest, most, done = max(slowest, (time.monotonic() - began, index)), max(most, used), done + 1
                table[name][outcome] += 1
                if outcome in FAILURES:
                    failures.append((index, name, kind, outcome, why))
                    say(f"FAIL --seed {seed} --only {index}: {name}, {kind}, {suffix}: {outcome}: {why}")
                elif only is not None:
                    say(f"{index}: {name}, {kind}, {suffix}: {outcome} {why}")
                if outcome in ("crashes", "hangs"):
                    worker.end()
                    worker = None
        finally:
            if worker:
                worker.end()
    say(f"slowest: mutant {slowest[1]}, {slowest[0]:.2f} s; largest child: {most} MiB")
    return table, failures


def as_text(table):
    """The table of outcomes by format, with a last line of sums."""
    rows = [("format", "mutants", *OUTCOMES)]
    total = sum(table.values(), Counter())
    for name, found in [(name, found) for name, found in table.items() if found] + [("all", total)]:
        rows.append((name, sum(found.values()), *(found[outcome] for outcome in OUTCOMES)))
    return "\n".join(f"{row[0]:<18}" + "".join(f"{value:>10}" for value in row[1:]) for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", type=int, nargs="+", metavar="INDEX", help="these mutants alone")
    parser.add_argument("--keep", metavar="FILE", help="also write the first of --only here, with its suffix added")
    parser.add_argument("--reader", default="fuzz_audio:project", metavar="MODULE:FUNCTION")
    parser.add_argument("--watchdog", type=float, default=10, metavar="SECONDS")
    parser.add_argument("--memory", type=int, default=4 << 30, metavar="BYTES")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    if args.keep and args.only:
        _, _, suffix, data = mutant(args.seed, args.only[0], {name: original(name) for name in ORIGINALS})
        Path(args.keep + suffix).write_bytes(data)
    began = time.monotonic()
    table, failures = fuzz(args.count, args.seed, args.reader, args.only, args.watchdog, args.memory)
    print(as_text(table))
    print(f"{len(failures)} failures in {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
