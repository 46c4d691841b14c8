"""Divide training clips into stratified splits, without dividing a recording or its copies."""
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from util import summarize

from .grouping import indices_by_value, merge_groups
from .manifest import SPLITS, DataError, Manifest

TRAIN, VAL, TEST = range(3)  # indices into SPLITS
BY_NEED = (TRAIN, TEST, VAL)  # a class with few units goes to train first, then to test


def split_train(manifest: Manifest, duplicates: Sequence[Sequence[int]], shares: dict[int, float],
                new: Sequence[int], seed: int) -> list[str]:
    """Move clips from train to the new splits. -> lines to print.

    shares: {VAL: share, TEST: share} of the clips that are now in train. new: VAL, TEST or both.
    Raises DataError if no clip can be spared for the test.
    """
    rows = manifest.rows("train")
    units, unit = _units_of(manifest, duplicates, rows, seed)
    splits = [split for split in BY_NEED if split == TRAIN or split in new]
    share = {split: shares[split] for split in new}
    share[TRAIN] = 1 - sum(shares[split] for split in new)
    split_of_unit = _Allocation(units, splits, share).run()
    manifest.split[rows] = split_of_unit[unit]
    return _describe_gaps(manifest, units, split_of_unit, new)


def divide(manifest: Manifest, duplicates: Sequence[Sequence[int]], rows: np.ndarray,
           shares: dict[int, float], by_need: tuple[int, ...], seed: int,
           fixed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Divide these rows into parts of the given shares -> ((k,) int8 part, (k,) int32 unit).

    shares: {part: share}, which sum to 1. by_need: the parts, from the one that a class with few
    groups goes to first. fixed: (k,) part of rows that stay where they are, alike within each unit,
    -1 for the others.
    """
    units, unit = _units_of(manifest, duplicates, rows, seed)
    allocation = _Allocation(units, list(by_need), shares, by_need)
    if fixed is not None:
        first_row = np.unique(unit, return_index=True)[1]
        allocation.fix(fixed[first_row])
    return allocation.run()[unit], unit


def _units_of(manifest, duplicates, rows, seed):
    """-> (the units of these rows, (k,) int32 unit of each row, numbered from 0)."""
    unit = undivided(manifest, duplicates)[rows]
    unit = np.unique(unit, return_inverse=True)[1].astype(np.int32)
    row_index, classes = manifest.strata(rows)
    return _Units(unit[row_index], classes, _random_keys(manifest.paths, rows, unit, seed)), unit


class _Units:
    """Clips that must stay together, in columns: an entry per unit and class that it contains.

    unit, label, clips: (m,) int32, sorted by unit, then class; begin: (units + 1,) int32 first
    entry of each unit; entries_of: class -> (k,) its entries; random_key: (units,) uint64 that
    breaks ties. Objects instead of columns would take ten times the memory.
    """

    def __init__(self, unit, labels, random_key):
        """unit, labels: (n,) unit and class of each label of each clip."""
        n_classes = int(labels.max()) + 1
        pairs, clips = np.unique(unit * np.int64(n_classes) + labels, return_counts=True)
        self.unit = (pairs // n_classes).astype(np.int32)
        self.label = (pairs % n_classes).astype(np.int32)
        self.clips = clips.astype(np.int32)
        self.random_key = random_key
        numbers = np.arange(len(self) + 1, dtype=np.int32)
        self.begin = np.searchsorted(self.unit, numbers).astype(np.int32)
        self.entries_of = {
            int(self.label[entries[0]]): entries for entries in indices_by_value(self.label)}
        # Python reads single numbers from memoryviews faster than from arrays.
        self._begin, self._label, self._clips = self.begin.data, self.label.data, self.clips.data

    def __len__(self):
        return len(self.random_key)

    def content(self, u):
        """(class, clips) pairs of a unit."""
        entries = range(self._begin[u], self._begin[u + 1])
        return [(self._label[entry], self._clips[entry]) for entry in entries]

    def of_class(self, c, largest_first):
        """Units that contain a class, by size and then by random key."""
        entries = self.entries_of[c]
        size = -self.clips[entries] if largest_first else self.clips[entries]
        order = np.lexsort((self.random_key[self.unit[entries]], size))
        return self.unit[entries[order]].tolist()


class _Allocation:
    """The stratified split of units (K. Sechidis et al., "On the stratification of multi-label
    data", 2011).

    Classes are allocated from the one with the fewest units, each from its largest unit, to the
    split that is furthest below its share of the class. Each class gets train, test and val in this
    order, if it has that many units.
    """

    def __init__(self, units, splits, share, by_need=BY_NEED):
        self.units = units
        self.splits = splits
        self.split_of_unit = np.full(len(units), -1, np.int8)
        self.n_units = {c: len(entries) for c, entries in units.entries_of.items()}
        n_clips = {c: int(units.clips[entries].sum()) for c, entries in units.entries_of.items()}
        n_all = sum(n_clips.values())
        # Clips that each split still lacks: of each class, and of all classes.
        self.lacking = {c: {s: share[s] * n_clips[c] for s in splits} for c in n_clips}
        self.lacking_in_all = {s: share[s] * n_all for s in splits}
        # Units of each class in each split, and the splits that a class must be in.
        self.n_placed = {c: dict.fromkeys(splits, 0) for c in n_clips}
        self.required = {c: [s for s in by_need[:self.n_units[c]] if s in splits] for c in n_clips}
        self.is_fixed = np.zeros(len(units), bool)

    def fix(self, split_of_unit):
        """Place units for good: (units,) int8 split of each, -1 if it is free."""
        for u in np.flatnonzero(split_of_unit >= 0).tolist():
            self._place(u, int(split_of_unit[u]))
            self.is_fixed[u] = True

    def run(self):
        """-> (units,) int8 split of each unit."""
        for c in sorted(self.n_units, key=lambda c: (self.n_units[c], c)):
            self._place_class(c)
        for split in self.splits:
            for c in sorted(self.n_units):
                if self._must_go_to(c, split):
                    self._move_one_unit(c, split)
        return self.split_of_unit

    def _must_go_to(self, c, split):
        return split in self.required[c] and self.n_placed[c][split] == 0

    def _place(self, u, split, sign=1):
        """Put a unit into a split; with sign=-1 take it out again."""
        for c, n_clips in self.units.content(u):
            self.lacking[c][split] -= sign * n_clips
            self.lacking_in_all[split] -= sign * n_clips
            self.n_placed[c][split] += sign
        self.split_of_unit[u] = split

    def _place_class(self, c):
        """Place the units of a class that are not placed yet."""
        units = self.units.of_class(c, largest_first=True)
        units = [u for u in units if self.split_of_unit[u] < 0]

        def need(split):  # rounded, so that errors of float sums do not decide
            return round(self.lacking[c][split], 6), round(self.lacking_in_all[split], 6)

        for i, u in enumerate(units):
            n_left = len(units) - i
            missing = [split for split in self.splits if self._must_go_to(c, split)]
            candidates = missing if len(missing) >= n_left else self.splits
            self._place(u, max(candidates, key=need))

    def _move_one_unit(self, c, split):
        """Move a unit of a class to a split that must have the class but does not.

        Units of several classes can cause this. The smallest unit moves that no class needs where
        it is. If there is none, the smallest unit moves anyway if the split is train.
        """
        candidates = self.units.of_class(c, largest_first=False)
        candidates = [u for u in candidates if not self.is_fixed[u]]
        movable = next((u for u in candidates if self._is_spare(u)), None)
        if movable is None and split == TRAIN and candidates:
            movable = candidates[0]
        if movable is not None:
            self._place(movable, self.split_of_unit[movable], sign=-1)
            self._place(movable, split)

    def _is_spare(self, u):
        """Whether every class of a unit can do without it where it is."""
        split = self.split_of_unit[u]
        return all(self.n_placed[c][split] > 1 or split not in self.required[c]
                   for c, _ in self.units.content(u))


def undivided(manifest: Manifest, duplicates: Sequence[Sequence[int]]) -> np.ndarray:
    """(n,) codes of what must stay together: groups, joined if they share a file's content."""
    copies = np.arange(len(manifest), dtype=np.int32)
    for rows in duplicates:
        copies[rows] = rows[0]
    return merge_groups(manifest.group, copies)


def _random_keys(paths, rows, unit, seed):
    """(units,) uint64 that follow from the seed and each unit's first path.

    So they do not depend on the order of the rows, and new clips move few of the old ones.
    """
    first_path = [None] * (int(unit.max()) + 1)
    for u, row in zip(unit, rows):
        if first_path[u] is None or paths[row] < first_path[u]:
            first_path[u] = paths[row]
    digests = (hashlib.blake2b(os.fsencode(f"{seed} {path}"), digest_size=8).digest()
               for path in first_path)
    keys = (int.from_bytes(digest, "big") for digest in digests)
    return np.fromiter(keys, np.uint64, len(first_path))


def _describe_gaps(manifest, units, split_of_unit, new):
    """Lines on classes that are not in every split; raises DataError if nothing can be tested."""
    lines = []
    for split in sorted(new, reverse=True):
        if not (manifest.split == split).any():
            problem = (f"no clips for {SPLITS[split]}: no class has enough groups "
                       f"({manifest.group_source}) to spare one")
            if split == TEST:
                raise DataError(f"{problem}; add recordings, or give a CSV with a column group")
            lines.append(problem)
    n_units = {c: len(entries) for c, entries in sorted(units.entries_of.items())}
    n_units.pop(len(manifest.classes), None)  # clips without a label
    undivided = [manifest.classes[c] for c, n in n_units.items() if n == 1]
    if undivided:
        lines.append("in train only, since all their clips are in one group: "
                     f"{summarize(undivided)}")
    tested = set(units.label[split_of_unit[units.unit] == TEST].tolist())
    untested = [manifest.classes[c] for c, n in n_units.items() if n > 1 and c not in tested]
    if untested and TEST in new:
        lines.append("not in test, since their groups contain other classes too: "
                     f"{summarize(untested)}")
    return lines
