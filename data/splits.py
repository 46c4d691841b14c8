"""Assign clips to train, val and test, so that no recording and no copy of one is in two splits."""
import csv
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from util import CsvWriter, atomic_write, plural, printable, summarize

from .folds import NO_FOLD
from .grouping import indices_by_value
from .manifest import SPLITS, DataError, Manifest, portable_path
from .negatives import split_negatives
from .stratify import TEST, TRAIN, VAL, split_train

COLUMNS = ["path", "label", "split", "group", "start", "end"]


def assign_splits(manifest: Manifest, duplicates: Sequence[Sequence[int]], val: float = 0.15,
                  test: float = 0.15, seed: int = 0, fold: int | None = None) -> list[str]:
    """Fill in `manifest.split` and return lines to print.

    The first of these that applies decides:
    1. `fold`: test is this fold, val the next one.
    2. Splits that the data gives.
    3. The first fold of the data.
    4. New splits: `val` and `test` are the target shares of each class's clips. No group and no set
       of copies (`duplicates`, lists of rows) is divided. The result depends on the
       paths and the seed, not on the order of the rows.
    If val or test is missing it is made out of train.

    Raises DataError if a class could not be learnt or tested: one clip only, or none in train.
    """
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise DataError(f"--val {val:g} and --test {test:g} leave nothing for training; their sum "
                        "must be below 1")
    lines = []
    if fold is None and manifest.fold is not None and (manifest.split < 0).all():
        fold = int(manifest.fold.min())
        lines.append(f"the data has folds and --fold is not given: fold {fold} is the test")
    if fold is not None:
        lines.append(_split_by_fold(manifest, fold))
    counts = manifest.counts()
    empty = [name for name, n in zip(manifest.classes, counts) if n == 0]
    if empty:
        lines.append(f"classes without a readable clip: {summarize(empty)}")
    is_labelled = manifest.has_label
    given = [name for i, name in enumerate(SPLITS)
             if (manifest.split[is_labelled] == i).any()]
    if not given:
        single = [name for name, n in zip(manifest.classes, counts) if n == 1]
        if single:
            raise DataError("classes with a single clip cannot be trained and tested: "
                            f"{summarize(single)}; add recordings, or leave such classes out with "
                            "--min-clips 2")
        manifest.split[is_labelled] = TRAIN
    elif "train" not in given:
        raise DataError(f"the data's splits are {', '.join(given)}, without train; mark the clips "
                        "to train on as train")
    shares = {VAL: val, TEST: test}
    new = [split for split, share in shares.items() if share and SPLITS[split] not in given]
    if new:
        lines += split_train(manifest, duplicates, shares, new, seed)
        if given:
            names = " and ".join(SPLITS[split] for split in new)
            lines.append(f"{names} made out of train with seed {seed}")
    if (manifest.split < 0).any():
        split_negatives(manifest, duplicates, seed)
    _check_train_has_all_classes(manifest)
    sizes = ", ".join(f"{len(manifest.rows(name))} {name}" for name in SPLITS)
    n_groups = plural(int(manifest.group.max()) + 1, "group")
    lines.append(f"split: {sizes} clips; {n_groups} ({manifest.group_source})")
    return [printable(line) for line in lines]


def _split_by_fold(manifest, fold):
    """Set the splits by fold: test is this one, val the next one, train the others. -> a line."""
    if manifest.fold is None:
        raise DataError(f"--fold {fold}: the data has no folds; leave --fold out, or give a CSV "
                        "with a column fold")
    folds = np.unique(manifest.fold[manifest.fold != NO_FOLD]).tolist()
    if fold not in folds:
        raise DataError(f"--fold {fold}: no such fold; give one of {', '.join(map(str, folds))}")
    if len(folds) == 1:
        raise DataError(f"--fold {fold} is the only fold, so nothing is left to train on; leave "
                        "the column fold out")
    manifest.split[:] = np.where(manifest.fold == fold, TEST, TRAIN)
    manifest.split[~manifest.has_label & (manifest.fold == NO_FOLD)] = -1  # see split_negatives
    if len(folds) == 2:
        return f"fold {fold} is the test, the other one is for training"
    next_fold = folds[(folds.index(fold) + 1) % len(folds)]
    manifest.split[manifest.fold == next_fold] = VAL
    others = "one is" if len(folds) == 3 else f"{len(folds) - 2} are"
    return (f"fold {fold} is the test, fold {next_fold} the validation, the other {others} for "
            "training")


def _check_train_has_all_classes(manifest):
    _, trained = manifest.positives(manifest.rows("train"))
    for split in ("test", "val"):
        _, classes = manifest.positives(manifest.rows(split))
        missing = [manifest.classes[c] for c in np.setdiff1d(classes, trained)]
        if missing:
            raise DataError(f"label in {split} that is not in train: {summarize(missing)}; move "
                            "some of its clips to train, or remove the class")


