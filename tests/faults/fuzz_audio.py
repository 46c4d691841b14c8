"""Read thousands of damaged audio files with data/audio.py and compare with soundfile alone.

    python tests/faults/fuzz_audio.py --count 10000 --seed 0
    python tests/faults/fuzz_audio.py --seed 0 --only 1234 --keep /tmp/mutant

Child processes read the mutants of audio_mutants.py, with limited memory and time. A file may be
refused by an AudioError or read as what it contains. Anything else is a failure; its line tells how
to repeat it. The exit code is 1 if there is a failure.
"""
import argparse
import contextlib
import faulthandler
import importlib
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
import soxr

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parents[2]))

from audio_mutants import ORIGINALS, mutant, original

from data.audio import AudioError, check, length_at, probe, read

TARGET = 16000  # Hz, the rate of the model
TOLERANCE = 1e-4  # of full scale, or of the loudest sample if that is louder
OUTCOMES = ("accepted", "refused", "crashes", "hangs", "wrong", "errors")
FAILURES = OUTCOMES[2:]
MPG123_DELAY = 529  # samples
MPEG_FRAME = 1152  # samples of layer III
FEW = 64  # samples that libsndfile may find or not, by the size of its blocks


# --- readers: the project's, and controls that lack one protection each ---

def project(path):
    """What a scan and Clips do with a file. Raises AudioError."""
    probe(path)
    info = check(path)
    start, length = info.frames // 3, max(1, info.frames // 3)
    return {
        "info": info,
        "whole": read(path, info.rate),
        "piece": (start, length, read(path, info.rate, start, length)),
        "resampled": read(path, TARGET),
    }


def answer_with(wave):
    """The result of `project` for a file that contains `wave` at TARGET Hz."""
    class Info:
        rate, channels, format = TARGET, 1, "made"
        frames = declared = len(wave)

    return {"info": Info, "whole": wave, "piece": (0, len(wave), wave), "resampled": wave}


def control(on_error):
    """A reader that returns on_error(error) for a file that the project refuses."""
    def reader(path):
        try:
            return project(path)
        except AudioError as error:
            return on_error(error)
    return reader


def raise_runtime_error(error):
    raise RuntimeError(str(error))


silence = control(lambda error: answer_with(np.zeros(TARGET, np.float32)))
sleeper = control(lambda error: time.sleep(1e6))
aborter = control(lambda error: os.abort())
greedy = control(lambda error: np.ones(2**40))
leaky = control(raise_runtime_error)

last_answer = None


def neighbour(path):
    """Return the previous file instead of a broken one."""
    global last_answer
    try:
        last_answer = project(path)
    except AudioError:
        if last_answer is None:
            raise
    return last_answer


def muted(path):
    """Return silence of the right length."""
    answer = project(path)
    answer["whole"] = np.zeros_like(answer["whole"])
    return answer


