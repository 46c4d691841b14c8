"""The demo with and without its recordings that hold none of the classes.

    python experiments/demo_negatives.py --out demo_negatives --seeds 0,1,2 --jobs 2

Each run is `train.py --seed S`, on the demo (with) or on its class folders alone (without), with
the demo's recipe. Both are tested on clips and soundscape of sites that neither has seen: 40 clips
of each class and an hour, since the demo's own test has too few clips to tell thresholds apart.
Prints a table of the accuracy and of the false alarms per hour at equal recall, and writes it to
results/.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data.demo import CLASSES, NOISE, synthesise, write_demo
from data.soundscape import RECORDINGS, synthesise_soundscape
from data.synthesis import write_wav
from metrics.false_alarms import false_alarms_at_recall

RECALLS = (0.9, 0.8)
N_BOOT = 1000
FRESH_CLIPS, FIRST_FRESH = 40, 30_001  # of each class, beyond those of the demo


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", default=None, help="default: the recipe's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    args = parser.parse_args()
    demo = write_demo(ROOT / "demo_data")
    alone = args.out / "classes_alone"
    alone.mkdir(parents=True, exist_ok=True)
    for name in CLASSES:
        if not (alone / name).exists():
            (alone / name).symlink_to(demo / name)
    write_fresh(args.out / "fresh")
    seeds = args.seeds.split(",")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(args, *job), [
            (arm, data, seed) for seed in seeds for arm, data in (("with", demo),
                                                                  ("without", alone))]))
    report(args.out, seeds)


def write_fresh(folder):
    """Clips and soundscape that are not in the demo."""
    for name in CLASSES:
        for index in range(FIRST_FRESH, FIRST_FRESH + FRESH_CLIPS):
            path = folder / name / f"{name}_{index}.wav"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_wav(path, synthesise(name, index))
    for index in range(RECORDINGS + 1, 2 * RECORDINGS + 1):
        path = folder / NOISE / f"noise_{index:04d}.wav"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_wav(path, synthesise_soundscape(index))


def run(args, arm, data, seed):
    """Train one arm, and test it on its clips and on the demo's soundscape."""
    folder = args.out / f"{arm}-{seed}"
    environment = os.environ | {"OMP_NUM_THREADS": "1" if args.jobs > 1 else "2"}
    words = [sys.executable, "train.py", "--data", str(data.resolve()), "--recipe", "demo",
             "--seed", seed, "--run-dir", str(folder.resolve()), "--warmup-epochs", "0",
             "--batch-size", "4", "--resume", "auto"]
    if args.epochs:
        words += ["--epochs", args.epochs, "--patience", args.epochs]
    subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "evaluate.py", "--ckpt", str((folder / "best.pt").resolve()),
                    "--data", str((args.out / "fresh").resolve()),
                    "--out", str((folder / "fresh").resolve())],
                   cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def load(folder):
    """(scores and labels of the clips, scores and recording of the soundscape's windows)."""
    arrays = dict(np.load(folder / "fresh" / "scores.npz"))
    with open(folder / "fresh" / "predictions.csv", newline="", encoding="utf-8") as file:
        names = np.array([Path(row["path"]).name for row in csv.DictReader(file)])
    labelled = arrays["labels"] >= 0
    return (arrays["scores"][labelled], arrays["labels"][labelled], arrays["scores"][~labelled],
            names[~labelled])


def report(out, seeds):
    lines = ["| seed | arm | accuracy | " + " | ".join(
        f"false alarms per hour at recall {recall:.0%}" for recall in RECALLS) + " |",
        "|---|---|---|" + "---|" * len(RECALLS)]
    arms = {}
    for seed in seeds:
        for arm in ("without", "with"):
            folder = out / f"{arm}-{seed}"
            arms[arm, seed] = load(folder)
            metrics = json.loads((folder / "fresh" / "metrics.json").read_text())
            cells = [f"{rate(arms[arm, seed], recall):.0f}" for recall in RECALLS]
            low, high = metrics["accuracy_ci95"]
            lines.append(f"| {seed} | {arm} negatives | {metrics['accuracy']:.1%} ({low:.1%} to "
                         f"{high:.1%}) | {' | '.join(cells)} |")
    for recall in RECALLS:
        value, low, high = ratio(arms, seeds, recall)
        lines.append(f"\nAt recall {recall:.0%} of every class: {value:.1f} times fewer false "
                     f"alarms with negatives (95% interval {low:.1f} to {high:.1f}; paired "
                     "bootstrap over clips, recordings and seeds)")
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "demo_negatives.md").write_text(text)
    print(text)


def rate(arm, recall):
    """False alarms per hour where every class keeps this recall."""
    scores, labels, negatives, _ = arm
    return false_alarms_at_recall(scores, labels, negatives, 4 / 3600, recall)["per_hour"]


def ratio(arms, seeds, recall):
    """How many times fewer alarms the arm with negatives has, and its 95% interval."""
    rng = np.random.default_rng(0)
    total = {arm: np.mean([rate(arms[arm, seed], recall) for seed in seeds])
             for arm in ("with", "without")}
    ratios = []
    for _ in range(N_BOOT):
        sums = {"with": 0.0, "without": 0.0}
        for seed in rng.choice(seeds, len(seeds)):
            recordings = np.unique(arms["with", seed][3])
            drawn = rng.choice(recordings, len(recordings))
            n_clips = len(arms["with", seed][1])
            clips = rng.integers(0, n_clips, n_clips)
            for arm, count in sums.items():
                scores, labels, negatives, names = arms[arm, seed]
                windows = np.concatenate([np.flatnonzero(names == name) for name in drawn])
                sums[arm] = count + rate((scores[clips], labels[clips], negatives[windows], None),
                                         recall)
        ratios.append(sums["without"] / max(sums["with"], 1e-9))
    low, high = np.percentile(ratios, (2.5, 97.5))
    return total["without"] / max(total["with"], 1e-9), low, high


if __name__ == "__main__":
    main()
