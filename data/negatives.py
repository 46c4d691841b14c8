"""Negatives: recordings that are known to contain none of the classes."""
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .build import sorted_order
from .csv_table import TABLE_SUFFIXES, read_table
from .files import recordings_below, suffix
from .folds import NO_FOLD
from .grouping import factorize, group_by_name
from .locate import locate_files
from .manifest import COLUMN_TYPES, DataError, LabelSet, Manifest
from .stratify import BY_NEED, TEST, TRAIN, VAL, divide, undivided

# Of the negatives. An epoch can only use some, and the test needs hours to count false alarms.
SHARES = {TRAIN: 0.5, VAL: 0.15, TEST: 0.35}
MIN_WINDOW_SHARE = 0.5  # of a window; a rest of a recording is used if it is longer


def negative_recordings(root: Path, paths: list[str], split: Iterable[int] | None = None
                        ) -> Manifest:
    """A manifest of recordings without a label; `paths` are relative to `root`.

    split: of each path, -1 if not given.
    """
    order = sorted_order(paths)
    sorted_paths = [paths[i] for i in order]
    n = len(paths)
    group, source = group_by_name(sorted_paths, factorize(sorted_paths), np.zeros(n, np.int32), [])
    split = np.full(n, -1, np.int8) if split is None else np.array(list(split), np.int8)[order]
    return Manifest(
        name="negatives", root=root, classes=[], paths=sorted_paths,
        labels=np.full(n, -1, np.int32), start=np.zeros(n, np.float32),
        end=np.full(n, np.nan, np.float32), group=group, group_source=source, split=split,
        fold=None, notes=[])


def load_negatives(given: str | os.PathLike) -> Manifest:
    """The recordings of --negatives: all below a folder, or those that a table names.

    Raises DataError.
    """
    place = Path(os.path.abspath(given))
    if place.is_dir():
        root, paths = place, recordings_below(place, "--negatives")
    elif place.is_file() and suffix(place.name) in TABLE_SUFFIXES:
        root, paths = _listed_recordings(place)
    else:
        raise DataError(f"--negatives {given}: no such folder or table; give a folder with "
                        "recordings that contain none of the classes, or a CSV with a column path")
    if not paths:
        raise DataError(f"--negatives {given}: contains no recording; give a folder that does, or "
                        "leave the flag out")
    return negative_recordings(root, paths)


def _listed_recordings(table_path):
    """-> (root, the distinct recordings of a table's column path)."""
    table = read_table(table_path)
    names = [name.replace("_", "") for name in table.names]
    known = ("path", "filepath", "filename", "file", "audio", "recording")
    column = next((names.index(name) for name in known if name in names), None)
    if column is None:
        raise DataError(f"--negatives {table_path}: has no column path; give a CSV with one, or a "
                        "folder")
    cells = [row[column] for row in table.rows]
    place = locate_files(table, None, cells, [""] * len(cells), None, None)
    return place.root, sorted(set(place.paths))


def add_negatives(manifest: Manifest, negatives: Manifest) -> Manifest:
    """The clips of both, below the folder that the two have in common.

    Raises DataError if a recording has a label and is among the negatives.
    """
    root = Path(os.path.commonpath([manifest.root, negatives.root]))
    first, second = (_below(root, part) for part in (manifest, negatives))
    labelled = {path for path, has in zip(first.paths, first.has_label, strict=True) if has}
    contradiction = labelled & set(second.paths)
    if contradiction:
        raise DataError(f"{root / min(contradiction)} has a label and is among the negatives; "
                        "remove it from one of them")
    known = set(first.paths)
    second = second.select(np.array([path not in known for path in second.paths], bool))
    if manifest.fold is not None:
        second.fold = np.full(len(second), NO_FOLD, np.int16)
    if manifest.multi_label:
        first_sets = [first.label_sets[i] for i in first.label_set]
        second_sets = [LabelSet((), ())] * len(second)
        first = replace(first, label_set=None, label_sets=[])
    columns = {}
    for name in COLUMN_TYPES:
        parts = [getattr(part, name) for part in (first, second)]
        if any(part is None for part in parts):
            columns[name] = None
            continue
        if name == "group":
            parts[1] = parts[1] + parts[0].max() + 1
        columns[name] = np.concatenate(parts)
    joined = replace(first, root=root, paths=first.paths + second.paths, notes=list(first.notes),
                     **columns)
    if manifest.multi_label:
        joined = joined.with_label_sets(first_sets + second_sets)
    return joined.select(sorted_order(joined.paths, joined.start, joined.end))


def _below(root, manifest):
    """The manifest with paths relative to a folder above its root."""
    prefix = Path(os.path.relpath(manifest.root, root)).as_posix()
    if prefix == ".":
        return replace(manifest, root=root)
    return replace(manifest, root=root, paths=[f"{prefix}/{path}" for path in manifest.paths])


def cut_into_windows(manifest: Manifest, seconds: float) -> tuple[Manifest, np.ndarray]:
    """Cut recordings without a label into clips of one window each.

    seconds: of a window. So false alarms can be counted, and training has the whole recording, not
    one crop of it. Needs `manifest.duration`. A rest of at most half a window is not used.

    -> (the manifest, (n,) the row that each of its rows was cut from).
    """
    n_windows = np.ones(len(manifest), np.int64)
    cut = manifest.is_negative & (manifest.duration >= (1 + MIN_WINDOW_SHARE) * seconds)
    n_windows[cut] = np.ceil(manifest.duration[cut] / seconds - MIN_WINDOW_SHARE)
    if not cut.any():
        return manifest, np.arange(len(manifest))
    rows = np.repeat(np.arange(len(manifest)), n_windows)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    result = manifest.select(rows)
    is_cut = cut[rows]
    begin = number[is_cut] * seconds
    length = np.minimum(seconds, manifest.duration[rows[is_cut]] - begin)
    start = manifest.start[rows[is_cut]] + begin
    result.start[is_cut] = start
    result.end[is_cut] = start + length
    result.duration[is_cut] = length
    return result, rows


def split_negatives(manifest: Manifest, duplicates: Sequence[Sequence[int]], seed: int) -> None:
    """Give a split to the negatives that have none.

    Those in a group with other clips join their split. The others are spread by group.
    """
    unit = undivided(manifest, duplicates)
    split_of_unit = np.full(int(unit.max()) + 1, -1, np.int8)
    has_split = np.flatnonzero(manifest.split >= 0)
    split_of_unit[unit[has_split]] = manifest.split[has_split]
    without = np.flatnonzero(manifest.split < 0)
    manifest.split[without] = split_of_unit[unit[without]]
    rows = np.flatnonzero(manifest.split < 0)
    if len(rows):
        manifest.split[rows], _ = divide(manifest, duplicates, rows, SHARES, BY_NEED, seed)
