"""What a run's files say, read and put into words."""
import csv
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .markup import clean
from .style import count

CLIPS = {"test": "test clip", "val": "validation clip", "train": "training clip", "all": "clip"}  # what a split's are called
MONITORS = {"val_acc": "validation accuracy", "val_macro_f1": "validation macro-F1", "val_map": "validation mAP",
            "val_loss": "validation loss"}
EVENTS = {"skipped": "Optimiser steps were skipped: loss or gradients were not finite",
          "diverged": "Validation fell away from its best", "rollback": "The run went back to its best weights",
          "unreadable": "Recordings turned out to be unreadable during the run", "memory": "Memory ran out on the way",
          "cache": "The cache of decoded audio could not be kept"}
MANY = 8  # names listed in one sentence


@dataclass
class Run:
    """The files of a run folder and of a folder of results; what is not there is empty."""
    run: dict  # run.json
    history: dict  # column -> (epochs,)
    steps: dict  # column -> (steps,)
    events: list  # dicts
    bad_files: list  # dicts with path, reason
    train_counts: np.ndarray | None  # (classes,)
    metrics: dict
    classes: list  # dicts, the rows of per_class.csv
    clips: list  # dicts, the rows of predictions.csv
    scores: np.ndarray  # (clips, classes) as the model gives them
    labels: np.ndarray  # (clips,) class indices, or (clips, classes) of 1, 0 and nan where clips may have several
    said: np.ndarray  # (clips, classes) bool: the answers, one a clip unless clips may have several labels

    @property
    def names(self):
        return [row["class"] for row in self.classes]

    @property
    def several(self):
        return self.labels.ndim == 2

    @property
    def truth(self):
        """(clips, classes) bool"""
        return self.labels == 1 if self.several else self.labels[:, None] == np.arange(len(self.classes))

    @property
    def best(self):
        """Place in the history of the best epoch, by what the run monitored and the later one of equal values; None
        without one."""
        column = self.run.get("flags", {}).get("monitor", "val_acc")
        values = self.history.get(column, np.zeros(0))
        if not np.isfinite(values).any():
            return None
        values = -values if column == "val_loss" else values
        return int(np.flatnonzero(values == np.nanmax(np.where(np.isfinite(values), values, np.nan)))[-1])


def read_run(run_dir, results):
    """Run of the files in a run folder, which may lack any of them, and in a folder of results."""
    run_dir, results = Path(run_dir), Path(results)
    with np.load(results / "scores.npz") as file:
        scores, labels = file["scores"], file["labels"]
        said = scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1]) if labels.ndim == 1 else file["said"] & ~np.isnan(labels)
    classes = _rows(results / "per_class.csv")
    run = json.loads((run_dir / "run.json").read_text(encoding="utf-8")) if (run_dir / "run.json").exists() else {}
    counts = None
    trained = Counter(name for row in _rows(run_dir / "split.csv") if row["split"] == "train" for name in (
        row["label"].split("; ") if labels.ndim == 2 else [row["label"]]))
    if trained:
        counts = np.array([trained[row["class"]] for row in classes])
    return Run(run, _columns(run_dir / "history.csv"), _columns(run_dir / "steps.csv"), _rows(run_dir / "events.csv"),
               _rows(run_dir / "bad_files.csv"), counts, json.loads((results / "metrics.json").read_text(encoding="utf-8")),
               classes, _rows(results / "predictions.csv"), scores, labels, said)


def _rows(path):
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def _columns(path):
    """A CSV of numbers -> {column: (n,)}. A line that is not whole, the last one of a killed run, is left out."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    names = lines[0].strip().split(",")
    lines = [line for line in lines[1:-1] if line.count(",") == len(names) - 1]
    values = np.loadtxt(lines, delimiter=",", ndmin=2) if lines else np.zeros((0, len(names)))
    return dict(zip(names, values.T, strict=True))


def wilson(hits, n, z=1.959964):
    """95% interval of a share (E. B. Wilson, 1927) -> (low, high); (0, 1) for no clips."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, z * z
    middle, half = share + z2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, float((middle - half) / (1 + z2 / n))), min(1.0, float((middle + half) / (1 + z2 / n)))


