"""Time whole epochs from files on disk, and the data path without a model.

    pip install -r bench/requirements.txt
    python bench/epoch.py --data FOLDER --flags "--size tiny --weights none"

Runs train.py for three epochs with --cache off and with --cache disk (into an empty folder).
Reports for each epoch the time of training and validation, clips per second, and the share of the
training time in which the model waits for data.

Then loads the same training clips without a model: as in this project's first epoch and in later
ones, from disk and from memory; and with librosa.load of each crop, as is usual.
"""

import argparse
import contextlib
import io
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import librosa
import numpy as np
import torch
from common import in_turn, median_range, prepare_quietly, ratios, report

import train
from core.device.precision import pick_device
from data.cache import WaveCache
from data.clips import Clips, TrainLoader

SAMPLE_RATE, SAMPLES = 22050, 88200  # LogMel's input, 4 s
BATCH_SIZE, EFFECTIVE_BATCH = 4, 32
LIBROSA = "librosa.load, clip by clip"
COLUMNS = ["what", "training, s", "clips/s", "waits for data", "validation, s",
           "clips/s in validation"]


@dataclass
class EpochTimes:
    """Seconds and clips of one epoch."""

    epoch: int
    training: float = 0.0
    waiting: float = 0.0  # for data, while training
    n_train: int = 0
    validation: float = 0.0
    n_val: int = 0


def timed_run(args, cache: str, folder: Path) -> list[EpochTimes]:
    """Run train.py and measure every epoch."""
    epochs = []
    load_steps, evaluate = TrainLoader.steps, train.evaluate

    def timed_steps(self, epoch, *position):
        times = EpochTimes(epoch + 1)
        epochs.append(times)
        steps = load_steps(self, epoch, *position)
        started = time.perf_counter()
        while True:
            asked = time.perf_counter()
            micro_batches = next(steps, None)
            arrived = time.perf_counter()
            times.training = arrived - started
            times.waiting += arrived - asked
            if micro_batches is None:
                return
            times.n_train += sum(len(batch.rows) for batch in micro_batches)
            yield micro_batches

    def timed_evaluate(*args, **kwargs):
        started = time.perf_counter()
        result = evaluate(*args, **kwargs)
        if not epochs[-1].n_val:  # the test follows the last validation
            epochs[-1].validation = time.perf_counter() - started
            epochs[-1].n_val = len(result.rows)
        return result

    argv = ["--data", args.data, "--epochs", str(args.epochs), "--warmup-epochs", "0",
            "--batch-size", str(BATCH_SIZE), "--run-dir", str(folder / cache), "--cache", cache,
            "--cache-dir", str(folder / "cache"), *shlex.split(args.flags)]
    with (mock.patch.object(TrainLoader, "steps", timed_steps),
          mock.patch.object(train, "evaluate", timed_evaluate),
          mock.patch.object(train.describe, "draw_start"),  # it loads a step of its own
          contextlib.redirect_stdout(io.StringIO())):
        train.main(argv)
    return epochs


def time_data_path(args, folder: Path) -> dict[str, list[float]]:
    """Load the training crops of one epoch in several ways -> {way: [clips per second]}."""
    manifest = prepare_quietly(args.data, folder / "cache")
    rows = manifest.rows("train")[:args.clips]

    def clips(cache=None):
        return Clips(manifest, SAMPLE_RATE, SAMPLES, cache=cache)

    on_disk = clips(WaveCache(folder / "cache" / "audio", SAMPLE_RATE))
    in_memory = clips(on_disk.cache)
    in_memory.load_into_memory(torch.device("cpu"))  # also fills the cache on disk
    ways = {
        "from the cache on disk": on_disk,
        "from memory": in_memory,
        "decoded whole, as in the first epoch": clips(
            WaveCache(folder / "none", SAMPLE_RATE, write=False)),
        "the crop decoded each time (--cache off)": clips(),
    }

    def load_all(loader):
        for _ in loader.steps(0):
            pass

    def load_with_librosa():
        for row, start in zip(rows, on_disk.crop_start(rows, 0), strict=True):
            offset = float(manifest.start[row]) + start / SAMPLE_RATE
            wave, _ = librosa.load(manifest.file(row), sr=SAMPLE_RATE, offset=offset,
                                   duration=SAMPLES / SAMPLE_RATE)
            np.resize(wave, SAMPLES)

    sides = {}
    for name, source in ways.items():
        loader = TrainLoader(source, rows, BATCH_SIZE, EFFECTIVE_BATCH)
        sides[name] = lambda loader=loader: load_all(loader)
    sides[LIBROSA] = load_with_librosa
    times = in_turn(sides, args.rounds, torch.device("cpu"))
    return {name: [len(rows) / s for s in seconds] for name, seconds in times.items()}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="demo")
    add("--flags", default="--size tiny --weights none", help="more flags for train.py")
    add("--epochs", type=int, default=3)
    add("--rounds", type=int, default=3, help="rounds of the data path without a model")
    add("--clips", type=int, default=240, help="most clips of the data path without a model")
    add("--out", default="bench/results/epoch.jsonl")
    return parser.parse_args()


def main():
    args = parse()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("off", "disk"):
            for times in timed_run(args, cache, Path(folder)):
                rows.append([
                    f"--cache {cache}, epoch {times.epoch}",
                    f"{times.training:.2f}",
                    f"{times.n_train / times.training:.1f}",
                    f"{times.waiting / times.training:.2%}",
                    f"{times.validation:.2f}",
                    f"{times.n_val / times.validation:.1f}",
                ])
        speeds = time_data_path(args, Path(folder))
    for name, speed in speeds.items():
        speed_up = median_range(ratios(speed, speeds[LIBROSA]), digits=1)
        rows.append([f"data path: {name}", "-", median_range(speed, digits=0), "-", "-",
                     f"{speed_up} x librosa"])
    note = (f"{torch.get_num_threads()} threads; the data path in turn over {args.rounds} rounds, "
            "median (range), no worker processes")
    report("epoch", vars(args), COLUMNS, rows, [note], pick_device("auto"), args.out)


if __name__ == "__main__":
    main()
