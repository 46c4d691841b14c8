"""Rows of a folder or a table -> a Manifest: sorted, with numbered classes and with groups."""
import os
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util import plural, printable, summarize

from .folder_words import negative_names
from .grouping import factorize, group_by_name, merge_groups
from .manifest import DataError, LabelSet, Manifest, first_label
from .names import unify_names


def build_manifest(name: str, root: str | os.PathLike, paths: list[str], labels: list[str],
                   notes: list[str], *, split: Sequence[int] | None = None,
                   fold: Sequence[int] | None = None, start: np.ndarray | None = None,
                   end: np.ndarray | None = None, group: Sequence[str] | None = None,
                   group_source: str | None = None,
                   label_names: Sequence[tuple[tuple, tuple]] | None = None,
                   known_classes: Collection[str] = (), real_classes: Collection[str] = ()
                   ) -> Manifest:
    """Make the manifest of these columns, which is the same for any order of the rows.

    labels: the first label of each row, "" for none. group: names of recordings, "" if not known;
    without it the groups follow from the file names. label_names: for each row the names of (all
    its labels, its secondary labels), if rows may have several. known_classes: classes that
    secondary labels may name even if no row has them as a label.

    Labels such as "noise" stand for none of the classes, unless they are in real_classes. A label
    "-dog" says that the class dog is absent, and nothing about the others. See `_read_names`.

    The result may have too few classes; see `check_classes`.
    """
    n = len(paths)
    start = np.zeros(n, np.float32) if start is None else start
    end = np.full(n, np.nan, np.float32) if end is None else end
    order = sorted_order(paths, start, end)
    paths = [paths[i] for i in order]
    labels = [labels[i] for i in order]
    if label_names:
        label_names = [label_names[i] for i in order]
    else:
        pair_of = {label: ((label,) if label else (), ()) for label in set(labels)}
        label_names = [pair_of[label] for label in labels]

    names_of, negative_notes = _read_names(label_names, {*real_classes, *known_classes})
    classes, class_of, class_notes = _number_classes(names_of, known_classes, root)
    notes = notes + negative_notes + class_notes
    label_sets, label_note = _number_label_sets(names_of, class_of)
    notes += label_note
    del label_names, names_of  # a pointer per row each
    labels = np.array([first_label(label_set) for label_set in label_sets], np.int32)

    is_new_file = [path != previous for previous, path in pairwise(paths)]  # paths are sorted
    file_of = np.cumsum([False, *is_new_file], dtype=np.int32)
    if group is None:
        group_codes, group_source = _groups_by_name(paths, file_of, labels, notes)
    else:
        # A row without a recording is in the group of its file; no path contains \0.
        names = [group[i] or "\0" + path for i, path in zip(order, paths)]
        group_codes = merge_groups(factorize(names), file_of)

    order = np.array(order)
    manifest = Manifest(
        name=name, root=Path(root), classes=classes, paths=paths, labels=labels,
        start=start[order], end=end[order], group=group_codes, group_source=group_source,
        split=np.full(n, -1, np.int8) if split is None else np.array(split, np.int8)[order],
        fold=None if fold is None else np.array(fold, np.int16)[order],
        notes=[printable(note) for note in notes])
    # One class alone is a question of yes or no, which a threshold answers.
    is_multi_label = len(classes) == 1 or any(
        len(present) > 1 or unknown for present, unknown in label_sets)
    return manifest.with_label_sets(label_sets) if is_multi_label else manifest


def check_classes(manifest: Manifest) -> None:
    """Raise DataError if there is no class, or only one and no clip without it."""
    classes = manifest.classes
    if len(classes) > 1 or (classes and manifest.is_negative.any()):
        return
    has = f"only one class ({classes[0]})" if classes else "no class"
    problem = (f"--data {manifest.root}: {has}; give two or more, each a folder directly in --data "
               "or a label of its own, or one and recordings without it (--negatives)")
    raise DataError("; ".join([problem, *manifest.notes]))


def sorted_order(paths: Sequence[str], start: np.ndarray | None = None,
                 end: np.ndarray | None = None) -> list[int]:
    """Indices of the rows, sorted by path, start and end."""
    order = list(range(len(paths)))
    if start is not None:
        order = np.lexsort((np.nan_to_num(end, nan=-1), start)).tolist()
    if all(map(str.isascii, paths)):
        order.sort(key=paths.__getitem__)
    else:  # as bytes: the escapes of bytes that are not UTF-8 do not sort like the bytes
        order.sort(key=lambda i: os.fsencode(paths[i]))
    return order


