"""Which level of a folder tree names the classes, and what the other levels mean.

A folder of class folders needs no thought. Folders that are no classes (splits, folds, persons,
machines, processed copies) are read for what they are, or the data is refused with the reason.
"""
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from util import summarize

from .folder_words import fold_of, is_copy, is_group, splits_of
from .manifest import SPLITS, DataError

TRAIN = SPLITS.index("train")
GIVE_TABLE = "or give a CSV with the columns path,label"


@dataclass
class Layout:
    """How the paths of a folder are read; lists have an entry per path."""
    paths: list[str]
    class_level: int = 0  # 0: the folders directly in --data
    split: list[int] | None = None
    fold: list[int] | None = None
    group: list[str] | None = None
    loose: list[str] = field(default_factory=list)  # paths outside of any class folder
    sources: dict[str, str] = field(default_factory=dict)  # what decided label, split and group
    notes: list[str] = field(default_factory=list)


def find_layout(folder: Path, paths: list[str], has_splits: bool = False) -> Layout:
    """Find out what the folders of these relative paths mean.

    has_splits: the splits come from elsewhere. Raises DataError if the classes are not clear.
    """
    subfolders = defaultdict(set)  # top folder -> folders with audio in it, "" for none
    for path in paths:
        top, *rest = path.split("/")
        subfolders[top].add(rest[0] if len(rest) > 1 else "")
    tops = sorted(subfolders)
    layout = Layout(paths, sources={"label": "folders directly in --data"})
    if has_splits or not paths:
        return layout
    if (_read_top_splits(folder, tops, subfolders, layout)
            or _read_folds(folder, tops, layout)):
        _read_inner_groups(layout)
        return layout
    _refuse_top_groups(folder, tops, subfolders)
    if len(tops) == 1 and "" not in subfolders[tops[0]] and len(subfolders[tops[0]]) > 1:
        raise DataError(f"--data {folder}: only one class ({tops[0]}); give {folder / tops[0]} to "
                        f"use the folders in it, {summarize(sorted(subfolders[tops[0]]))}")
    if _read_inner_splits(folder, subfolders, layout):
        _read_inner_groups(layout)
        return layout
    _refuse_same_subfolders(folder, tops, subfolders)
    _refuse_classes_below_groups(folder, subfolders, paths)
    _read_inner_groups(layout)
    return layout


# ---- folders above the classes

def _below_top(layout, what):
    """Take the second level for the classes; files directly in a top folder are loose."""
    layout.class_level = 1
    layout.loose = sorted(path for path in layout.paths if path.count("/") == 1)
    layout.paths = [path for path in layout.paths if path.count("/") > 1]
    layout.sources["label"] = f"folders in {what}"
    return [path.split("/", 1)[0] for path in layout.paths]


def _read_top_splits(folder, tops, subfolders, layout):
    """Read train/class, val/class, test/class. -> whether that is the layout."""
    split_of = splits_of(tops)
    if not split_of:
        return False
    names = summarize(sorted(split_of))
    others = [top for top in tops if top not in split_of]
    if TRAIN in split_of.values() and not others:
        own_tops = _below_top(layout, names)
        layout.split = [split_of[top] for top in own_tops]
        layout.sources["split"] = f"folders {names}"
        layout.notes.append(f"splits are given by the folders {names}")
        return True
    has_classes = any(subfolders[top] - {""} for top in split_of)
    if has_classes and len(set(split_of.values())) > 1:
        problem = f"but {summarize(others)} beside them" if others else "but none is for training"
        raise DataError(f"--data {folder}: the folders {names} look like splits, {problem}; move "
                        f"the others away, call one train, {GIVE_TABLE},split")
    layout.notes.append(f"folders {names} are read as classes, like the folders beside them")
    return False


def _read_folds(folder, tops, layout):
    """Read fold1/class, fold2/class. -> whether that is the layout."""
    folds = {top: fold_of(top) for top in tops}
    if None in folds.values() or len(folds) < 2:
        return False
    names = summarize(tops)
    if all(path.count("/") == 1 for path in layout.paths):
        raise DataError(f"--data {folder}: the folders {names} are folds without class folders; "
                        "give the data set's table as --data, with the columns path,label,fold")
    own_tops = _below_top(layout, names)
    layout.fold = [folds[top] for top in own_tops]
    layout.sources["fold"] = f"folders {names}"
    return True


