"""What large data sets cost: start-up, memory and time to load a step, with 1,000, 10,000 and 100,000 clips.

    python bench/scale.py --counts 1000 10000 100000

Writes so many short WAVs of 50 classes into a folder (removed at the end) and, in a fresh process for each
measurement, finds, scans (headers only) and splits them, first without and then with the index of the first time, and
loads 20 windows of 8 x 4 clips. The memory for the start is the growth of the process's peak until the clips are ready;
what the decoder and resampler take once the first windows are loaded is in MB, as it does not grow with the clips.
"""
import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from common import report


def write_clips(folder, count):
    """`count` WAVs of 0.1 s, each other noise, in 50 class folders."""
    rng = np.random.default_rng(0)
    for c in range(50):
        (folder / f"class{c:02d}").mkdir()
    for i in range(count):
        sf.write(folder / f"class{i % 50:02d}" / f"recording{i:06d}.wav", 0.1 * rng.standard_normal(800), 8000)


def child(folder):
    """What one start measures, as JSON."""
    from data.clips import Clips, TrainLoader
    from data.prepare import prepare
    before, started = resident(), time.perf_counter()
    manifest, _ = prepare(folder, scan_mode="headers", cache_dir=Path(folder).parent, log=lambda line: None)
    ready, grown = time.perf_counter() - started, resident() - before
    strings = sum(sys.getsizeof(path) for path in manifest.paths)
    columns = sum(column.nbytes for column in vars(manifest).values() if isinstance(column, np.ndarray))
    held = columns + 8 * len(manifest)  # 8: the list's pointer to the path
    clips = Clips(manifest, 22050, 88200)
    loader = TrainLoader(clips, manifest.rows("train"), 4, 32)
    started = time.perf_counter()
    windows = loader.steps(0)
    for _ in range(min(20, loader.steps_per_epoch)):
        next(windows)
    step = (time.perf_counter() - started) / min(20, loader.steps_per_epoch)
    print(json.dumps({"ready": ready, "strings": strings, "held": held, "grown": grown, "step": step,
                      "loading": resident() - before - grown}))


def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="bench/results/scale.jsonl")
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    rows = []
    for count in args.counts:
        place = Path(tempfile.mkdtemp())
        try:
            (place / "clips").mkdir()
            write_clips(place / "clips", count)
            first, second = (json.loads(subprocess.run(
                [sys.executable, __file__, "--child", str(place / "clips")], capture_output=True, text=True, check=True,
                env={**os.environ}).stdout) for _ in range(2))
        finally:
            shutil.rmtree(place)
        rows.append([count, f"{first['ready']:.2f}", f"{second['ready']:.2f}", f"{second['held'] / count:.0f}",
                     *(f"{(start['grown'] - start['strings']) / count:.0f}" for start in (first, second)),
                     f"{second['loading'] / 1e6:.0f}", f"{1000 * second['step']:.1f}"])
        print(f"{count} done", file=sys.stderr)
    columns = ["clips", "first start, s", "from the index, s", "manifest, bytes a clip beyond its strings",
               "peak growth of a first start, bytes a clip beyond the strings", "the same from the index",
               "more for loading, MB", "ms to load a step of 32"]
    report("scale", {"counts": args.counts}, columns, rows, ["headers only; imports not included; the peak is of the "
           "start, what stays is the manifest"], torch.device("cpu"), args.out)


if __name__ == "__main__":
    main()
