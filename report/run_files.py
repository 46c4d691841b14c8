"""The files of a run folder and of a folder of results, read into one object."""
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from metrics import MONITORS
from util import csv_rows, open_text, read_regular

from .plots import best_row


@dataclass
class Run:
    """The files of a run folder and of a folder of results; missing files are empty."""
    run: dict  # run.json
    history: dict  # column -> (epochs,)
    steps: dict  # column -> (steps,)
    events: list  # dicts, the rows of events.csv
    bad_files: list  # dicts with path, reason
    train_counts: np.ndarray | None  # (C,) training clips of each class
    metrics: dict
    classes: list  # dicts, the rows of per_class.csv
    clips: list  # dicts, the rows of predictions.csv
    scores: np.ndarray  # (n, C) uncalibrated
    labels: np.ndarray  # (n,) class indices, or (n, C) of 1, 0 and nan if multi-label
    # Single-label: of the clips with a label only; the others are in metrics["false_alarms"].
    predicted: np.ndarray  # (n, C) bool: one class per clip, any number if multi-label

    @property
    def names(self) -> list[str]:
        return [row["class"] for row in self.classes]

    @property
    def flags(self) -> dict:
        return self.run.get("flags", {})

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    @property
    def sigmoid(self) -> bool:
        """Whether scores are sigmoids, one class at a time, and no softmax."""
        return self.metrics.get("sigmoid", self.multi_label)

    @cached_property
    def truth(self) -> np.ndarray:
        """(n, C) bool: the labels of each clip."""
        if self.multi_label:
            return self.labels == 1
        return self.labels[:, None] == np.arange(len(self.classes))

    @cached_property
    def support(self) -> np.ndarray:
        """(C,) clips that have the class as a label."""
        return self.truth.sum(axis=0)

    @cached_property
    def correct(self) -> np.ndarray:
        """(C,) clips that have the class as a label and as a prediction."""
        return (self.truth & self.predicted).sum(axis=0)

    @property
    def most_frequent_share(self) -> float:
        """Share of the clips with a label that have the most frequent class."""
        return float(self.truth[self.truth.any(axis=1)].mean(axis=0).max())

    @property
    def monitor(self) -> str:
        """The column of history.csv that best.pt was selected by."""
        return self.flags.get("monitor", "val_acc")

    @property
    def best(self) -> int | None:
        """Row of the best epoch in the history, the last one on a tie."""
        values = self.history.get(self.monitor, np.zeros(0))
        return best_row(values, MONITORS[self.monitor].higher_is_better)


def read_run(run_dir: str | Path, results: str | Path) -> Run:
    """Read a run folder, in which any file may be missing, and a complete folder of results."""
    run_dir, results = Path(run_dir), Path(results)
    arrays = load_scores(results)
    scores, labels = arrays["scores"], arrays["labels"]
    clips = read_rows(results / "predictions.csv")
    if labels.ndim == 2:
        predicted = arrays["predicted"] & ~np.isnan(labels)
    else:
        labelled = np.flatnonzero(labels >= 0)
        scores, labels = scores[labelled], labels[labelled]
        if clips:
            clips = [clips[i] for i in labelled.tolist()]
        predicted = scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1])
    classes = read_rows(results / "per_class.csv")
    run_json = run_dir / "run.json"
    return Run(
        run=json.loads(read_regular(run_json)) if run_json.exists() else {},
        history=read_columns(run_dir / "history.csv"),
        steps=read_columns(run_dir / "steps.csv"),
        events=read_rows(run_dir / "events.csv"),
        bad_files=read_rows(run_dir / "bad_files.csv"),
        train_counts=_train_counts(run_dir / "split.csv", classes, labels.ndim == 2),
        metrics=json.loads(read_regular(results / "metrics.json")),
        classes=classes,
        clips=clips,
        scores=scores, labels=labels, predicted=predicted)


def _train_counts(path, classes, multi_label):
    """(C,) training clips of each class in a split.csv, or None without any."""
    counts = Counter()
    for row in read_rows(path):
        if row["split"] == "train":
            counts.update(row["label"].split("; ") if multi_label else [row["label"]])
    return np.array([counts[row["class"]] for row in classes]) if counts else None


def read_rows(path: Path) -> list[dict]:
    """The rows of a CSV file, none if it is missing."""
    if not path.exists():
        return []
    with open_text(path) as file:
        return list(csv_rows(file))


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """A CSV file of numbers -> {column: (n,)}, nothing if it is missing; blanks are nan.

    An incomplete last line, of a killed run, is left out. Raises ValueError on other text.
    """
    if not path.exists():
        return {}
    header, *lines = read_regular(path).decode().split("\n")
    names = header.strip().split(",")
    lines = [re.sub(r"(?<=,)(?=,|\r?$)", "nan", line) for line in lines[:-1]
             if line.count(",") == len(names) - 1]
    values = np.loadtxt(lines, delimiter=",", ndmin=2) if lines else np.zeros((0, len(names)))
    return dict(zip(names, values.T, strict=True))


def load_scores(folder: Path) -> dict:
    """The arrays of a results folder's scores.npz.

    scores (n, C); labels (n,), or (n, C) of 1, 0 and nan; rows (n,); and predicted (n, C) bool if
    clips may have several labels. Older files call the last one "said".
    """
    with np.load(Path(folder) / "scores.npz") as file:
        arrays = dict(file)
    if "said" in arrays:
        arrays["predicted"] = arrays.pop("said")
    return arrays
