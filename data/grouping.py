"""Group clips: by equal values, by two groupings at once, and by what file names show."""
import os
import re
from collections.abc import Hashable, Iterable

import numpy as np

# What a file name says about the recording that the clip was cut from: the first bracket of the
# pattern. A time range has two more brackets, and its numbers must rise.
NAME_PATTERNS = {
    "ESC source number": r"^\d-(\d+)-[A-Z](?:-\d+)?$",
    "UrbanSound8K source number": r"^(\d+)-\d+-\d+-\d+$",
    "speaker": r"^([0-9a-f]+)_nohash_\d+$",  # Speech Commands
    "XC number": r"(?:^|[^A-Za-z0-9])XC[ _-]?(\d+)",
    "segment number":
        r"^(.+?)[ ._-]+(?:segment|seg|part|pt|chunk|clip|slice|split|window|win)[ ._-]*\d+$",
    "time range": r"^(.+?)[_-](\d+(?:\.\d+)?)(?:m?s)?[_-](\d+(?:\.\d+)?)(?:m?s)?$",
}
# Numbers that may also just count the clips of a class (dog_clip1, dog_clip2). These patterns are
# ignored if most classes would become a single group.
AMBIGUOUS_PATTERNS = ("segment number", "time range")
MIN_MATCHING_SHARE = 0.9  # of the file names, for a pattern to be used


def factorize(values: Iterable[Hashable]) -> np.ndarray:
    """Number values by their first appearance: (n,) int32 codes from 0."""
    code_of = {}
    return np.fromiter((code_of.setdefault(value, len(code_of)) for value in values), np.int32)


def indices_by_value(values: np.ndarray) -> list[np.ndarray]:
    """List the indices of each distinct value, in rising order of the values."""
    if len(values) == 0:
        return []
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


def is_repeated(values: np.ndarray) -> np.ndarray:
    """(n,) bool: which values occur more than once."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def merge_groups(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,) int32 codes of the finest grouping that keeps both groupings' groups whole.

    first, second: (n,) codes from 0. Rows that share a code in either end up in one group.
    """
    if len(np.unique(second)) == len(second):  # each row is a group of its own
        return first
    # Imported here: it takes a quarter of a second, which --help need not wait for.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # A graph with a node for each code of either grouping and an edge for each row.
    n_first = int(first.max()) + 1
    n_nodes = n_first + int(second.max()) + 1
    edges = (first, n_first + second)
    graph = coo_array((np.ones(len(first)), edges), shape=(n_nodes, n_nodes))
    component_of_node = connected_components(graph, directed=False)[1]
    return component_of_node[first]


def group_by_name(paths: list[str], file_of: np.ndarray, labels: np.ndarray,
                  notes: list[str]) -> tuple[np.ndarray, str]:
    """Group clips by what their file names show; if they show nothing, each file is a group.

    file_of: (n,) int32 file of each clip, rising from 0. labels: (n,) class of each clip.
    -> ((n,) int32 group codes, where they come from). Adds to `notes` if an ambiguous pattern is
    ignored.
    """
    for name, pattern in NAME_PATTERNS.items():
        group = _match_names(re.compile(pattern, re.IGNORECASE), paths)
        if group is None or group.max() == file_of[-1]:
            continue  # too few names match, or no two files share a group
        if name not in AMBIGUOUS_PATTERNS or _share_of_divided_classes(group, labels) >= 0.5:
            return group, f"file name ({name})"
        notes.append(f"file names end in a {name}, but grouping by it would put most classes into "
                     "one group each, so each file is its own group; if clips are cut from one "
                     "recording, give a CSV with a column group")
    return file_of, "each file alone"


def _match_names(pattern, paths):
    """Group codes (n,) int32 by the pattern; None if too few file names match.

    A file whose name does not match is a group of its own.
    """
    keys = []
    n_matching = 0
    for i, path in enumerate(paths):
        stem = os.path.splitext(os.path.basename(path))[0]
        match = pattern.search(stem)
        if match and match.lastindex == 3 and float(match[2]) >= float(match[3]):
            match = None  # no time range: it does not rise
        if match:
            n_matching += 1
        keys.append(match[1] if match else "\0" + path)  # no file name contains \0
        n_left = len(paths) - 1 - i
        if n_matching + n_left < MIN_MATCHING_SHARE * len(paths):
            return None
    return factorize(keys)


def _share_of_divided_classes(group, labels):
    """Share of the classes whose clips are in more than one group."""
    n_groups = int(group.max()) + 1
    class_of_pair = np.unique(labels * np.int64(n_groups) + group) // n_groups
    return np.mean(np.bincount(class_of_pair) > 1)
