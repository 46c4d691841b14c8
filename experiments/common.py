"""Run every arm of a study on every fold through train.py.

A finished run is not repeated; an interrupted one is resumed. The table and the picture are made in
`summary.py`. What the studies need of train.py is imported here and nowhere else.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from summary import write_summary

import train
from core.exits import run_script
from util import csv_rows

WORK, RESULTS = HERE / "work", HERE / "results"
START = WORK / "pretrained" / "best.pt"  # written by pretrain.py
SMALL = ["--dim", "128", "--depth", "4", "--heads", "4"]  # 0.9M parameters: minutes on two cores


@dataclass
class RunResult:
    """What a study needs to know of a finished run."""

    history: dict[str, np.ndarray]  # column of history.csv -> (epochs,)
    metrics: dict  # test/metrics.json
    correct: dict[tuple[str, str], bool]  # (path, start) of a test clip -> predicted correctly


def study_parser(docstring: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that every study takes."""
    parser = argparse.ArgumentParser(description=docstring.split("\n")[0])
    add = parser.add_argument
    add("--data", default=str(HERE.parent.parent / "shared" / "esc10"),
        help="folder laid out like ESC-50")
    add("--weights", default=str(START),
        help="initial weights of every arm: a file, audioset, imagenet or none (default: the "
        "checkpoint that pretrain.py writes)")
    add("--size", default="", help="tiny, small or base (default: the small model of pretrain.py)")
    add("--folds", type=int, nargs="+", default=[1, 2, 3],
        help="run each arm on each of these folds; the seed is the fold")
    add("--epochs", type=int, default=15)
    add("--jobs", type=int, default=1,
        help="runs at a time, which share the CPU threads; with a small model on two cores, "
        "2 is 1.8 times as fast as 1")
    return parser


def rates(args: argparse.Namespace) -> list:
    """Return flags that suit the weights of pretrain.py: enough training within 15 epochs.

    A backbone learning rate of 5e-4 and a step every 4 clips. For other weights, no flags.
    """
    if args.weights == str(START):
        return ["--lr-backbone", 5e-4, "--effective-batch", 4]
    return []


def study(name, claim, arms, args, extra=(), data=None) -> None:
    """Run every arm on every fold; write results/<name>.md and results/<name>.png.

    arms: name -> flags of train.py, or (flags, patch). patch: a function that returns a context
    manager; it changes the program while the arm runs. --weights among the flags replaces
    args.weights. extra: flags for all arms. data(args, fold): the flags that select the recordings
    of a fold, by default args.data and --fold.
    """
    if not Path(args.weights).exists() and args.weights not in ("none", "audioset", "imagenet"):
        sys.exit(f"error: --weights {args.weights}: no such file; run python "
                 "experiments/pretrain.py, or give another --weights")
    started = time.perf_counter()
    runs = {}
    for fold in args.folds:
        source = data(args, fold) if data else ["--data", args.data, "--fold", fold]
        for arm, flags in arms.items():
            flags, patch = flags if isinstance(flags, tuple) else (flags, None)
            folder = WORK / name / (re.sub(r"\W+", "_", arm) + f"-{fold}")
            flags = [*source, *common_flags(args, fold), *extra, *flags]
            runs[arm, fold] = (folder, flags, patch)

    results = {arm: [] for arm in arms}
    for (arm, fold), result in run_all(runs, args.jobs):
        results[arm].append(result)
        print(f"{name}: {arm}, fold {fold}: {result.metrics['accuracy']:.3f}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    write_summary(RESULTS / name, claim, results, args)
    minutes = (time.perf_counter() - started) / 60
    print(f"{name}: {minutes:.0f} min; written: {RESULTS / name}.md and .png")


def common_flags(args, fold) -> list:
    size = ["--size", args.size] if args.size else SMALL
    return [
        "--seed", fold, "--weights", args.weights, *size, "--epochs", args.epochs,
        "--patience", args.epochs, "--batch-size", 4, "--on-divergence", "warn",
    ]


def run_all(runs, jobs):
    """Yield (key, RunResult) for key -> (folder, flags, patch), in order.

    One job runs in this process, several in processes of their own that share the CPU threads.
    """
    if jobs == 1:
        for key, run in runs.items():
            yield key, run_once(*run)
        return
    n_threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (n_threads,),
        max_tasks_per_child=1)
    with pool:
        futures = {key: pool.submit(run_once, *run) for key, run in runs.items()}
        try:
            for key, future in futures.items():
                yield key, future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_once(folder: Path, flags: list, patch=None) -> RunResult:
    """Train in `folder`, unless a finished run is there, and read its results."""
    if not (folder / "test" / "metrics.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(open(folder.with_suffix(".log"), "a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(log))
            if patch:
                stack.enter_context(patch())
            code = run_train([*map(str, flags), "--run-dir", str(folder), "--resume", "auto"])
        if code:
            sys.exit(code)
    return read_result(folder)


def run_train(argv: list[str]) -> int:
    """Run train.py in this process -> exit code. An error prints one line, as in the script."""
    try:
        run_script(lambda: train.main(argv))
    except SystemExit as ending:
        return ending.code


def read_result(folder: Path) -> RunResult:
    """Read history, test metrics and predictions of a finished run."""
    history = read_rows(folder / "history.csv")
    predictions = read_rows(folder / "test" / "predictions.csv")
    return RunResult(
        {column: np.array([float(row[column]) for row in history]) for column in history[0]},
        json.loads((folder / "test" / "metrics.json").read_text(encoding="utf-8")),
        {(row["path"], row["start"]): row["label"] == row["prediction"] for row in predictions},
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv_rows(file))
