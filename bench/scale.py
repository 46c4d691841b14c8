"""What large data sets cost: start-up, memory, and the time to load a step.

    python bench/scale.py --counts 1000 10000 100000

Writes short WAVs of 50 classes into a temporary folder. Then a new process for each measurement
finds, scans (headers only) and splits them, and loads 20 steps of 8 x 4 clips: first without the
scan index, then with the one that the first process wrote.

Memory of the start is the growth of the process's peak until the clips are ready. What decoder and
resampler need for the first steps does not grow with the clips, so it is reported in MB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from common import prepare_quietly, report

from data.clips import Clips, TrainLoader

N_CLASSES, N_STEPS = 50, 20
COLUMNS = [
    "clips", "first start, s", "start with index, s", "manifest, bytes per clip without strings",
    "peak growth of a first start, bytes per clip without strings",
    "peak growth with index, bytes per clip without strings", "more for loading, MB",
    "ms to load a step of 32",
]


def write_clips(folder: Path, count: int) -> None:
    """Write `count` different WAVs of 0.1 s of noise into class folders."""
    rng = np.random.default_rng(0)
    for c in range(N_CLASSES):
        (folder / f"class{c:02d}").mkdir(parents=True)
    for i in range(count):
        path = folder / f"class{i % N_CLASSES:02d}" / f"recording{i:06d}.wav"
        sf.write(path, 0.1 * rng.standard_normal(800), 8000)


def measure_start(folder: Path) -> dict[str, float]:
    """Start once on `folder` and load some steps; seconds and bytes."""
    memory_before, started = peak_resident(), time.perf_counter()
    manifest = prepare_quietly(str(folder), folder.parent, headers_only=True)
    ready = time.perf_counter() - started
    memory_ready = peak_resident()
    columns = [value for value in vars(manifest).values() if isinstance(value, np.ndarray)]
    pointers = 8 * len(manifest)  # of the list of paths

    clips = Clips(manifest, 22050, 88200)
    loader = TrainLoader(clips, manifest.rows("train"), 4, 32)
    n_steps = min(N_STEPS, loader.steps_per_epoch)
    started = time.perf_counter()
    steps = loader.steps(0)
    for _ in range(n_steps):
        next(steps)
    return {
        "ready": ready,
        "strings": sum(sys.getsizeof(path) for path in manifest.paths),
        "manifest": sum(column.nbytes for column in columns) + pointers,
        "growth": memory_ready - memory_before,
        "step": (time.perf_counter() - started) / n_steps,
        "loading": peak_resident() - memory_ready,
    }


def peak_resident() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_count(count: int) -> list:
    """Return the row of the table for `count` clips."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "clips"
        write_clips(folder, count)
        command = [sys.executable, __file__, "--measure", str(folder)]
        first, second = (
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(2))
    growth = [(start["growth"] - start["strings"]) / count for start in (first, second)]
    return [
        count, f"{first['ready']:.2f}", f"{second['ready']:.2f}",
        f"{second['manifest'] / count:.0f}", f"{growth[0]:.0f}", f"{growth[1]:.0f}",
        f"{second['loading'] / 1e6:.0f}", f"{1000 * second['step']:.1f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--measure", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", default="bench/results/scale.jsonl")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_start(args.measure)))
        return
    rows = []
    for count in args.counts:
        rows.append(measure_count(count))
        print(f"{count} done", file=sys.stderr)
    note = "headers only; without imports; the peak is of the start, the manifest stays"
    report("scale", {"counts": args.counts}, COLUMNS, rows, [note], torch.device("cpu"), args.out)


if __name__ == "__main__":
    main()
