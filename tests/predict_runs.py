"""Run predict.py with a tiny checkpoint and read its results, for the tests of predictions."""
import csv
import os
import signal
import sys

import numpy as np
import pytest
import soundfile as sf
from conftest import ROOT, tone
from harness import without_pictures

import predict
import train
from core.exits import ending_of, print_error
from core.run.checkpoint import load_checkpoint, save_checkpoint
from core.run.signals import SIGNALS

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
# Windows of 0.9 s at 22,050 Hz. Without a cache, which would round the audio of the evaluation.
TINY = [
    "--weights", "none", "--dim", "32", "--depth", "1", "--heads", "2", "--seconds", "0.9",
    "--device", "cpu", "--amp", "off", "--cache", "off", "--lr-backbone", "2e-3",
    "--lr-head", "4e-3", "--epochs", "6", "--batch-size", "4", "--effective-batch", "4",
    "--monitor", "val_loss",
]


def train_tiny(data, folder):
    """Train a tiny model that tells some recordings apart -> its best.pt."""
    with pytest.MonkeyPatch.context() as patch, without_pictures(patch):
        patch.setenv("HOME", str(folder))
        assert train.main(["--data", str(data), *TINY, "--run-dir", str(folder / "run")]) == 0
    return folder / "run" / "best.pt"


def write_recordings(folder):
    """Class folders of recordings: short, long, stereo, silent, of several sample rates."""
    # seconds, sample rate, channels; some lengths are not whole numbers of samples
    kinds = [(0.5, 16000, 1), (2.7, 22050, 1), (3.33337, 44100, 2), (7.1, 48000, 1),
             (4.00009, 44100, 1)]
    for c, (name, hz) in enumerate({"low": 310, "high": 4100}.items()):
        (folder / name).mkdir()
        for i, (seconds, rate, n_channels) in enumerate(kinds):
            channels = [tone(seconds, rate, hz * (1 + 0.1 * i), seed=10 * c + i + 100 * j)
                        for j in range(n_channels)]
            sf.write(folder / name / f"{i}.wav", np.stack(channels, axis=1), rate)
    sf.write(folder / "low" / "silent.wav", np.zeros(50000), 22050)
    return folder


def with_parts(ckpt, path, **parts):
    """Write a copy of a checkpoint with some other parts to `path` -> path."""
    checkpoint = dict(load_checkpoint(ckpt))
    del checkpoint["format"], checkpoint["version"]
    save_checkpoint(path, {**checkpoint, **parts})
    return path


def flags_of(ckpt, out, *inputs):
    return ["--ckpt", str(ckpt), "--out", str(out), "--device", "cpu", "--amp", "off",
            *map(str, inputs)]


def command(ckpt, out, *inputs):
    """The words of a command line for a process of its own."""
    return [sys.executable, str(ROOT / "predict.py"), *flags_of(ckpt, out, *inputs)]


def run(ckpt, out, *inputs, code=0):
    """Run predict.main in this process; check the exit code that a process would have."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        ended_with = predict.main(flags_of(ckpt, out, *inputs)) or 0
    except SystemExit as stop:
        ended_with = stop.code
    except Exception as error:
        ending = ending_of(error)
        if ending is None:
            raise
        ended_with, message = ending
        print_error(message)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert ended_with == code


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def file_names(table):
    """The names of the files in a table, without their folders."""
    return [os.path.basename(row["path"]) for row in rows(table)]


def contents(out):
    """{relative path: bytes} of all results in a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != ".lock"}
