"""Rows of a folder or a table -> a Manifest: sorted, with numbered classes and with groups."""
import os
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from util import plural, printable, summarize

from .grouping import factorize, group_by_name, merge_groups
from .manifest import DataError, LabelSet, Manifest
from .names import unify_names


def build_manifest(name: str, root: str | os.PathLike, paths: list[str], labels: list[str],
                   notes: list[str], *, split: Sequence[int] | None = None,
                   fold: Sequence[int] | None = None, start: np.ndarray | None = None,
                   end: np.ndarray | None = None, group: Sequence[str] | None = None,
                   group_source: str | None = None,
                   label_names: Sequence[tuple[tuple, tuple]] | None = None,
                   known_classes: Collection[str] = ()) -> Manifest:
    """Make the manifest of these columns, which is the same for any order of the rows.

    labels: the first label of each row. group: names of recordings, "" if not known; without it
    the groups follow from the file names. label_names: for each row the names of (all its labels,
    its secondary labels), if rows may have several. known_classes: classes that secondary labels
    may name even if no row has them as a label.

    Raises DataError if there are fewer than two classes.
    """
    n = len(paths)
    start = np.zeros(n, np.float32) if start is None else start
    end = np.full(n, np.nan, np.float32) if end is None else end
    order = _sorted_order(paths, start, end)
    paths = [paths[i] for i in order]
    labels = [labels[i] for i in order]
    if label_names:
        label_names = [label_names[i] for i in order]

    classes, class_of, class_notes = _number_classes(
        labels, label_names or (), known_classes, root)
    notes = notes + class_notes
    if len(classes) < 2:
        problem = (f"--data {root}: only one class ({classes[0]}); give two or more, each a folder "
                   "directly in --data or a label of its own")
        raise DataError("; ".join([problem, *notes]))
    labels = np.array([class_of[label] for label in labels], np.int32)

    is_new_file = [path != previous for previous, path in pairwise(paths)]  # paths are sorted
    file_of = np.cumsum([False, *is_new_file], dtype=np.int32)
    if group is None:
        group_codes, group_source = group_by_name(paths, file_of, labels, notes)
    else:
        # A row without a recording is in the group of its file; no path contains \0.
        names = [group[i] or "\0" + path for i, path in zip(order, paths)]
        group_codes = merge_groups(factorize(names), file_of)

    label_sets = None
    if label_names:
        label_sets, label_note = _number_label_sets(label_names, class_of)
        notes += label_note

    order = np.array(order)
    manifest = Manifest(
        name=name, root=Path(root), classes=classes, paths=paths, labels=labels,
        start=start[order], end=end[order], group=group_codes, group_source=group_source,
        split=np.full(n, -1, np.int8) if split is None else np.array(split, np.int8)[order],
        fold=None if fold is None else np.array(fold, np.int16)[order],
        notes=[printable(note) for note in notes])
    return manifest.with_label_sets(label_sets) if label_sets else manifest


def _sorted_order(paths, start, end):
    """Indices of the rows, sorted by path, start and end."""
    order = np.lexsort((np.nan_to_num(end, nan=-1), start)).tolist()
    if all(map(str.isascii, paths)):
        order.sort(key=paths.__getitem__)
    else:  # as bytes: the escapes of bytes that are not UTF-8 do not sort like the bytes
        order.sort(key=lambda i: os.fsencode(paths[i]))
    return order


def _number_classes(labels, label_names, known_classes, root):
    """-> (sorted class names, {name in the data: class}, notes).

    Names can be printed and written anywhere; see `unify_names`. Secondary labels that are no class
    are not in the dict.
    """
    own = set(labels).union(*(present for present, _ in label_names))
    secondary = set().union(*(unknown for _, unknown in label_names))
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


def _number_label_sets(label_names, class_of):
    """-> (label set of each row, notes); (None, []) if each row has exactly one label."""
    def to_classes(names):
        return tuple(class_of[name] for name in names if name in class_of)

    sets = [LabelSet(to_classes(present), to_classes(unknown)) for present, unknown in label_names]
    n_several = sum(len(label_set.present) > 1 for label_set in sets)
    n_unknown = sum(len(label_set.unknown) > 0 for label_set in sets)
    if not n_several and not n_unknown:
        return None, []
    most = max(len(label_set.present) for label_set in sets)
    return sets, [f"several labels: {n_several} of {plural(len(sets), 'clip')}, at most {most} per "
                  "clip; secondary labels, neither present nor absent: "
                  f"{plural(n_unknown, 'clip')}"]
