"""Folds for cross-validation: made by group, stratified by class."""
from collections.abc import Sequence

import numpy as np

from util import summarize

from .manifest import DataError, Manifest
from .stratify import divide

NO_FOLD = -1  # always in train


def assign_folds(manifest: Manifest, duplicates: Sequence[Sequence[int]], n_folds: int,
                 seed: int) -> list[str]:
    """Fill in `manifest.fold` with 1 to n_folds and return lines to print.

    No group and no set of equal files is divided, and each fold gets its share of each class. The
    result depends on the clips and the seed alone. Splits and folds of the data are replaced. A
    class with too few groups to be in train for every fold is always in train (`NO_FOLD`).

    Raises DataError if a fold would have no clips.
    """
    lines = []
    if manifest.fold is not None or (manifest.split >= 0).any():
        lines.append(f"the splits of the data are replaced by {n_folds} folds")
    rows = np.arange(len(manifest))
    shares = {fold: 1 / n_folds for fold in range(n_folds)}
    fold, unit = divide(manifest, duplicates, rows, shares, tuple(range(n_folds)), seed)
    fold = fold.astype(np.int16) + 1
    rare = _leave_out_rare(manifest, fold, unit, min_folds=min(3, n_folds))
    manifest.fold = fold
    manifest.split = np.full(len(manifest), -1, np.int8)
    sources = {role: source for role, source in manifest.sources.items() if role != "split"}
    manifest.sources = sources | {"fold": f"{n_folds} new ones, by group"}
    if rare:
        lines.append(f"in train in every fold, since their clips are in too few groups: "
                     f"{summarize(rare)}")
    sizes = np.bincount(fold[fold > 0], minlength=n_folds + 1)[1:]
    if not sizes.all():
        raise DataError(f"--folds {n_folds}: fold {int(np.argmin(sizes)) + 1} would have no clips; "
                        f"the groups ({manifest.group_source}) are too few; use fewer folds")
    lines.append(f"{n_folds} folds by group with seed {seed}: {summarize(sizes, 20)} clips")
    return lines


def _leave_out_rare(manifest, fold, unit, min_folds):
    """Put units of classes that are in fewer folds than this into no fold -> names of the classes.

    With test and validation in one fold each, such a class could be missing in train.
    """
    clips, classes = manifest.positives(np.arange(len(manifest)))
    rare = set()
    while True:
        is_used = fold[clips] > 0
        pairs = np.unique(np.stack([classes[is_used], fold[clips][is_used]]), axis=1)
        n_folds = np.bincount(pairs[0], minlength=len(manifest.classes))
        new = set(np.flatnonzero((n_folds > 0) & (n_folds < min_folds)).tolist())
        if not new:
            return [manifest.classes[c] for c in sorted(rare)]
        rare |= new
        units = np.unique(unit[clips[np.isin(classes, list(new))]])
        fold[np.isin(unit, units)] = NO_FOLD
