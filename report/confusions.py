"""The confusions section of the page: an interactive matrix and the clips of its cells."""
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from util import plural, printable

from .examples import Example
from .run_files import Run
from .style import shorten

NONE = "(none)"  # row of a false alarm without a missed label, column of a miss without one
MOST_CLASSES = 120  # that the matrix shows
MOST_COUNTED = 20  # classes up to which the counts are written into the cells
FITS_PHONE = 12  # classes up to which the lists stand beside the matrix
MOST_PER_CELL, MOST_CLIPS = 50, 20_000  # clips listed of one cell, and in all
MOST_PAIRS = 12  # in the list of the largest confusions


def outcomes(run: Run) -> np.ndarray:
    """Every outcome as (3, m): true class, predicted class, clip.

    A clip with one label has one outcome. A multi-label clip has one for each correct label, and
    one for each pair of a missed label and a false alarm; the number of classes stands for the
    missing side of such a pair.
    """
    if not run.multi_label:
        return np.stack([run.labels, run.predicted.argmax(axis=1), np.arange(len(run.labels))])
    clips, classes = np.nonzero(run.truth & run.predicted)
    found = [(c, c, i) for c, i in zip(classes, clips)]
    none = [len(run.names)]
    for i, (truth, predicted) in enumerate(zip(run.truth, run.predicted)):
        missed = np.flatnonzero(truth & ~predicted)
        false_alarms = np.flatnonzero(predicted & ~truth)
        if len(missed) or len(false_alarms):
            found += [(m, f, i) for m in (missed if len(missed) else none)
                      for f in (false_alarms if len(false_alarms) else none)]
    return np.array(found, np.int64).reshape(-1, 3).T


def outcome_names(run: Run) -> list[str]:
    """Names of the rows and columns of the matrix."""
    return [*run.names, NONE] if run.multi_label else run.names


def cell_lists(run: Run, examples: Sequence[Example], folder: Path, root: Path | None) -> dict:
    """The clips of each cell for the page's script, and whether they are all listed.

    Most confident clips first; mistakes take precedence if there are too many.

    Args:
        folder: that the page is in.
        root: folder that the clips' paths are relative to, or None for no links.

    Returns {"names", "base": address of root, "cells": {"row,column": [clip]}, "complete"}, each
    clip as [path, confidence, start, number of its example, address].
    """
    cards = {example.index: i for i, example in enumerate(examples)
             if example.kind not in ("suspect", "alarm")}
    true, predicted, clips = outcomes(run)
    confidence = _confidence(run, true, predicted, clips)
    cells, n_listed = {}, 0
    for k in np.lexsort((-confidence, predicted == true)):
        cell = cells.setdefault(f"{true[k]},{predicted[k]}", [])
        if len(cell) < MOST_PER_CELL and n_listed < MOST_CLIPS:
            path, start = run.clips[clips[k]]["path"], float(run.clips[clips[k]]["start"])
            address = quote(path.encode("utf-8", "surrogateescape"))
            derivable = root is None or address == quote(printable(path))
            shown = None if run.multi_label else round(float(confidence[k]), 3)
            cell.append([printable(path), shown, start or None, cards.get(int(clips[k])),
                         None if derivable else address])
            n_listed += 1
    base = None if root is None else quote(os.fsencode(os.path.relpath(root, folder))) + "/"
    names = [printable(name) for name in outcome_names(run)]
    return {"names": names, "base": base, "cells": cells, "complete": n_listed == len(clips)}


def _confidence(run, true, predicted, clips):
    """(m,) how confident each outcome is; of a missed label alone, minus its score."""
    if not run.multi_label:
        return np.array([float(clip["confidence"]) for clip in run.clips])
    only_missed = predicted == len(run.names)
    scores = run.scores[clips, np.where(only_missed, true, predicted)]
    return np.where(only_missed, -scores, scores)


def confusion_table(run: Run) -> dict:
    """What the template shows of the matrix, its summary and the largest confusions."""
    names = outcome_names(run)
    matrix = np.zeros((len(names), len(names)), np.int64)
    true, predicted, _ = outcomes(run)
    np.add.at(matrix, (true, predicted), 1)
    wrong = matrix - np.diag(np.diag(matrix))
    support = matrix.sum(axis=1)
    order = np.arange(len(names))
    if len(names) > MOST_CLASSES:
        n_wrong = wrong.sum(axis=0) + wrong.sum(axis=1)
        order = np.sort(np.argsort(-n_wrong, kind="stable")[:MOST_CLASSES])
    longest = 14 if len(order) <= FITS_PHONE else 20
    pairs = sorted(zip(*np.nonzero(wrong)), key=lambda pair: (-wrong[pair], support[pair[0]]))
    return {
        "n_classes": len(names), "summary": _summary(run, wrong),
        "cell_px": 28 if len(order) <= FITS_PHONE else 22 if len(order) <= 30 else 15,
        "fits": len(order) <= FITS_PHONE, "counted": len(order) <= MOST_COUNTED,
        "columns": [(names[j], shorten(names[j], longest)) for j in order],
        "rows": [{"name": names[i], "short": shorten(names[i], longest), "support": support[i],
                  "cells": _cells(matrix[i], i, row, order, names)}
                 for row, i in enumerate(order)],
        "largest": [{"key": f"{i},{j}", "true": names[i], "predicted": names[j],
                     "n": wrong[i, j], "of": support[i]} for i, j in pairs[:MOST_PAIRS]],
    }


def _cells(counts, i, row, order, names):
    """The cells of one row of the matrix in `order`, None for an empty one."""
    support = counts.sum()
    cells = []
    for column, j in enumerate(order):
        if not counts[j]:
            cells.append(None)
            continue
        share = counts[j] / support
        what = "classified correctly" if i == j else f"predicted as {printable(names[j])}"
        cells.append({
            "key": f"{i},{j}", "at": f"{row},{column}", "n": counts[j],
            "kind": f"{'right' if i == j else 'wrong'}-cell{' strong' if share > 0.4 else ''}",
            # An exponent below 1, so that a few percent show beside a strong diagonal.
            "opacity": f"{0.12 + 0.88 * share ** 0.6:.2f}",
            "label": f"{printable(names[i])} {what}: {counts[j]:,} of {support:,} clips"})
    return cells


def _summary(run, wrong):
    n_clips = f"{len(run.labels):,}"
    if run.multi_label:
        missed = int((run.truth & ~run.predicted).sum())
        known = ~np.isnan(run.labels)
        false_alarms = int((run.predicted & ~run.truth & known).sum())
        return (f"{plural(missed, 'label')} of {int(run.truth.sum()):,} missed and "
                f"{plural(false_alarms, 'false alarm')} in {n_clips} clips")
    n_kinds = plural(int((wrong > 0).sum()), "different confusion")
    return f"{int(wrong.sum()):,} of {n_clips} clips misclassified, in {n_kinds}"