def some(names, most=MANY):
    """'a, b and 3 more'"""
    names = [clean(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def headline(run):
    m, clips = run.metrics, count(run.metrics["n"], CLIPS[run.metrics["split"]])
    low, high = m["accuracy_ci95"]
    interval = (f"95% interval {100 * low:.1f} to {high:.1%}, by bootstrap over the clips. Always giving the most frequent class "
                f"would be right in {_most_frequent(run):.1%}.")
    if not run.several:
        return f"{m['accuracy']:.1%} of {clips} are named right.", interval
    hits, said, held = (part.sum() for part in (run.said & run.truth, run.said, run.truth))
    return (f"Of the {count(int(held), 'label')} of {clips} {hits / held:.1%} are found, and {hits / max(1, said):.1%} of the labels "
            "given are right.",
            f"The class it is surest of is one of the clip's labels in {m['accuracy']:.1%}, {interval}")


def _most_frequent(run):
    return float(run.truth.mean(axis=0).max())


def training(run, epoch=None):
    """A paragraph on the run: best epoch, why it ended, the gap between training and validation. epoch: that of the weights
    that are judged, by default the best."""
    if run.best is None:
        return ["The run's own files (history.csv) do not lie beside this checkpoint, so there is nothing to say about its training."]
    flags, h, best = run.run.get("flags", {}), run.history, run.best
    monitor, epochs = flags.get("monitor", "val_acc"), len(h["epoch"])
    equal = int((h[monitor] == h[monitor][best]).sum())
    said = [f"Of {count(epochs, 'epoch')} number {h['epoch'][best]:.0f} was best, by {MONITORS[monitor]} "
            f"({h[monitor][best]:.3f}" + f", the last of {equal} equal ones" * (equal > 1) + "); " + ("its weights are what is judged here." if epoch in (None, h["epoch"][best]) else
                                             f"what is judged here are the weights after epoch {epoch}.")]
    most = flags.get("epochs", epochs)
    if epochs < most:
        stale = epochs - 1 - int(np.flatnonzero(h[monitor] == h[monitor][best])[0])
        early = stale >= flags.get("patience", most)
        said.append(f"The run stopped early, after {count(stale, 'epoch')} without a better one." if early else
                    f"The run was to have {most} epochs and ended before that.")
    elif best == epochs - 1 and epochs > 1 and h[monitor][best] not in h[monitor][:best]:
        said.append("It was still getting better when it ended: more epochs (--epochs) may help.")
    gap = h["train_acc"][best] - h["val_acc"][best] if h["train_loss"][best] < h["val_loss"][best] else -1.0
    said.append(f"There, {h['train_acc'][best]:.1%} of the training clips and {h['val_acc'][best]:.1%} of the validation clips "
                f"were right, losses {h['train_loss'][best]:.3f} and {h['val_loss'][best]:.3f}: " + _gap(gap))
    if any(flags.get(name) for name in ("mixup_alpha", "freq_mask", "time_mask", "patchout", "noise_p", "drop_path", "filter_p")):
        said.append("Training figures are of clips made harder by augmentation, while the epoch went on; without it they would "
                    "be higher.")
    return said


def _gap(gap):
    if gap > 0.1:
        return (f"a gap of {100 * gap:.0f} points, so it knows its training clips better than others; more recordings or "
                "more augmentation narrow it.")
    if gap < -0.02:
        return "no gap that would speak of overfitting."
    return f"a gap of {100 * max(0, gap):.0f} points, which is small."


def findings(run):
    """([(what, details)] of what was odd, [what] of that which was looked for and not found)."""
    odd, absent = [], []

    def check(found, what, details=(), otherwise=None):
        if found:
            odd.append((what, list(details)))
        elif otherwise:
            absent.append(otherwise)

    m, names = run.metrics, run.names
    _training_findings(run, check)
    notes = run.run.get("data", {}).get("notes")
    leaks = [note.removeprefix("LEAK: ") for note in notes or [] if note.startswith("LEAK: ")]
    twice = [leak for leak in leaks if "two labels" in leak]
    leaks = [leak for leak in leaks if leak not in twice]
    check(leaks, "Leakage between the splits: figures may be too good", leaks,
          "leakage between the splits" if notes is not None else None)
    check(twice, "Equal recordings with two labels", twice)
    check(run.bad_files, f"{count(len(run.bad_files), 'recording')} could not be read and took no part (bad_files.csv)",
          [f"{row['path']}: {row['reason']}" for row in run.bad_files[:5]], "bad files" if run.run else None)
    check(m["unreadable"], f"{count(m['unreadable'], 'clip')} to judge by could not be read and "
          f"{'is' if m['unreadable'] == 1 else 'are'} left out")

    support, predicted, hits = (part.sum(axis=0) for part in (run.truth, run.said, run.truth & run.said))
    never = [names[i] for i in np.flatnonzero((predicted == 0) & (support > 0))]
    check(never, f"{count(len(never), 'class', 'classes')} never given as an answer: {some(never)}",
          otherwise="classes never predicted")
    missed = [names[i] for i in np.flatnonzero((hits == 0) & (predicted > 0) & (support > 0))]
    check(missed, f"{count(len(missed), 'class', 'classes')} given as an answer, but never rightly: {some(missed)}")
    empty = [names[i] for i in np.flatnonzero(support == 0)]
    check(empty, f"{count(len(empty), 'class', 'classes')} without a clip to judge by: {some(empty)}")
    low, high = m["accuracy_ci95"]
    check(low <= _most_frequent(run), "Not surely better than always answering the most frequent class",
          otherwise="an accuracy no better than guessing")
    if run.best is not None and m["split"] == "test":
        val = run.history["val_acc"][run.best]
        check(not low <= val <= high, f"Validation accuracy ({val:.1%}) lies outside of the test's interval: the two sets differ in kind, "
              "or the best epoch was picked by luck", otherwise="validation and test far apart")
    check(high - low > 0.15, f"Few clips to judge by: one is worth {1 / m['n']:.1%}, and the interval is {100 * (high - low):.0f} "
          "points wide")
    confidence = float(np.mean([float(clip["confidence"]) for clip in run.clips]))
    check(not run.several and abs(confidence - m["accuracy"]) > 0.1, f"Its confidence is off: {confidence:.1%} on average, while "
          f"{m['accuracy']:.1%} are right; see Confidence", otherwise=None if run.several else "misplaced confidence")
    return odd, absent


def _training_findings(run, check):
    if not run.history:
        return
    by_kind = defaultdict(list)
    for event in run.events:
        by_kind[event["event"]].append(event)
    for kind in ("diverged", "rollback", "skipped", "unreadable", "memory", "cache", *sorted(set(by_kind) - set(EVENTS))):
        found = by_kind.get(kind, [])
        times = f", {count(len(found), 'time')}" if len(found) > 1 else ""
        check(found, EVENTS.get(kind, kind) + times,
              [f"step {event['step']}, epoch {event['epoch']}: {event['detail']}" for event in found[:5]],
              {"diverged": "divergence", "skipped": "skipped steps"}.get(kind))
    lrs = [run.steps.get(name, np.zeros(0)) for name in ("lr_backbone", "lr_head")]
    both = (lrs[0] > 0) & (lrs[1] > 0) if len(lrs[0]) else np.zeros(0, bool)
    if both.any():
        ratio = lrs[1][both] / lrs[0][both]
        check(not np.allclose(ratio, ratio[-1], rtol=1e-6), f"The ratio of the head's learning rate to the backbone's changes, from "
              f"{ratio[0]:.3g} to {ratio[-1]:.3g}: one of them was not trained at its own rate",
              otherwise="a changing ratio of the learning rates")
