"""The demo with and without its recordings that hold none of the classes.

    python experiments/demo_negatives.py --out demo_negatives --seeds 0,1,2 --jobs 2

Each run is `train.py --seed S`, on the demo (with) or on its class folders alone (without), with
the demo's recipe. Both are tested on the same clips, and on the soundscape of the test of the run
with negatives. Prints a table of the accuracy and of the false alarms per hour at equal recall, and
writes it to results/.
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
from core.run.checkpoint import load_checkpoint
from data.demo import CLASSES, NOISE, write_demo
from data.manifest import Manifest
from metrics.false_alarms import false_alarms_at_recall

RECALLS = (0.9, 0.8)
N_BOOT = 2000


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
    seeds = args.seeds.split(",")
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(args, *job), [
            (arm, data, seed) for seed in seeds for arm, data in (("with", demo),
                                                                  ("without", alone))]))
    report(args.out, seeds)


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
                    "--negatives", str((ROOT / "demo_data" / NOISE).resolve()),
                    "--out", str((folder / "all_noise").resolve())],
                   cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def load(folder, test_recordings):
    """(scores and labels of the test clips, scores and recording of the soundscape's windows)."""
    arrays = dict(np.load(folder / "all_noise" / "scores.npz"))
    with open(folder / "all_noise" / "predictions.csv", newline="", encoding="utf-8") as file:
        names = [Path(row["path"]).name for row in csv.DictReader(file)]
    labelled = arrays["labels"] >= 0
    tested = ~labelled & np.isin(names, test_recordings)
    return (arrays["scores"][labelled], arrays["labels"][labelled], arrays["scores"][tested],
            np.array(names)[tested])


def report(out, seeds):
    lines = ["| seed | arm | accuracy | " + " | ".join(
        f"false alarms per hour at recall {recall:.0%}" for recall in RECALLS) + " |",
        "|---|---|---|" + "---|" * len(RECALLS)]
    arms = {}
    for seed in seeds:
        checkpoint = load_checkpoint(out / f"with-{seed}" / "best.pt")
        manifest = Manifest.from_dict(checkpoint["manifest"])
        test = manifest.rows("test")
        recordings = sorted({Path(manifest.paths[row]).name
                             for row in test[manifest.is_negative[test]]})
        for arm in ("without", "with"):
            folder = out / f"{arm}-{seed}"
            arms[arm, seed] = load(folder, recordings)
            metrics = json.loads((folder / "all_noise" / "metrics.json").read_text())
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