def padded(path):
    """Append a tenth of a second of silence."""
    answer = project(path)
    answer["whole"] = np.pad(answer["whole"], (0, answer["info"].rate // 10))
    return answer


def shifted(path):
    """Return crops that start one sample late."""
    answer = project(path)
    start, length, piece = answer["piece"]
    answer["piece"] = start, length, np.roll(piece, -1)
    return answer


# --- judging a reader's answer ---

def decode(source, start=0, frames=None, block=16384):
    """(rate, channels, mono float64, complete) from `start` on, by soundfile alone.

    complete: False if decoding fails before the end; the samples are those before the failure.
    """
    with sf.SoundFile(source) as file:
        skipped = 0 if file.seekable() else start
        if start > skipped:
            file.seek(start)
        left = np.inf if frames is None else skipped + frames
        mono, complete = [np.zeros(0)], True
        while left > 0:
            requested = int(min(left, block))
            try:
                samples = file.read(requested, dtype="float32", always_2d=True)
            except sf.SoundFileError:
                complete = False
                break
            mono.append(samples.astype(np.float64).mean(axis=1))
            left -= requested
            if len(samples) < requested:  # the end, as for soundfile.read
                break
        rate, channels = file.samplerate, file.channels
    if not complete and block > 64:  # smaller blocks come nearer to the failure
        return decode(source, start, frames, 64)
    return rate, channels, np.concatenate(mono)[skipped:], complete


def difference(actual, expected):
    """How `actual` differs from `expected`, or ""."""
    if not np.isfinite(actual).all():
        return "not finite"
    if len(actual) != len(expected):
        return f"{len(actual)} samples, but soundfile finds {len(expected)}"
    if not actual.any() and expected.any():
        return "silence, but soundfile finds sound"
    largest = np.abs(actual - expected).max(initial=0)
    relative = largest / max(1, np.abs(expected).max(initial=0))
    return "" if relative <= TOLERANCE else f"off by {relative:.2g}"


def wrong(answer, data, path):
    """What is wrong with a reader's answer, or "".

    The reference is soundfile, which reads the file from memory and seeks in it on disk.
    """
    if answer["info"].format.startswith("MP3") and data[:4] == b"RIFF" and b"data" in data:
        data = data[data.index(b"data") + 8:]  # an MP3 inside a WAV
        path = os.fspath(path) + ".mp3"
        Path(path).write_bytes(data)
    try:
        try:
            rate, channels, expected, complete = decode(io.BytesIO(data))
        except sf.SoundFileError:  # libsndfile recognizes some MP3s by their suffix only
            rate, channels, expected, complete = decode(os.fsencode(path))
    except Exception as error:
        return f"accepted, but soundfile refuses it: {error}"
    info, whole = answer["info"], answer["whole"]
    if (info.rate, info.channels) != (rate, channels):
        return (f"{info.rate} Hz, {info.channels} channels; "
                f"soundfile says {rate} Hz, {channels} channels")

    if info.format.startswith("MP3") and len(whole) != len(expected):
        return wrong_beginning(whole, expected)  # soundfile alone misses the end or adds zeros
    if len(expected) == 0 and b"data" in data:  # a WAV that was cut off before its length
        place = data.index(b"data") + 8
        size = (len(data) - place).to_bytes(4, "little")
        expected = decode(io.BytesIO(data[:place - 4] + size + data[place:]))[2]
        return difference(whole, expected)
    if not complete or info.declared > info.frames:  # the sound part before a damaged place
        if len(whole) < len(expected) - FEW:
            return f"{len(whole)} samples, but soundfile decodes {len(expected)}"
        return difference(whole[:len(expected)], expected[:len(whole)])
    problem = difference(whole, expected)
    if problem:
        return f"whole: {problem}"
    start, length, piece = answer["piece"]
    *_, expected_piece, complete = decode(os.fsencode(path), start, length)
    if not complete:
        piece = piece[:len(expected_piece)]
    problem = difference(piece, expected_piece)
    if problem:
        return f"piece: {problem}"
    problem = wrong_resampling(answer["resampled"], info, expected, rate)
    return f"resampled: {problem}" if problem else ""


def wrong_beginning(whole, expected):
    """How an MP3 differs from the part that soundfile finds, or "".

    With a length header, mpg123 leaves out its own delay. If soundfile finds less than a frame, it
    took damaged bytes for a frame of another layer, and is no reference.
    """
    if len(expected) < MPEG_FRAME < len(whole):
        return ""
    problems = []
    for delay in (0, MPG123_DELAY):
        shifted = expected[delay:]
        n = min(len(whole), len(shifted))
        problems.append(difference(whole[:n], shifted[:n]))
    return "" if "" in problems else f"MP3: {problems[0]}"


def wrong_resampling(resampled, info, wave, rate):
    """How the resampled samples differ from soxr's of the reference wave, or ""."""
    expected = wave
    if rate != TARGET:
        expected = soxr.resample(wave.astype(np.float32), rate, TARGET, quality="HQ")
    missing = abs(len(expected) - len(resampled))
    allowed = abs(len(expected) - length_at(info, TARGET)) + 1  # the header may be an estimate
    if missing > allowed:
        return f"{len(resampled)} samples, but soxr gives {len(expected)}"
    return difference(resampled[:len(expected)], expected[:len(resampled)])


# --- child processes ---

def run_child(args):
    """Read numbers of mutants from stdin and answer each with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps output of libraries apart from the answers
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (args.memory, args.memory))
    module, name = args.reader.split(":")
    reader = getattr(importlib.import_module(module), name)
    originals = {name: original(name) for name in ORIGINALS}
    answers.write("ready\n")
    for line in sys.stdin:
        made = mutant(args.seed, int(line), originals)
        path = os.path.join(args.folder, "mutant" + made.suffix)
        with open(path, "wb") as file:
            file.write(made.data)
        outcome, reason = judge(reader, made.data, path)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # MiB
        answers.write(json.dumps([outcome, reason, memory]) + "\n")


def judge(reader, data, path):
    """(outcome, reason) of reading one file."""
    try:
        problem = wrong(reader(path), data, path)
    except AudioError as error:
        return "refused", str(error)
    except BaseException as error:
        return "errors", f"{type(error).__name__}: {error}"
    return ("wrong", problem) if problem else ("accepted", "")


class Child:
    """A child process that reads mutants."""

    def __init__(self, seed, reader, memory, folder):
        self.log = Path(folder, "stderr")
        command = [
            sys.executable, HERE, "--child", "--seed", str(seed), "--reader", reader,
            "--memory", str(memory), "--folder", folder,
        ]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )
        if self.read_line(60) != b"ready":
            self.end()
            raise RuntimeError(f"the child did not start:\n{self.log.read_text()}")

    def read_line(self, seconds):
        """The next line; None after `seconds` without one, b"" if the child has died."""
        received, deadline = b"", time.monotonic() + seconds
        while not received.endswith(b"\n"):
            left = max(0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                return None
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                return b""
            received += piece
        return received.strip()

    def read_mutant(self, index, seconds):
        """(outcome, reason, MiB of memory) of a mutant. End the child after a crash or a hang."""
        try:
            self.process.stdin.write(b"%d\n" % index)
            self.process.stdin.flush()
            line = self.read_line(seconds)
        except BrokenPipeError:
            line = b""
        if line:
            return json.loads(line)
        if line is None:
            return "hangs", f"no answer within {seconds:g} s", 0
        code = self.process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        traceback = self.log.read_bytes()[-2000:].decode(errors="replace").split("\n\n")[-1]
        lines = [line.strip() for line in traceback.split("\n")[:8]]
        return "crashes", f"{name}; {' | '.join(lines)}", 0

    def end(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Failure(NamedTuple):
    index: int
    name: str  # of the original
    kind: str  # of damage
    outcome: str
    reason: str


def fuzz(
    count, seed=0, reader="fuzz_audio:project", only=None, watchdog=10, memory=4 << 30, log=print,
    per_child=500,
):
    """Read the mutants 0 to count - 1 of a seed, or those in `only`.

    reader: "module:function"; watchdog: seconds; memory: bytes of a child. A new child is started
    after `per_child` mutants, a crash or a hang. Failures are logged as they occur.
    Returns (name of original -> Counter of OUTCOMES, [Failure]).
    """
    originals = {name: original(name) for name in ORIGINALS}
    table = {name: Counter() for name in ORIGINALS}
    failures = []
    child, n_read = None, 0
    most_memory, slowest = 0, (0, 0)
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        try:
            for index in range(count) if only is None else only:
                if child is not None and n_read == per_child:
                    child.end()
                    child = None
                if child is None:
                    child, n_read = Child(seed, reader, memory, folder), 0
                name, kind, suffix, _ = mutant(seed, index, originals)
                started = time.monotonic()
                outcome, reason, used = child.read_mutant(index, watchdog)
                n_read += 1
                slowest = max(slowest, (time.monotonic() - started, index))
                most_memory = max(most_memory, used)
                table[name][outcome] += 1
                description = f"{name}, {kind}, {suffix}: {outcome}: {reason}"
                if outcome in FAILURES:
                    failures.append(Failure(index, name, kind, outcome, reason))
                    log(f"FAIL --seed {seed} --only {index}: {description}")
                elif only is not None:
                    log(f"{index}: {description}")
                if outcome in ("crashes", "hangs"):
                    child.end()
                    child = None
        finally:
            if child is not None:
                child.end()
    seconds, index = slowest
    log(f"slowest: mutant {index}, {seconds:.2f} s; largest child: {most_memory} MiB")
    return table, failures


def as_text(table):
    """The table of outcomes by format, with a last line of sums."""
    rows = [(name, outcomes) for name, outcomes in table.items() if outcomes]
    rows.append(("all", sum(table.values(), Counter())))
    lines = ["".join([f"{'format':<18}", *(f"{name:>10}" for name in ("mutants", *OUTCOMES))])]
    for name, outcomes in rows:
        numbers = [sum(outcomes.values()), *(outcomes[outcome] for outcome in OUTCOMES)]
        lines.append("".join([f"{name:<18}", *(f"{number:>10}" for number in numbers)]))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", type=int, nargs="+", metavar="INDEX", help="only these mutants")
    parser.add_argument("--keep", metavar="FILE",
                        help="also write the first of --only to FILE, with its suffix appended")
    parser.add_argument("--reader", default="fuzz_audio:project", metavar="MODULE:FUNCTION")
    parser.add_argument("--watchdog", type=float, default=10, metavar="SECONDS")
    parser.add_argument("--memory", type=int, default=4 << 30, metavar="BYTES")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args)
        return 0
    if args.keep and args.only:
        originals = {name: original(name) for name in ORIGINALS}
        made = mutant(args.seed, args.only[0], originals)
        Path(args.keep + made.suffix).write_bytes(made.data)
    started = time.monotonic()
    table, failures = fuzz(
        args.count, args.seed, args.reader, args.only, args.watchdog, args.memory
    )
    print(as_text(table))
    print(f"{len(failures)} failures in {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
