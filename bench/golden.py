"""Does a change of structure change results? Run two versions of the program and compare them.

    python bench/golden.py run SOURCE_TREE OUT     # runs the program in SOURCE_TREE, two minutes
    python bench/golden.py compare OUT_A OUT_B     # weights, steps, metrics, predictions, exports

It covers training with warm-up, accumulation, every augmentation, EMA and layer decay, killed and
resumed; several labels per clip; evaluation; prediction in all formats; export to transformers.
Results are compared bit for bit. They are float32 on a CPU, so run both on one machine.
"""
import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from safetensors.torch import load_file

SMALL = "--weights none --dim 48 --depth 3 --heads 4 --amp off --device cpu --workers 0".split()
AUGMENTED = (
    "--epochs 4 --warmup-epochs 1 --batch-size 4 --effective-batch 12 --seconds 1.5 --save-every 2 "
    "--freq-mask 20 --time-mask 15 --mixup-alpha 0.4 --mixup-p 0.6 --gain 6 --noise-p 0.5 "
    "--filter-p 0.5 --shift-p 0.7 --patchout 0.3 --drop-path 0.2 --ema 0.9 --layer-decay 0.8 "
    "--crop active --sampler balanced --lr-backbone 5e-4 --logit-adjust 0.5").split()
MULTI_LABEL = (
    "--loss focal-bce --monitor val_map --frontend fbank --epochs 3 --warmup-epochs 0 "
    "--batch-size 4 --seconds 1 --mixup-alpha 0.4 --lr-backbone 5e-4 --short pad "
    "--schedule wsd").split()
RENAMED = {"heard.csv": "coverage.csv"}  # files that had another name in earlier versions
TIMED_COLUMNS = ("seconds", "clips_per_second", "peak_memory_mb")  # of history.csv
COMPARED = (".pt", ".npz", ".safetensors", ".json", ".csv", ".txt", ".jsonl")
NOT_COMPARED = ("run.json", "settings.json", "config.json", "preprocessor_config.json")


# --- run ---

def run_program(source, out):
    """Run the program of the tree `source` in the new folder `out`."""
    out.mkdir(parents=True)
    write_recordings(out / "data")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}

    def start(script, *flags):
        print("+", script, *flags, flush=True)
        command = [sys.executable, source / script, *map(str, flags)]
        return subprocess.Popen(command, cwd=out, env=environment)

    def run(script, *flags):
        if start(script, *flags).wait():
            sys.exit(f"failed: {script} {flags}")

    train = ["train.py", "--data", "data/classes", *SMALL, *AUGMENTED, "--cache-dir", "cache"]
    run(*train, "--run-dir", "whole")
    kill_after_steps(start(*train, "--run-dir", "killed"), out / "killed" / "steps.csv", 8)
    run("train.py", "--resume", "--run-dir", "killed")
    run("train.py", "--data", "data/several.csv", *SMALL, *MULTI_LABEL, "--cache-dir", "cache",
        "--run-dir", "several")
    run("evaluate.py", "--ckpt", "whole/best.pt", "--amp", "off", "--split", "val", "--out", "val")
    run("evaluate.py", "--ckpt", "several/best.pt", "--amp", "off", "--out", "several-test")
    for name in ("whole", "several"):
        run("predict.py", "--ckpt", f"{name}/best.pt", "data/long", "--amp", "off", "--hop", "0.5",
            "--threshold", "0.2", "--format", "csv,jsonl,raven,audacity", "--embeddings", "--out",
            f"predictions-{name}")
        run("export.py", "--ckpt", f"{name}/best.pt", "--to", "hf")


def kill_after_steps(process, steps, n):
    """SIGKILL when the file `steps` has n rows."""
    while process.poll() is None:
        if steps.exists() and steps.read_text().count("\n") > n:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)


