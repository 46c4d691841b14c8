"""Data that has grown: clips of an earlier run keep their split, and new ones are added to it."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from util import plural

from .manifest import SPLITS, DataError, Manifest
from .stratify import BY_NEED, TEST, TRAIN, VAL, divide, undivided

SAME_SECONDS = 0.01  # two lengths of one recording may differ by this


class OldRun(NamedTuple):
    """An earlier run whose split may be extended."""
    flag: str  # that names it, with its value: "--split-from runs/a"
    manifest: Manifest
    is_required: bool  # False: without a common clip, the run is of other data and does not matter


def extend_split(manifest: Manifest, duplicates: Sequence[Sequence[int]], old: OldRun,
                 val: float = 0.15, test: float = 0.15, seed: int = 0) -> list[str]:
    """Give the clips of an earlier run the split they had, and spread the others. -> lines.

    A clip is the same if its path, start, end and length are. New clips in a group with old ones,
    or with the content of an old file, join their split.

    Raises DataError if no clip is the same, or if a group would be in two splits.
    """
    if (manifest.split >= 0).any():
        if old.is_required:
            raise DataError(f"{old.flag}: the data has splits of its own; leave the flag out, or "
                            "remove them")
        return []
    split = _old_splits(manifest, old.manifest)
    n_old = int((split >= 0).sum())
    if n_old == 0:
        if old.is_required:
            raise DataError(f"{old.flag}: none of its {len(old.manifest)} clips is in the data, by "
                            "path and length; give the run of an earlier state of the data")
        return []
    unit = undivided(manifest, duplicates)
    split_of_unit = _splits_of_units(manifest, split, unit, old.flag)
    shares = {VAL: val, TEST: test, TRAIN: 1 - val - test}
    manifest.split, _ = divide(manifest, duplicates, np.arange(len(manifest)), shares, BY_NEED,
                               seed, fixed=split_of_unit[unit])
    manifest.sources["split"] = f"{old.flag}, with new clips added"
    n_gone = len(old.manifest) - n_old
    return [f"{old.flag}: {plural(n_old, 'clip')} keep their split, {len(manifest) - n_old} are "
            f"new, {n_gone} of the run's are gone or have another length"]


def _splits_of_units(manifest, split, unit, flag):
    """(units,) int8 split of the units with old clips, -1 for the others."""
    split_of_unit = np.full(int(unit.max()) + 1, -1, np.int8)
    for row in np.flatnonzero(split >= 0).tolist():
        earlier = split_of_unit[unit[row]]
        if earlier not in (-1, split[row]):
            other = np.flatnonzero((unit == unit[row]) & (split == earlier))[0]
            raise DataError(
                f"{flag}: its split would leak: {manifest.paths[other]} ({SPLITS[earlier]}) and "
                f"{manifest.paths[row]} ({SPLITS[split[row]]}) are one group "
                f"({manifest.group_source}) or equal files; train on a new split, with other "
                "--weights and without --split-from")
        split_of_unit[unit[row]] = split[row]
    return split_of_unit


def _old_splits(manifest, old):
    """(n,) int8 split of each clip in `old`, -1 for new clips."""
    known = {}
    for row, key in enumerate(_keys(old)):
        length = None if old.duration is None else float(old.duration[row])
        known[key] = (length, int(old.split[row]))
    split = np.full(len(manifest), -1, np.int8)
    for row, key in enumerate(_keys(manifest)):
        length, old_split = known.get(key, (None, -1))
        is_same = length is None or abs(length - manifest.duration[row]) <= SAME_SECONDS
        if is_same:
            split[row] = old_split
    return split


def _keys(manifest):
    ends = np.nan_to_num(manifest.end, nan=-1).tolist()
    return zip(manifest.paths, manifest.start.tolist(), ends)