def audit(manifest: Manifest, duplicates: Sequence[Sequence[int]],
          near: Sequence[Sequence[int]] = ()) -> list[str]:
    """Describe leaks between the splits, a line for each kind with an example; [] if there is none.

    Only splits or folds that come with the data can leak. Equal files with different labels are
    reported for any splits. near: pairs of rows of near-identical clips.
    """
    def split(row):
        return SPLITS[manifest.split[row]]

    equal_stretches = {}  # rows with the same stretch of equal files
    for number, rows in enumerate(duplicates):
        for row in rows:
            stretch = (number, float(manifest.start[row]), str(manifest.end[row]))
            equal_stretches.setdefault(stretch, []).append(row)
    checks = [
        ("set", "of byte-identical files in two splits", duplicates, split),
        ("group", f"({manifest.group_source}) in two splits", _divided_groups(manifest), split),
        ("set", "of byte-identical files with two labels", equal_stretches.values(),
         manifest.label_text),
        ("pair", "of near-identical clips in two splits", near, split),
        ("pair", "of near-identical clips with two labels", near, manifest.label_text),
    ]
    lines = []
    for noun, problem, sets, value_of in checks:
        pairs = _differing_pairs(sets, value_of)
        if pairs:
            first, second = pairs[0]
            lines.append(f"{plural(len(pairs), noun)} {problem}, e.g. {manifest.paths[first]} "
                         f"({value_of(first)}) and {manifest.paths[second]} ({value_of(second)})")
    return [printable(line) for line in lines]


def _divided_groups(manifest):
    """Rows of each group that is in more than one split."""
    order = np.lexsort((manifest.split, manifest.group))
    group, split = manifest.group[order], manifest.split[order]
    same_group = group[1:] == group[:-1]
    other_split = split[1:] != split[:-1]
    divided = group[1:][same_group & other_split]
    rows = np.flatnonzero(np.isin(manifest.group, divided))
    return [rows[indices] for indices in indices_by_value(manifest.group[rows])]


def _differing_pairs(sets, value_of):
    """(first row, first row with another value) of each set of rows that has one."""
    pairs = []
    for rows in sets:
        value = value_of(rows[0])
        second = next((row for row in rows if value_of(row) != value), None)
        if second is not None:
            pairs.append((rows[0], second))
    return pairs


def drop_rare(manifest: Manifest, minimum: int) -> tuple[Manifest, list[str]]:
    """Leave out classes with fewer clips than `minimum`. -> (manifest, lines to print).

    Raises DataError if fewer than two classes are left.
    """
    counts = manifest.counts()
    is_frequent = counts >= minimum
    n_frequent = int(is_frequent.sum())
    if n_frequent == len(counts):
        return manifest, []
    if n_frequent < 2:
        raise DataError(f"--min-clips {minimum} leaves {n_frequent} of {len(counts)} classes; give "
                        "a smaller number")
    classes = [manifest.classes[c] for c in np.flatnonzero(is_frequent)]
    new_index = np.where(is_frequent, np.cumsum(is_frequent) - 1, -1)
    smaller = manifest.with_classes(classes, new_index)
    rare = [f"{manifest.classes[c]} ({counts[c]})" for c in np.flatnonzero(~is_frequent)]
    n_lost = plural(len(manifest) - len(smaller), "clip")
    line = (f"left out: {len(rare)} of {len(counts)} classes, with fewer than {minimum} clips each "
            f"({n_lost} in all): {summarize(rare)}")
    return smaller, [line]


def write_split(manifest: Manifest, path: str | os.PathLike) -> None:
    """Write `path,label,split,group,start,end`, one clip per row.

    A missing split or end is empty. In multi-label data the labels are joined as a; b, and a
    column `unknown` follows.
    """
    with atomic_write(path) as file:
        writer = CsvWriter(file, quoting=csv.QUOTE_NONNUMERIC)  # keeps blanks and line breaks
        writer.writerow([*COLUMNS, "unknown"] if manifest.multi_label else COLUMNS)
        writer.writerows(_fields(manifest))


def split_hash(manifest: Manifest) -> str:
    """SHA-256 (hex) of all paths, labels, splits, starts and ends, for any order of the rows."""
    lines = []
    for path, label, split, _group, start, end, *unknown in _fields(manifest):
        text = "\0".join([portable_path(path), label, split, str(start), str(end), *unknown])
        lines.append(text.encode("utf-8", "surrogateescape"))
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()


def _fields(manifest):
    """The fields of each row of split.csv."""
    for row, path in enumerate(manifest.paths):
        split = manifest.split[row]
        end = manifest.end[row]
        fields = [path, manifest.label_text(row), SPLITS[split] if split >= 0 else "",
                  int(manifest.group[row]), manifest.start[row], "" if np.isnan(end) else end]
        if manifest.multi_label:
            unknown = manifest.label_sets[manifest.label_set[row]].unknown
            fields.append("; ".join(manifest.classes[c] for c in unknown))
        yield fields
