"""Train on short clips and test on them and on recordings made of them: --short.

    OMP_NUM_THREADS=1 python experiments/short.py

The events are the loudest 0.3 to 1.5 s of ESC-10's dogs, roosters, crying babies, sneezes and
clocks. Each seed has another fold of ESC-10 for the test. Every arm trains a small model on the
same events from random weights. The recordings are 30 s long, with test events at known times in
silence, in quiet noise, in rain or in sea waves (rain and waves 10 dB below the event). Two arms
mix in background (--noise-dir) of other kinds, fires and helicopters, in half of the clips.

Writes results/short-EPOCHS.csv, a row per run and background, and results/short-EPOCHS.md with the
means. A study that was stopped continues if it is started again.
"""
import argparse
import contextlib
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from common import HERE, RESULTS, WORK, read_rows, run_train

from core.device.precision import choose_precision
from core.run.checkpoint import load_checkpoint
from core.scoring import restore, window_scores
from data.audio import read
from data.stream import Windows, read_windows

EVENTS = ("clock_tick", "crying_baby", "dog", "rooster", "sneezing")
RATE, SECONDS, WINDOW, HOP = 22050, 30, 2.0, 0.5  # Hz and seconds
GAP = 5.0  # seconds between the starts of two events, so that windows without an event are left
BACKGROUNDS = {"silence": None, "noise": 30.0, "rain": 10.0, "sea_waves": 10.0}  # dB below events
TRAINING_BACKGROUNDS = ("crackling_fire", "helicopter")
NOISE = ["--noise-p", 0.5, "--noise-snr", "0,30"]
ARMS = {
    "repeat": ["--short", "repeat"],
    "pad": ["--short", "pad"],
    "place": ["--short", "place"],
    "repeat + background": ["--short", "repeat", *NOISE],
    "place + background": ["--short", "place", *NOISE],
}
COLUMNS = ["seed", "arm", "background", "clip_accuracy", "clip_map", "ap", "false_alarms",
           "false_alarms_at_recall_50"]


def level(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wave))) + 1e-9)


