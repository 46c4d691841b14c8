"""Does a change of structure change results? Run two versions of the program and compare bit for bit.

    python bench/golden.py run SOURCE_TREE OUT     # runs the program in SOURCE_TREE, about four minutes
    python bench/golden.py compare OUT_A OUT_B     # weights, steps, metrics, predictions, exports

Covers training with warm-up, accumulation, every augmentation, EMA and layer decay, killed and resumed;
several labels per clip; evaluation, prediction in all formats, and export. Everything is float32 on the CPU,
so results of one machine can be compared with each other only.
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

SMALL = "--weights none --dim 48 --depth 3 --heads 4 --amp off --device cpu --workers 0".split()
AUGMENTED = ("--epochs 4 --warmup-epochs 1 --batch-size 4 --effective-batch 12 --seconds 1.5 --save-every 2 "
             "--freq-mask 20 --time-mask 15 --mixup-alpha 0.4 --mixup-p 0.6 --gain 6 --noise-p 0.5 --filter-p 0.5 "
             "--shift-p 0.7 --patchout 0.3 --drop-path 0.2 --ema 0.9 --layer-decay 0.8 --crop active "
             "--sampler balanced --lr-backbone 5e-4 --logit-adjust 0.5").split()
MULTI_LABEL = ("--loss focal-bce --monitor val_map --frontend fbank --epochs 3 --warmup-epochs 0 --batch-size 4 "
               "--seconds 1 --mixup-alpha 0.4 --lr-backbone 5e-4 --short pad --schedule wsd").split()
RENAMED = {"heard.csv": "coverage.csv"}  # files that go by another name since


def write_recordings(folder):
    """Six uneven classes of chirps in noise, 0.8 to 5 s long, and a table with several labels per clip."""
    rng = np.random.default_rng(7)
    rows = []
    for c in range(6):
        name = "abcdef"[c]
        (folder / "classes" / name).mkdir(parents=True)
        for i in range(24 - 3 * c):
            rate = (16000, 22050, 44100)[i % 3]
            t = np.arange(int(rate * rng.uniform(0.8, 5))) / rate
            hz = 200 * 1.7**c * (1 + 0.05 * rng.standard_normal() + 0.1 * np.sin(2 * np.pi * t))
            envelope = (np.sin(2 * np.pi * (0.5 + 0.3 * c) * t + rng.uniform(0, 6)) > 0).astype(float)
            wave = 0.3 * envelope * np.sin(2 * np.pi * np.cumsum(hz) / rate) + 0.05 * rng.standard_normal(len(t))
            path = f"classes/{name}/{name}{i}.{'flac' if i % 2 else 'wav'}"
            sf.write(folder / path, wave, rate)
            also = "abcdef"[(c + 1 + i % 3) % 6]
            rows.append([path, f"{name};{also}" if i % 4 == 0 else name, "abcdef"[(c + 4) % 6] if i % 5 == 0 else ""])
    (folder / "classes" / "a" / "broken.wav").write_bytes(b"RIFF nothing")
    with open(folder / "several.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "secondary_labels"], *rows])
    long = np.concatenate([sf.read(folder / row[0])[0][:40000] for row in rows[::7]])
    (folder / "long").mkdir()
    sf.write(folder / "long" / "long.wav", long, 22050)
    sf.write(folder / "long" / "short.flac", long[:9000], 22050)


def run_program(source, out):
    """Run the program of `source` in the new folder `out`."""
    out.mkdir(parents=True)
    write_recordings(out / "data")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}

    def start(*command):
        print("+", *command, flush=True)
        return subprocess.Popen([sys.executable, source / command[0], *map(str, command[1:])], cwd=out, env=environment)

    def run(*command):
        if start(*command).wait():
            sys.exit(f"failed: {command}")

    common = ["--cache-dir", "cache"]
    train = ["train.py", "--data", "data/classes", *SMALL, *AUGMENTED, *common]
    run(*train, "--run-dir", "whole")
    killed = start(*train, "--run-dir", "killed")
    steps = out / "killed" / "steps.csv"
    while killed.poll() is None and not (steps.exists() and steps.read_text().count("\n") > 9):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    run("train.py", "--resume", "--run-dir", "killed")
    run("train.py", "--data", "data/several.csv", *SMALL, *MULTI_LABEL, *common, "--run-dir", "several")
    run("evaluate.py", "--ckpt", "whole/best.pt", "--amp", "off", "--split", "val", "--out", "val")
    run("evaluate.py", "--ckpt", "several/best.pt", "--amp", "off", "--out", "several-test")
    for name in ("whole", "several"):
        run("predict.py", "--ckpt", f"{name}/best.pt", "data/long", "--amp", "off", "--hop", "0.5", "--threshold", "0.2",
            "--format", "csv,jsonl,raven,audacity", "--embeddings", "--out", f"predictions-{name}")
        run("export.py", "--ckpt", f"{name}/best.pt", "--to", "hf")


def values(path):
    """The content of a result file as something that can be compared: {name: array, text or number}."""
    if path.suffix == ".pt":
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {f"{part}/{name}": value for part in ("model", "ema") for name, value in (state[part] or {}).items()}
        for i, moments in state["optimizer"]["state"].items():
            found |= {f"optimizer/{i}/{name}": value for name, value in moments.items()}
        return found | {"schedule": json.dumps(state["schedule"]), "calibration": json.dumps(state["calibration"])}
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {"/".join(map(str, [i, file[name].dtype])): file[name] for i, name in enumerate(file.files)}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file
        return load_file(path)
    if path.suffix == ".json":
        return {name: json.dumps(value) for name, value in json.loads(path.read_text()).items()}
    if path.suffix in (".csv", ".txt", ".jsonl"):
        rows = list(csv.reader(path.open(newline="")))
        timed = [i for i, name in enumerate(rows[0]) if name in ("seconds", "clips_per_second", "peak_memory_mb")
                 and path.name == "history.csv"] if rows else []
        return {f"line {n}": str([cell for i, cell in enumerate(row) if i not in timed]) for n, row in enumerate(rows)}
    return {}


def compare(a, b):
    """Print every file that differs -> the number of them."""
    n_same, different = 0, []
    wanted = [path for path in sorted(a.rglob("*")) if path.is_file() and values_matter(path.relative_to(a))]
    for path in wanted:
        name = path.relative_to(a)
        other = next((candidate for candidate in (b / name, (b / name).with_name(RENAMED.get(name.name, name.name)))
                      if candidate.exists()), None)
        if other is None:
            different.append(f"{name}: missing")
            continue
        one, two = values(path), values(other)
        unequal = [key for key in one.keys() | two.keys() if key not in one or key not in two or not equal(one[key], two[key])]
        n_same += not unequal
        if unequal:
            key = sorted(unequal)[0]
            different.append(f"{name}: {len(unequal)} of {len(one)} values differ, such as {key}:\n"
                             f"    {str(one.get(key))[:200]}\n    {str(two.get(key))[:200]}")
    print("\n".join(different))
    print(f"{n_same} of {len(wanted)} files are equal")
    return len(different)


def values_matter(name):
    skipped = {"data", "cache"} & set(name.parts) or {"parts"} & set(name.parts)
    return not skipped and name.name not in ("run.json", "settings.json", "config.json", "preprocessor_config.json") and (
        name.suffix in (".pt", ".npz", ".safetensors", ".json", ".csv", ".txt", ".jsonl"))


def equal(one, two):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        return one.shape == two.shape and np.array_equal(one, two, equal_nan=one.dtype.kind == "f")
    return type(one) is type(two) and one == two


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