def write_recordings(folder):
    """Six uneven classes of chirps in noise, 0.8 to 5 s long; a table with several labels."""
    rng = np.random.default_rng(7)
    rows = []
    for c, name in enumerate("abcdef"):
        (folder / "classes" / name).mkdir(parents=True)
        for i in range(24 - 3 * c):
            rate = (16000, 22050, 44100)[i % 3]
            t = np.arange(int(rate * rng.uniform(0.8, 5))) / rate
            wobble = 0.05 * rng.standard_normal() + 0.1 * np.sin(2 * np.pi * t)
            hz = 200 * 1.7**c * (1 + wobble)
            is_on = np.sin(2 * np.pi * (0.5 + 0.3 * c) * t + rng.uniform(0, 6)) > 0
            chirp = 0.3 * is_on.astype(float) * np.sin(2 * np.pi * np.cumsum(hz) / rate)
            wave = chirp + 0.05 * rng.standard_normal(len(t))
            path = f"classes/{name}/{name}{i}.{'flac' if i % 2 else 'wav'}"
            sf.write(folder / path, wave, rate)
            second = "abcdef"[(c + 1 + i % 3) % 6]
            labels = f"{name};{second}" if i % 4 == 0 else name
            unknown = "abcdef"[(c + 4) % 6] if i % 5 == 0 else ""
            rows.append([path, labels, unknown])
    (folder / "classes" / "a" / "broken.wav").write_bytes(b"RIFF nothing")
    with open(folder / "several.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "secondary_labels"], *rows])
    long = np.concatenate([sf.read(folder / path)[0][:40000] for path, *_ in rows[::7]])
    (folder / "long").mkdir()
    sf.write(folder / "long" / "long.wav", long, 22050)
    sf.write(folder / "long" / "short.flac", long[:9000], 22050)


# --- compare ---

def compare(a, b):
    """Print every result file of `a` that differs in `b` -> the number of them."""
    names = [path.relative_to(a) for path in sorted(a.rglob("*")) if path.is_file()]
    names = [name for name in names if is_compared(name)]
    n_different = 0
    for name in names:
        other = b / name
        if not other.exists():
            other = other.with_name(RENAMED.get(name.name, name.name))
        difference = first_difference(values(a / name), values(other)) if other.exists() else (
            "missing")
        if difference:
            n_different += 1
            print(f"{name}: {difference}")
    print(f"{len(names) - n_different} of {len(names)} files are equal")
    return n_different


def is_compared(name):
    if {"data", "cache", "parts"} & set(name.parts):
        return False
    return name.suffix in COMPARED and name.name not in NOT_COMPARED


def first_difference(ours, theirs):
    """A line on how two dicts of values differ, or None."""
    names = sorted(ours.keys() | theirs.keys())
    unequal = [name for name in names if not equal(ours.get(name), theirs.get(name))]
    if not unequal:
        return None
    name = unequal[0]
    return (f"{len(unequal)} of {len(names)} values differ, such as {name}:\n"
            f"    {str(ours.get(name))[:200]}\n    {str(theirs.get(name))[:200]}")


def equal(one, two):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        is_float = one.dtype.kind == "f"
        return one.shape == two.shape and np.array_equal(one, two, equal_nan=is_float)
    return type(one) is type(two) and one == two


def values(path):
    """The content of a result file: name -> tensor, array or text."""
    if path.suffix == ".pt":
        return checkpoint_values(torch.load(path, map_location="cpu", weights_only=True))
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {str(i): file[name] for i, name in enumerate(file.files)}
    if path.suffix == ".json":
        return {name: json.dumps(value) for name, value in json.loads(path.read_text()).items()}
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    timed = set()
    if path.name == "history.csv":
        timed = {i for i, name in enumerate(rows[0]) if name in TIMED_COLUMNS}
    return {f"line {n}": str([cell for i, cell in enumerate(row) if i not in timed])
            for n, row in enumerate(rows)}


def checkpoint_values(checkpoint):
    found = {name: json.dumps(checkpoint[name]) for name in ("schedule", "calibration")}
    for part in ("model", "ema"):
        for name, value in (checkpoint[part] or {}).items():
            found[f"{part}/{name}"] = value
    for i, moments in checkpoint["optimizer"]["state"].items():
        for name, value in moments.items():
            found[f"optimizer/{i}/{name}"] = value
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "compare"))
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run_program(arguments.first.resolve(), arguments.second.resolve())
    else:
        sys.exit(compare(arguments.first, arguments.second) > 0)
