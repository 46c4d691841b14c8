"""The manifest: one row per labelled clip, in columns. It opens no audio file."""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from util import InputError

from .sound_print import SHORT

SPLITS = ("train", "val", "test")
MAX_DURATION, MAX_TOTAL_DURATION = 1e6, 1e8  # seconds of a clip and of all: 11 days, 3 years

# The columns of a manifest and the type of each.
COLUMN_TYPES = {
    "labels": np.int32, "start": np.float32, "end": np.float32, "group": np.int32,
    "split": np.int8, "fold": np.int16, "duration": np.float32, "label_set": np.int32,
    "content": np.int64, "sound": np.dtype((np.void, SHORT.itemsize)),
}


class DataError(InputError):
    """Invalid data: one line that names the file or flag, what is wrong and how to fix it."""


def native_path(text: str) -> str:
    """A path from a UTF-8 file, for functions that open it; other encodings are very rare."""
    if text.isascii():
        return text
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def portable_path(path: str) -> str:
    """A path of this system as UTF-8 text; bytes that are not UTF-8 as surrogate escapes."""
    if path.isascii():
        return path
    return os.fsencode(path).decode("utf-8", "surrogateescape")


class LabelSet(NamedTuple):
    """The labels of a clip that may have several, as indices into the classes."""
    present: tuple[int, ...]  # the first label, then the others in rising order
    unknown: tuple[int, ...]  # may be in the clip or not; in rising order