class _Names(NamedTuple):
    """What the labels of a row say, by names of classes."""
    present: tuple[str, ...]
    unknown: tuple[str, ...]
    absent: tuple[str, ...]  # if there are some, all classes but these are unknown


def _read_names(label_names, real_classes):
    """-> (_Names of each row, notes): tells classes from names that stand for their absence.

    label_names: (labels, secondary labels) of each row.
    """
    own = set().union(*(present for present, _ in label_names))
    empty_names = negative_names(own, real_classes)
    absent_names = {name for name in own - set(real_classes)
                    if name.startswith("-") and name[1:].strip() in own}

    def read(pair):
        present, unknown = pair
        absent = tuple(name[1:].strip() for name in present if name in absent_names)
        present = tuple(name for name in present if name not in empty_names | absent_names)
        return _Names(present, unknown, absent)

    counts = Counter(label_names)  # equal rows share their names, to save memory
    names_of_pair = {pair: read(pair) for pair in counts}
    notes = []
    for name in sorted(empty_names):
        n = sum(number for (present, _), number in counts.items() if name in present)
        notes.append(f"negatives: {plural(n, 'clip')} of {name}, which stands for none of the "
                     f"classes; if it is one: --real-class {name}")
    n_empty = sum(number for (present, _), number in counts.items() if not present)
    if n_empty:
        notes.append(f"negatives: {plural(n_empty, 'clip')} without a label, so with none of the "
                     "classes")
    n_absent = sum(number for pair, number in counts.items() if names_of_pair[pair].absent)
    if n_absent:
        notes.append(f"negatives of a single class: {plural(n_absent, 'clip')}, labelled "
                     f"{summarize(sorted(absent_names), 3)}")
    return [names_of_pair[pair] for pair in label_names], notes


def _groups_by_name(paths, file_of, labels, notes):
    """As `group_by_name`; clips without a label may have names of another kind."""
    has_label = labels >= 0
    if has_label.all():
        return group_by_name(paths, file_of, labels, notes)
    codes = np.zeros(len(paths), np.int32)
    source, first_code = "each file alone", 0
    for chosen in (np.flatnonzero(~has_label), np.flatnonzero(has_label)):
        chosen_paths = [paths[i] for i in chosen.tolist()]
        own, source = group_by_name(chosen_paths, factorize(file_of[chosen].tolist()),
                                    labels[chosen], notes)
        codes[chosen] = own + first_code
        first_code += int(own.max()) + 1
    return merge_groups(codes, file_of), source


def _number_classes(names_of, known_classes, root):
    """-> (sorted class names, {name in the data: class}, notes).

    Names can be printed and written anywhere; see `unify_names`. Secondary labels that are no class
    are not in the dict.
    """
    own = set().union(*(names.present for names in names_of))
    secondary = set().union(*(names.unknown for names in names_of))
    spelled, notes = unify_names(own | secondary, known_classes, root)
    classes = {spelled[name] for name in own}
    secondary = {spelled[name] for name in secondary}
    ignored = secondary - classes - set(known_classes)
    if ignored:
        notes.append("left out: secondary labels that are no clip's own label: "
                     f"{summarize(sorted(ignored))}")
    classes |= secondary & set(known_classes)
    classes = sorted(classes)
    index = {name: i for i, name in enumerate(classes)}
    class_of = {name: index[text] for name, text in spelled.items() if text in index}
    return classes, class_of, notes


def _number_label_sets(names_of, class_of):
    """-> (label set of each row, notes)."""
    def to_classes(names):
        return tuple(class_of[name] for name in names if name in class_of)

    def to_label_set(names):
        unknown = to_classes(names.unknown)
        if names.absent:
            unknown = tuple(sorted(set(class_of.values()) - set(to_classes(names.absent))))
        return LabelSet(to_classes(names.present), unknown)

    set_of = {names: to_label_set(names) for names in set(names_of)}
    sets = [set_of[names] for names in names_of]
    n_several = sum(len(label_set.present) > 1 for label_set in sets)
    n_unknown = sum(len(label_set.unknown) > 0 and not names.absent
                    for names, label_set in zip(names_of, sets, strict=True))
    if not n_several and not n_unknown:
        return sets, []
    most = max(len(label_set.present) for label_set in sets)
    return sets, [f"several labels: {n_several} of {plural(len(sets), 'clip')}, at most {most} per "
                  "clip; secondary labels, neither present nor absent: "
                  f"{plural(n_unknown, 'clip')}"]