def _refuse_top_groups(folder, tops, subfolders):
    if len(tops) > 1 and all(is_group(top) for top in tops):
        inner = sorted(set().union(*subfolders.values()) - {""})
        hint = f"; {summarize(inner)} in them may be" if inner else ""
        raise DataError(f"--data {folder}: the folders {summarize(tops)} look like persons, "
                        f"machines, places or days, not classes{hint}; put one folder per class "
                        f"into --data, {GIVE_TABLE},group")


def _refuse_same_subfolders(folder, tops, subfolders):
    """raw/dog, raw/cat, clean/dog, clean/cat: the classes are not on top."""
    inner = [subfolders[top] - {""} for top in tops]
    shared = set.intersection(*inner) if len(tops) > 1 else set()
    has_loose = any("" in subfolders[top] for top in tops)
    if len(shared) < 2 or has_loose:
        return
    if all(is_group(name) for name in shared) or all(is_copy(name) for name in shared):
        return
    raise DataError(f"--data {folder}: the folders {summarize(tops)} contain the same folders, "
                    f"{summarize(sorted(shared))}, so it is not clear which are the classes; put "
                    f"one folder per class into --data, {GIVE_TABLE},group")


def _refuse_classes_below_groups(folder, subfolders, paths):
    """fan/id_00/normal, fan/id_00/abnormal, pump/id_02/normal: the classes may be the last."""
    inner = set().union(*subfolders.values())
    if "" in inner or not all(is_group(name) for name in inner):
        return
    below = defaultdict(set)  # folder of the third level -> top folders that have it
    for path in paths:
        if path.count("/") > 2:
            top, _, name, _ = path.split("/", 3)
            below[name].add(top)
    shared = [name for name in sorted(below) if len(below[name]) == len(subfolders)]
    if len(shared) > 1 and not all(is_group(name) or is_copy(name) for name in shared):
        raise DataError(f"--data {folder}: classes may be {summarize(sorted(subfolders))}, or "
                        f"{summarize(shared)} in the folders {summarize(sorted(inner))}; put one "
                        f"folder per class into --data, {GIVE_TABLE},group")


# ---- folders below the classes

def _read_inner_splits(folder, subfolders, layout):
    """Read class/train, class/test. -> whether that is the layout."""
    split_of = splits_of(set().union(*subfolders.values()) - {""})
    is_divided = any(len({split_of[name] for name in inner if name in split_of}) > 1
                     for inner in subfolders.values())
    if not is_divided or TRAIN not in split_of.values():
        return False
    outside = next((path for path in layout.paths
                    if path.count("/") < 2 or path.split("/")[1] not in split_of), None)
    names = summarize(sorted(split_of))
    if outside is not None:
        raise DataError(f"--data {folder}: the folders {names} in the class folders look like "
                        f"splits, but {outside} is in none; move it, {GIVE_TABLE},split")
    layout.split = [split_of[path.split("/")[1]] for path in layout.paths]
    layout.sources["split"] = f"folders {names} in the class folders"
    layout.notes.append(f"splits are given by the folders {names} in the class folders")
    return True


def _read_inner_groups(layout):
    """Group by folders of persons or machines in the class folders, or by copies of a file."""
    level = layout.class_level + 1
    inner = {path.split("/")[level] if path.count("/") > level else "" for path in layout.paths}
    if "" in inner or len(inner) < 2:
        return
    if len(inner) > 2 and all(is_group(name) for name in inner):
        layout.group = [path.split("/")[level] for path in layout.paths]
        layout.sources["group"] = f"folders {summarize(sorted(inner))}"
    elif any(is_copy(name) for name in inner):
        keys = [_without_level(path, level) for path in layout.paths]
        if len(set(keys)) < 0.75 * len(keys):
            layout.group = keys
            layout.sources["group"] = (f"equal file names in {summarize(sorted(inner))}, copies of "
                                       "one recording")


def _without_level(path, level):
    parts = path.split("/")
    stem = os.path.splitext(parts[-1])[0]
    return "/".join([*parts[:level], *parts[level + 1:-1], stem])