def cut_event(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The event around the loudest 50 ms, 0.3 to 1.5 s long: until it is 25 dB quieter."""
    block = RATE // 20
    blocks = wave[:len(wave) // block * block].reshape(-1, block)
    decibels = 10 * np.log10(np.mean(np.square(blocks), axis=1) + 1e-10)
    first = last = int(decibels.argmax())
    quiet, longest = decibels.max() - 25, int(rng.integers(12, 31))  # blocks
    while last - first + 1 < longest:
        before = decibels[first - 1] if first else -np.inf
        after = decibels[last + 1] if last + 1 < len(decibels) else -np.inf
        if max(before, after) < quiet and last - first + 1 >= 6:
            break
        first, last = (first - 1, last) if before > after else (first, last + 1)
    event = wave[first * block:(last + 1) * block]
    return event * np.float32(0.1 / level(event))


def write_events(data: Path, folder: Path) -> list[dict]:
    """Cut one event from each recording -> rows with path, label, fold and group."""
    events = []
    for row in read_rows(data / "meta" / "esc50.csv"):
        if row["category"] in EVENTS:
            rng = np.random.default_rng(int(row["src_file"]))
            path = folder / "events" / Path(row["filename"]).with_suffix(".wav").name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                sf.write(path, cut_event(read(str(data / "audio" / row["filename"]), RATE), rng),
                         RATE, subtype="FLOAT")
            events.append({"path": str(path), "label": row["category"], "fold": int(row["fold"]),
                           "group": row["src_file"]})
    return events


def write_table(events: list[dict], seed: int, path: Path) -> None:
    """The fold of the seed is the test, the next one the validation, the others are trained."""
    split = {seed: "test", seed % 5 + 1: "val"}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "group"])
        for event in events:
            writer.writerow([event["path"], event["label"], split.get(event["fold"], "train"),
                             event["group"]])


def copy_backgrounds(data: Path, folder: Path) -> None:
    """Copy the recordings that are mixed in by the arms with a background; none is in a test."""
    folder.mkdir(exist_ok=True)
    for row in read_rows(data / "meta" / "esc50.csv"):
        if row["category"] in TRAINING_BACKGROUNDS:
            shutil.copy(data / "audio" / row["filename"], folder)


def background_waves(data: Path, name: str, fold: int) -> list[np.ndarray]:
    return [read(str(data / "audio" / row["filename"]), RATE)
            for row in read_rows(data / "meta" / "esc50.csv")
            if row["category"] == name and int(row["fold"]) == fold]


def write_recordings(data: Path, events: list[dict], seed: int, folder: Path) -> list[dict]:
    """Recordings of the test events -> {path, background, events: [(start, end, class)]}."""
    test = [event for event in events if event["fold"] == seed]
    starts = np.arange(1.0, SECONDS - 2, GAP)
    folder.mkdir(parents=True, exist_ok=True)
    recordings = []
    for background, decibels in BACKGROUNDS.items():
        rng = np.random.default_rng(seed)  # the same events at the same times for each background
        waves = background_waves(data, background, seed)
        order = rng.permutation(len(test))
        for number, first in enumerate(range(0, len(test), len(starts))):
            wave, times = np.zeros(SECONDS * RATE, np.float32), []
            for start, i in zip(starts, order[first:first + len(starts)]):
                sound = read(test[i]["path"], RATE)
                begin = int((start + rng.uniform(0, 1.5)) * RATE)
                wave[begin:begin + len(sound)] += sound
                times.append((begin / RATE, (begin + len(sound)) / RATE, test[i]["label"]))
            if background == "noise":
                noise = np.random.default_rng((seed, number)).standard_normal(len(wave))
            elif waves:
                noise = np.resize(waves[number % len(waves)], len(wave))
            if decibels is not None:
                wave += (noise * (0.1 / level(noise) * 10 ** (-decibels / 20))).astype(np.float32)
            path = folder / f"{background}-{number}.wav"
            sf.write(path, wave, RATE, subtype="FLOAT")
            recordings.append({"path": str(path), "background": background, "events": times})
    return recordings


def targets_of(start: float, end: float, events, classes) -> np.ndarray | None:
    """(classes,) 1 if half of an event is in the window; None if only a smaller part is."""
    target = np.zeros(len(classes))
    for begin, finish, name in events:
        inside = min(end, finish) - max(start, begin)
        if inside >= (finish - begin) / 2:
            target[classes.index(name)] = 1
        elif inside > 0:
            return None
    return target


def score_recordings(checkpoint, recordings: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets of all windows, each (windows, classes)."""
    precision = choose_precision(torch.device("cpu"), "off")
    model, frontend = restore(checkpoint, torch.device("cpu"))
    model.eval()
    n_samples = checkpoint["clip"]["samples"]
    windows = Windows(RATE, n_samples, round(HOP * RATE), checkpoint["clip"]["short"])
    waves, targets = [], []
    for recording in recordings:
        for start, end, wave in read_windows(recording["path"], windows):
            target = targets_of(start / RATE, end / RATE, recording["events"],
                                list(checkpoint["classes"]))
            if target is not None:
                waves.append(wave)
                targets.append(target)
    scores = [window_scores(model, frontend, torch.from_numpy(np.stack(waves[i:i + 32])),
                            precision, True)[1] for i in range(0, len(waves), 32)]
    return np.concatenate(scores), np.stack(targets)


def average_precision(scores: np.ndarray, target: np.ndarray) -> float:
    """Of one class: the mean precision at the positives (n,), ties in the worst order."""
    order = np.lexsort((target, -scores))
    positive = target[order] == 1
    return float((np.cumsum(positive) / np.arange(1, len(positive) + 1))[positive].mean())


def measures(scores: np.ndarray, targets: np.ndarray) -> dict:
    """AP: mean over classes. False alarms: share of the windows without an event."""
    ap = [average_precision(scores[:, c], targets[:, c]) for c in range(targets.shape[1])]
    empty = targets.sum(axis=1) == 0
    highest = scores.max(axis=1)
    at_recall = np.quantile(scores[targets == 1], 0.5)  # half of the positives reach it
    return {"ap": float(np.mean(ap)), "false_alarms": float((highest[empty] >= 0.5).mean()),
            "false_alarms_at_recall_50": float((highest[empty] >= at_recall).mean())}


def run_arm(arm: str, seed: int, table: Path, args) -> Path:
    folder = table.parent / f"{arm.replace(' + ', '-')}-{seed}"
    if not (folder / "test" / "metrics.json").exists():
        flags = ["--data", table, "--seed", seed, "--weights", "none", "--dim", 64, "--depth", 3,
                 "--heads", 4, "--seconds", WINDOW, "--epochs", args.epochs, "--patience",
                 args.epochs, "--batch-size", 8, "--effective-batch", 8, "--lr-backbone", 1e-3,
                 "--lr-head", 1e-3, "--loss", "bce", "--warmup-epochs", 1, "--cache", "ram",
                 "--on-divergence", "warn", "--device", "cpu", "--amp", "off", *ARMS[arm]]
        if "background" in arm:
            flags += ["--noise-dir", table.parent / "backgrounds"]
        with open(folder.parent / f"{folder.name}.log", "w", encoding="utf-8") as log, \
                contextlib.redirect_stdout(log):
            code = run_train([*map(str, flags), "--run-dir", str(folder), "--resume", "auto"])
        if code:
            raise SystemExit(code)
    return folder


def summary(rows: list[dict]) -> str:
    """Means and standard deviations over the seeds, and the differences paired by seed."""
    lines = [
        "# --short on clips and on recordings made of them", "",
        "Mean (standard deviation) over seeds; in brackets with a sign: the difference from",
        "`repeat`, its mean and its range over the seeds. All backgrounds count alike.", "",
        "| arm | seeds | background | clips: mAP | windows: mAP | false alarms at 0.5 | "
        "false alarms at recall 50% |", "|---|---|---|---|---|---|---|"]
    for arm in ARMS:
        for background in ("all", *BACKGROUNDS):
            by_seed = {name: seed_means(rows, name, background) for name in (arm, "repeat")}
            seeds = sorted(by_seed[arm])
            if not seeds:
                continue
            cells = []
            for column in ("clip_map", "ap", "false_alarms", "false_alarms_at_recall_50"):
                values = np.array([by_seed[arm][seed][column] for seed in seeds])
                cell = f"{values.mean():.3f} ({values.std(ddof=1 if len(values) > 1 else 0):.3f})"
                paired = [by_seed[arm][seed][column] - by_seed["repeat"][seed][column]
                          for seed in seeds if seed in by_seed["repeat"]]
                if arm != "repeat" and paired:
                    cell += (f" [{np.mean(paired):+.3f}, {min(paired):+.3f} to "
                             f"{max(paired):+.3f}]")
                cells.append(cell)
            lines.append(f"| {arm} | {len(seeds)} | {background} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def seed_means(rows, arm, background) -> dict[int, dict[str, float]]:
    """Seed -> column -> mean over the backgrounds."""
    found = {}
    for row in rows:
        if row["arm"] == arm and background in ("all", row["background"]):
            found.setdefault(int(row["seed"]), []).append(row)
    return {seed: {column: float(np.mean([float(row[column]) for row in group]))
                   for column in COLUMNS[3:]} for seed, group in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(HERE.parent.parent / "shared" / "esc10"),
                        help="folder laid out like ESC-50")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="from 1 to 5")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    name = f"short-{args.epochs}"
    folder, data = WORK / name, Path(args.data)
    folder.mkdir(parents=True, exist_ok=True)
    events = write_events(data, folder)
    copy_backgrounds(data, folder / "backgrounds")
    results = RESULTS / f"{name}.csv"
    rows = read_rows(results) if results.exists() else []
    for seed in args.seeds:
        table = folder / f"events-{seed}.csv"
        write_table(events, seed, table)
        recordings = write_recordings(data, events, seed, folder / f"recordings-{seed}")
        for arm in args.arms:
            if any(row["arm"] == arm and int(row["seed"]) == seed for row in rows):
                continue
            run = run_arm(arm, seed, table, args)
            clips = json.loads((run / "test" / "metrics.json").read_text(encoding="utf-8"))
            checkpoint = load_checkpoint(run / "best.pt")
            for background in BACKGROUNDS:
                scored = score_recordings(checkpoint, [recording for recording in recordings
                                                       if recording["background"] == background])
                rows.append({"seed": seed, "arm": arm, "background": background,
                             "clip_accuracy": clips["accuracy"], "clip_map": clips["map"],
                             **measures(*scored)})
                print(rows[-1], flush=True)
            RESULTS.mkdir(exist_ok=True)
            with open(results, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            results.with_suffix(".md").write_text(summary(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
