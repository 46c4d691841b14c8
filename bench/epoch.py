"""A whole epoch from files on the disk, and the data path alone.

    pip install -r bench/requirements.txt
    python bench/epoch.py --data FOLDER --flags "--size tiny --weights none"

Runs train.py itself with --cache off and with --cache disk (into an empty folder), three epochs each, and tells for
each epoch the time of training and validation, clips a second, and the share of the training time in which the model
waits for data. Then the data path without a model, over the same training clips in turn: this project's first epoch,
its later ones, from the disk and from memory, and what people write: librosa.load of the crop, resampled, clip by clip.
"""
import argparse
import contextlib
import io
import shlex
import tempfile
import time
from pathlib import Path

import librosa
import numpy as np
import torch
from common import in_turn, report, spread

import train
from core.precision import pick_device
from data.cache import WaveCache
from data.clips import Clips, TrainLoader
from data.prepare import prepare

RATE, SAMPLES = 22050, 88200  # LogMel's, 4 s


def timed_run(args, cache, folder):
    """[(epoch, seconds training, seconds waiting, clips, seconds validating, clips)] of a run of train.py."""
    epochs, real_windows, real_evaluate = [], TrainLoader.steps, train.evaluate

    def windows(self, epoch, *how):
        row, iterator, started = [epoch + 1, 0.0, 0.0, 0, 0.0, 0], real_windows(self, epoch, *how), time.perf_counter()
        epochs.append(row)
        while True:
            asked = time.perf_counter()
            window = next(iterator, None)
            now = time.perf_counter()
            row[1], row[2] = now - started, row[2] + now - asked
            if window is None:
                return
            row[3] += sum(len(batch.rows) for batch in window)
            yield window

    def evaluate(*how):
        started = time.perf_counter()
        result = real_evaluate(*how)
        epochs[-1][4:] = [time.perf_counter() - started, len(result.rows)]
        return result

    TrainLoader.steps, train.evaluate = windows, evaluate
    real_draw, train.draw_first_batch = train.draw_first_batch, lambda *how: None  # it takes a window of its own
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(["--data", args.data, "--epochs", str(args.epochs), "--warmup-epochs", "0", "--batch-size", "4", "--run-dir",
                        str(folder / cache), "--cache", cache, "--cache-dir", str(folder / "cache"), *shlex.split(args.flags)])
    finally:
        TrainLoader.steps, train.evaluate, train.draw_first_batch = real_windows, real_evaluate, real_draw
    return epochs[:args.epochs]


def data_path(args, folder):
    """Clips a second of each way to load the training crops of one epoch."""
    manifest, _ = prepare(args.data, cache_dir=folder / "cache", log=lambda line: None)
    rows = manifest.rows("train")[:args.clips]
    kept = Clips(manifest, RATE, SAMPLES, cache=WaveCache(folder / "cache" / "audio", RATE))
    resident = Clips(manifest, RATE, SAMPLES, cache=kept.cache)
    resident.load_into_memory(torch.device("cpu"))  # and so all are on the disk
    ways = {
        "from the cache on the disk": kept,
        "from memory": resident,
        "decoded whole, as in the first epoch": Clips(manifest, RATE, SAMPLES, cache=WaveCache(folder / "none", RATE, False)),
        "the crop decoded each time (--cache off)": Clips(manifest, RATE, SAMPLES),
    }
    loaders = {name: TrainLoader(clips, rows, 4, 32) for name, clips in ways.items()}

    def usual():
        starts = kept.crop_start(rows, 0)
        for row, start in zip(rows, starts, strict=True):
            wave, _ = librosa.load(manifest.file(row), sr=RATE, offset=float(manifest.start[row]) + start / RATE,
                                   duration=SAMPLES / RATE)
            np.resize(wave, SAMPLES)

    sides = {name: lambda loader=loader: [None for _ in loader.steps(0)] for name, loader in loaders.items()}
    sides["librosa.load, clip by clip"] = usual
    times = in_turn(sides, args.rounds, torch.device("cpu"))
    return {name: [len(rows) / s for s in seconds] for name, seconds in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="demo")
    parser.add_argument("--flags", default="--size tiny --weights none", help="more flags for train.py")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of the data path alone")
    parser.add_argument("--clips", type=int, default=240, help="at most, of the data path alone")
    parser.add_argument("--out", default="bench/results/epoch.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder, rows = Path(folder), []
        for cache in ("off", "disk"):
            for epoch, seconds, waiting, clips, validating, n_val in timed_run(args, cache, folder):
                rows.append([f"--cache {cache}, epoch {epoch}", f"{seconds:.2f}", f"{clips / seconds:.1f}",
                             f"{waiting / seconds:.2%}", f"{validating:.2f}", f"{n_val / validating:.1f}"])
        paths = data_path(args, folder)
    base = paths["librosa.load, clip by clip"]
    for name, speeds in paths.items():
        speed, ratio = spread(speeds), spread([a / b for a, b in zip(speeds, base, strict=True)])
        rows.append([f"data path: {name}", "-", f"{speed[0]:,.0f} ({speed[1]:,.0f} to {speed[2]:,.0f})", "-", "-",
                     f"{ratio[0]:.1f} ({ratio[1]:.1f} to {ratio[2]:.1f}) x librosa"])
    report("epoch", vars(args), ["what", "training, s", "clips/s", "waits for data", "validation, s", "clips/s there"], rows,
           [f"{torch.get_num_threads()} threads; the data path in turn over {args.rounds} rounds, median (range), no worker "
            "processes"], pick_device("auto"), args.out)


if __name__ == "__main__":
    main()
