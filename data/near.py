"""Near-identical recordings: the same sound in files whose bytes differ."""
from collections.abc import Sequence

import numpy as np

from util import plural

from .grouping import indices_by_value
from .manifest import Manifest

SAME_START = 0.15  # seconds; clips that start further apart are other parts of a recording
MOST_EXAMPLES = 3


def connect(pairs: np.ndarray, sets: Sequence[Sequence[int]]) -> list[list[int]]:
    """The sets of indices that are connected by pairs (k, 2) or by being in one of the sets."""
    links = [(int(same[0]), int(i)) for same in sets for i in same[1:]] + pairs.tolist()
    parent = {i: i for link in links for i in link}

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for first, second in links:
        parent[root(second)] = root(first)
    members = {}
    for i in sorted(parent):
        members.setdefault(root(i), []).append(i)
    return list(members.values())


def pairs_of_clips(manifest: Manifest, file_of: np.ndarray, file_pairs: np.ndarray) -> np.ndarray:
    """(m, 2) rows with the same stretch of two near-identical files, from (k, 2) of these files."""
    rows = np.flatnonzero(np.isin(file_of, file_pairs))
    rows_of_file = {int(file_of[rows[same[0]]]): rows[same].tolist()
                    for same in indices_by_value(file_of[rows])}
    end = np.nan_to_num(manifest.end, nan=-1)
    pairs = [(a, b) for first, second in file_pairs.tolist()
             for a in rows_of_file[first] for b in rows_of_file[second]
             if abs(manifest.start[a] - manifest.start[b]) <= SAME_START
             and abs(end[a] - end[b]) <= SAME_START]
    return np.array(pairs, np.int64).reshape(-1, 2)


def describe_near(manifest: Manifest, pairs: np.ndarray) -> list[str]:
    """A line on pairs of near-identical clips (k, 2): how many, of which classes, examples."""
    if len(pairs) == 0:
        return []
    labels = [(manifest.label_text(a), manifest.label_text(b)) for a, b in pairs.tolist()]
    n_across = sum(first != second for first, second in labels)
    # Pairs across classes first: one of the two labels is wrong.
    order = np.argsort([first == second for first, second in labels], kind="stable")
    examples = []
    for i in order[:MOST_EXAMPLES].tolist():
        first, second = pairs[i].tolist()
        examples.append(f"{manifest.paths[first]} ({labels[i][0]}) = {manifest.paths[second]} "
                        f"({labels[i][1]})")
    if len(pairs) > MOST_EXAMPLES:
        examples.append("...")
    across = f", {n_across} of them across classes" if n_across else ", within classes"
    return [f"near-identical audio (same sound, other file): {plural(len(pairs), 'pair')} of clips"
            f"{across}: {'; '.join(examples)}"]
