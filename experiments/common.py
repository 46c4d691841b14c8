"""What the studies share: arms run one after the other through train.py, resumed where they stopped, tabled and drawn."""
import argparse
import contextlib
import csv
import json
import platform
import re
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

import train
from report.style import COLOURS, picture

WORK, RESULTS = HERE / "work", HERE / "results"
SMALL = ["--dim", "128", "--depth", "4", "--heads", "4"]  # 0.9M parameters: a study ends on two cores in minutes
START = WORK / "pretrained" / "best.pt"


def parser(text):
    """The flags that every study takes."""
    found = argparse.ArgumentParser(description=text.split("\n")[0])
    found.add_argument("--data", default=str(HERE.parent.parent / "shared" / "esc10"), help="folder laid out like ESC-50")
    found.add_argument("--weights", default=str(START), help="start of every arm: the one that pretrain.py makes, audioset, or "
                       "a file")
    found.add_argument("--size", default="", help="tiny, small or base; by default the small model of pretrain.py")
    found.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3], help="a run of each arm on each; the seed is the fold")
    found.add_argument("--epochs", type=int, default=20)
    return found


def one_run(folder, flags, prepare=None):
    """train.py with these flags in `folder`, unless it is done there -> (history {column: (epochs,)}, test metrics)."""
    done = folder / "test" / "metrics.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
                prepare() if prepare else contextlib.nullcontext():
            try:
                code = train.main([*map(str, flags), "--run-dir", str(folder), "--resume", "auto"])
            except train.INPUT_ERRORS as error:
                code = train.fail(error)
            except train.NUMBERS_ERRORS as error:
                code = train.fail(error, 3)
        if code:
            sys.exit(code)
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}, json.loads(done.read_text())


def study(name, claim, arms, args, extra=(), data=lambda args, fold: ["--data", args.data, "--fold", fold]):
    """Run every arm (name -> flags, or (flags, prepare)) on every fold, and write results/<name>.md and .png.

    extra: flags of all arms; data(args, fold): the flags that name the recordings of a fold.
    """
    if not Path(args.weights).exists() and args.weights not in ("none", "audioset", "imagenet"):
        sys.exit(f"error: {args.weights}: not there; make it with python experiments/pretrain.py, or give --weights")
    size = ["--size", args.size] if args.size else SMALL
    started, found = time.perf_counter(), {}
    for arm, flags in arms.items():
        flags, prepare = flags if isinstance(flags, tuple) else (flags, None)
        for fold in args.folds:
            base = [*data(args, fold), "--seed", fold, "--weights", args.weights, *size, "--epochs", args.epochs,
                    "--patience", args.epochs, "--batch-size", 4, "--on-divergence", "warn", *extra]
            found.setdefault(arm, []).append(one_run(WORK / name / (re.sub(r"\W+", "_", arm) + f"-{fold}"), [*base, *flags], prepare))
            print(f"{name}: {arm}, fold {fold}: {found[arm][-1][1]['accuracy']:.3f}", flush=True)
    minutes = sum(float(history["seconds"].sum()) for runs in found.values() for history, _ in runs) / 60
    _write(name, claim, found, args, minutes)
    print(f"{name}: {(time.perf_counter() - started) / 60:.0f} min; written: {RESULTS / name}.md and .png")


def _write(name, claim, found, args, minutes):
    RESULTS.mkdir(exist_ok=True)
    lines = [f"**Claim.** {claim}", "", "| arm | test accuracy by fold | mean | macro-F1, mean | validation accuracy after epoch "
             "1, 5, last | b - a, mean over folds (95% t interval) |", "|---|---|---|---|---|---|"]
    first = None
    for arm, runs in found.items():
        accuracy = np.array([metrics["accuracy"] for _, metrics in runs])
        f1 = np.mean([metrics["macro_f1"] for _, metrics in runs])
        val = np.mean([[history["val_acc"][min(i, len(history["val_acc"]) - 1)] for i in (0, 4, -1)] for history, _ in runs], axis=0)
        first = accuracy if first is None else first
        lines.append(f"| {arm} | {', '.join(f'{100 * a:.1f}' for a in accuracy)} | {100 * accuracy.mean():.1f} | {f1:.3f} | "
                     f"{', '.join(f'{100 * v:.1f}' for v in val)} | {_interval(accuracy - first)} |")
    lines += ["", f"{len(args.folds)} folds of {Path(args.data).name}, one seed each, {args.epochs} epochs, start "
              f"{Path(args.weights).name if Path(args.weights).exists() else args.weights}, {minutes:.0f} min of training on "
              f"{torch.get_num_threads()} threads ({platform.machine()}); b - a against the first arm, in points.", "",
              f"![validation accuracy by epoch]({name}.png)"]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with picture(RESULTS / f"{name}.png", (7.5, 4), layout="constrained") as figure:
        ax = figure.subplots()
        for (arm, runs), colour in zip(found.items(), COLOURS * 2, strict=False):
            curves = np.stack([history["val_acc"] for history, _ in runs])
            epochs = np.arange(1, curves.shape[1] + 1)
            ax.plot(epochs, curves.mean(0), color=colour, label=arm)
            ax.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)
        ax.set_title(f"validation accuracy, mean and range over {len(args.folds)} folds")
        ax.set_xlabel("epoch")
        ax.grid(axis="y")
        ax.legend(frameon=False)


def _interval(differences):
    from scipy import stats
    if not differences.any():
        return "-"
    if len(differences) < 2:
        return f"{100 * differences[0]:+.1f}"
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return f"{100 * differences.mean():+.1f} ({100 * (differences.mean() - half):+.1f} to {100 * (differences.mean() + half):+.1f})"
