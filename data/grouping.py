"""Group clips: by equal values, by two groupings at once, and by what file names show."""
import os
import re
from collections.abc import Hashable, Iterable
from itertools import pairwise

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
MAX_OVERLAPPING_SHARE = 0.1  # of time ranges; more are no times, but numbers of another meaning
MAX_GROUP_SHARE = 0.5  # of the clips, in one group by an ambiguous pattern


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
        matches = _match_names(re.compile(pattern, re.IGNORECASE), paths)
        if matches is None:
            continue  # too few names match
        group = factorize(matches)
        if group.max() == file_of[-1]:
            continue  # no two files share a group
        problem = None
        if name in AMBIGUOUS_PATTERNS:
            problem = _doubt(name, pattern, paths, group, labels)
        if problem is None:
            return group, f"file name ({name})"
        notes.append(f"file names end in what may be a {name}, but {problem}, so each file is its "
                     "own group; if clips are cut from one recording, give a CSV with a column "
                     "group")
    if file_of[-1] > 1:
        notes += _describe_name_parts(paths, labels)
    return file_of, "each file alone"


def _doubt(name, pattern, paths, group, labels):
    """Why the groups of an ambiguous pattern are hardly recordings; None if they can be."""
    if name == "time range" and _share_of_overlaps(pattern, paths) > MAX_OVERLAPPING_SHARE:
        return "the ranges overlap"
    if np.bincount(group).max() > MAX_GROUP_SHARE * len(group) and len(group) > 4:
        return "grouping by it would put most clips into one group"
    if _share_of_divided_classes(group, labels) < 0.5:
        return "grouping by it would put most classes into one group each"
    return None


def _share_of_overlaps(pattern, paths):
    """Share of the time ranges that overlap the one before, unless all have the same length."""
    ranges = {}
    lengths = {}
    for path in set(paths):
        stem = os.path.splitext(os.path.basename(path))[0]
        match = re.match(pattern, stem, re.IGNORECASE)
        if match is None:
            continue
        first, last = float(match[2]), float(match[3])
        ranges.setdefault(match[1], set()).add((first, last))
        length = round(last - first, 3)
        lengths[length] = lengths.get(length, 0) + 1
    n = sum(lengths.values())
    if max(lengths.values()) > 0.5 * n:
        return 0.0
    n_overlaps = 0
    for times in ranges.values():
        n_overlaps += sum(second[0] < first[1] for first, second in pairwise(sorted(times)))
    return n_overlaps / n


def _describe_name_parts(paths, labels):
    """A note if a part of the file names repeats, as the number of a speaker or recording does."""
    def parts(path):
        return re.split("[-_]", os.path.splitext(os.path.basename(path))[0])

    first = parts(paths[0])
    if len(first) < 3 or any(len(parts(path)) != len(first) for path in paths):
        return []
    repeating = []
    for i, example in enumerate(first):
        codes = factorize(parts(path)[i] for path in paths)
        n_values = int(codes.max()) + 1
        spans_classes = _share_of_divided_classes(labels, codes) > 0.5
        if 3 < n_values <= len(paths) / 3 and spans_classes:
            repeating.append(f"part {i + 1} has {n_values} values such as {example}")
    if not repeating:
        return []
    return [f"file names such as {os.path.basename(paths[0])} have parts that repeat: "
            f"{'; '.join(repeating)}; if one is a speaker, site or recording, give a CSV with a "
            "column group"]


def _match_names(pattern, paths):
    """The first bracket of the pattern in each file name; None if too few names match.

    A file whose name does not match gets a value of its own.
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
    return keys


def _share_of_divided_classes(group, labels):
    """Share of the classes whose clips are in more than one group."""
    n_groups = int(group.max()) + 1
    class_of_pair = np.unique(labels * np.int64(n_groups) + group) // n_groups
    return np.mean(np.bincount(class_of_pair) > 1)