@dataclass
class Manifest:
    """Clips in columns, sorted by path and start; about 30 bytes a clip plus the path.

    In multi-label data each clip has a set of labels, and `labels` is the first of each set.
    Counts, splits and rare classes use all labels, samplers only the first one.
    """
    name: str
    root: Path  # absolute
    classes: list[str]
    paths: list[str]  # relative to root, with /; bytes that are not UTF-8 as surrogate escapes
    labels: np.ndarray  # (n,) int32 index into classes
    start: np.ndarray  # (n,) float32 seconds into the file
    end: np.ndarray  # (n,) float32 seconds into the file; nan is the end of the file
    group: np.ndarray  # (n,) int32: clips of one recording share a code
    group_source: str  # where the groups come from: "column src_file", "file name (XC number)"
    split: np.ndarray  # (n,) int8 index into SPLITS, -1 if not assigned
    fold: np.ndarray | None  # (n,) int16
    notes: list[str]  # lines worth printing
    duration: np.ndarray | None = None  # (n,) float32 seconds of the clip, set after a scan
    label_set: np.ndarray | None = None  # (n,) int32 index into label_sets; None: single label
    label_sets: list[LabelSet] = field(default_factory=list)  # distinct sets
    content: np.ndarray | None = None  # (n,) int64 key of each file (data/content.py), or unknown
    sound: np.ndarray | None = None  # (n,) SHORT print of each file (data/sound_print.py) as bytes
    sources: dict[str, str] = field(default_factory=dict)  # {"label": "column species"} and so on

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, row: int) -> Path:
        """Path of the row's file."""
        return self.root / self.paths[row]

    def select(self, rows: np.ndarray | slice | Sequence[int]) -> Manifest:
        """The manifest of these rows (indices or a mask), in this order. All classes stay."""
        rows = np.arange(len(self))[rows]
        columns = {name: getattr(self, name) for name in COLUMN_TYPES}
        columns = {name: column[rows] for name, column in columns.items() if column is not None}
        paths = [self.paths[row] for row in rows]
        return replace(self, paths=paths, notes=list(self.notes), **columns)

    def rows(self, split: str) -> np.ndarray:
        """Rows of a split, (k,) rising."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    # ---- labels

    @property
    def multi_label(self) -> bool:
        """Whether clips may have several labels; scores are then sigmoids."""
        return self.label_set is not None

    def positives(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Every label of these rows: (m,) index into `rows`, (m,) class."""
        if not self.multi_label:
            return np.arange(len(rows)), self.labels[rows]
        present = [self.label_sets[i].present for i in self.label_set[rows].tolist()]
        counts = np.array([len(classes) for classes in present], np.int64)
        classes = np.array([c for classes in present for c in classes], np.int32)
        return np.repeat(np.arange(len(present)), counts), classes

    def targets(self, rows: Sequence[int]) -> np.ndarray:
        """(k, classes) float32 of these rows: 1 for a label, NaN for an unknown class, else 0."""
        targets = np.zeros((len(rows), len(self.classes)), np.float32)
        if self.multi_label:
            for i, set_index in enumerate(self.label_set[rows].tolist()):
                targets[i, list(self.label_sets[set_index].unknown)] = np.nan
        targets[self.positives(rows)] = 1
        return targets

    def label_text(self, row: int) -> str:
        """The class of a row; several are joined as a; b."""
        if self.multi_label:
            classes = self.label_sets[self.label_set[row]].present
        else:
            classes = [self.labels[row]]
        return "; ".join(self.classes[c] for c in classes)

    def counts(self) -> np.ndarray:
        """Clips per class, (classes,); a clip with several labels counts for each."""
        _, classes = self.positives(np.arange(len(self)))
        return np.bincount(classes, minlength=len(self.classes))

    def rows_with(self, is_chosen: np.ndarray) -> np.ndarray:
        """(n,) bool: which clips have a label among the chosen classes, a (classes,) mask."""
        clips, classes = self.positives(np.arange(len(self)))
        chosen_clips = clips[np.asarray(is_chosen)[classes]]
        return np.bincount(chosen_clips, minlength=len(self)) > 0

    def with_classes(self, classes: Sequence[str], new_index: np.ndarray) -> Manifest:
        """The manifest with other classes; clips that lose all their labels are left out.

        new_index: (old classes,) index of each old class in `classes`, -1 if it is dropped.
        """
        new_index = np.asarray(new_index)
        result = self.select(self.rows_with(new_index >= 0))
        result.classes = list(classes)
        if not self.multi_label:
            result.labels = new_index[result.labels].astype(np.int32)
            return result

        def translate(old_classes):
            return tuple(int(new_index[c]) for c in old_classes if new_index[c] >= 0)

        sets = [LabelSet(translate(s.present), translate(s.unknown)) for s in self.label_sets]
        return result.with_label_sets([sets[i] for i in result.label_set])

    def with_label_sets(self, sets: Sequence[tuple[tuple, tuple]]) -> Manifest:
        """The manifest with these labels: for each clip a (present, unknown) pair of tuples."""
        tidy = {pair: _tidy(*pair) for pair in set(sets)}
        label_sets = sorted(set(tidy.values()))
        index = {label_set: i for i, label_set in enumerate(label_sets)}
        return replace(
            self, label_sets=label_sets,
            label_set=np.array([index[tidy[pair]] for pair in sets], np.int32),
            labels=np.array([present[0] for present, _ in sets], np.int32))

    def single_label(self) -> Manifest:
        """The manifest for a softmax loss: one label per clip, secondary labels are dropped.

        Raises DataError if clips have several labels.
        """
        if not self.multi_label:
            return self
        rows = [row for row, i in enumerate(self.label_set.tolist())
                if len(self.label_sets[i].present) > 1]
        if rows:
            raise DataError(
                f"--data {self.name}: {len(rows)} of {len(self)} clips have several labels, such "
                f"as {self.paths[rows[0]]} ({self.label_text(rows[0])}): use --loss bce or "
                "focal-bce with --monitor val_map; if the separator is part of a class name, "
                "rename that class")
        note = ("secondary labels are not used by a softmax loss and count as absent; --loss bce "
                "or focal-bce masks them out")
        return replace(self, label_set=None, label_sets=[], notes=[*self.notes, note])

    # ---- plain types

    def to_dict(self) -> dict[str, Any]:
        """The manifest in plain types, for a checkpoint."""
        plain = dict(vars(self))
        for name in COLUMN_TYPES:
            if plain[name] is not None:
                plain[name] = plain[name].tolist()
        plain["root"] = str(self.root)
        plain["paths"] = [portable_path(path) for path in self.paths]
        plain["label_sets"] = [tuple(label_set) for label_set in self.label_sets]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Manifest:
        """The manifest that `to_dict` wrote.

        The dict may come from a file that somebody else wrote. Raises ValueError, TypeError,
        KeyError, AttributeError or OverflowError if it is not valid.
        """
        later = {"label_set": None, "label_sets": [], "content": None, "sound": None,
                 "sources": {}}
        fields = {**later, **plain}  # older checkpoints lack some
        fields["root"] = Path(plain["root"])
        fields["paths"] = [native_path(path) for path in plain["paths"]]
        for name, kind in COLUMN_TYPES.items():
            if fields[name] is not None:
                fields[name] = np.array(fields[name], kind)
        fields["label_sets"] = [
            LabelSet(tuple(present), tuple(unknown)) for present, unknown in fields["label_sets"]]
        manifest = cls(**fields)
        manifest._check()
        return manifest

    def _check(self):
        """Raise ValueError if a column, a label set or a path is not valid."""
        columns = [getattr(self, name) for name in COLUMN_TYPES]
        if any(column.shape != (len(self),) for column in columns if column is not None):
            raise ValueError("the columns of its manifest have different lengths")
        if type(self.sources) is not dict:
            raise TypeError("the sources of its manifest are no dict")
        valid = (np.isin(self.labels, range(len(self.classes))).all()
                 and np.isin(self.split, range(-1, len(SPLITS))).all()
                 and (self.start >= 0).all() and not (self.end < 0).any())
        if self.duration is not None:  # a made-up one would be years of tiles
            valid &= bool(((self.duration >= 0) & (self.duration <= MAX_DURATION)).all()
                          and self.duration.sum(dtype=np.float64) <= MAX_TOTAL_DURATION)
        if not valid:
            raise ValueError("its manifest has a label, split, start, end or duration out of "
                             "range")
        for present, unknown in self.label_sets:
            if not present or not _are_distinct_indices([*present, *unknown], len(self.classes)):
                raise ValueError("its manifest has a set of labels that is empty, repeats a class "
                                 "or is out of range")
        if self.multi_label:
            if not np.isin(self.label_set, range(len(self.label_sets))).all():
                raise ValueError("its manifest has an index of a label set out of range")
            if not (self.labels == [self.label_sets[i].present[0] for i in self.label_set]).all():
                raise ValueError("its manifest has labels that do not match the label sets")
        for path in self.paths:
            if path.startswith("/") or "\0" in path or ".." in path.split("/"):
                raise ValueError(f"its manifest names {path[:80]}, outside the data folder")


def _tidy(present, unknown):
    """A LabelSet in its normal form; a class that is present is not unknown too."""
    first = present[0]
    others = sorted(set(present) - {first})
    return LabelSet((first, *others), tuple(sorted(set(unknown) - set(present))))


def _are_distinct_indices(classes, n_classes):
    in_range = all(type(c) is int and 0 <= c < n_classes for c in classes)
    return in_range and len(set(classes)) == len(classes)
