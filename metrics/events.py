"""Event-level scores: which annotated events a detector found, and which of its events are false.

`windows_of` in data/event_windows.py gives scores per window instead: `evaluate_scores` with its
labels, and the recordings as `groups`, gives average precision with intervals over recordings.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .classification import ratio

TOUCH = 1e-3  # seconds: windows that are closer touch, because tables round times to milliseconds
ROUNDING = 1e-9  # relative


class Events(NamedTuple):
    """e events. recording: (e,) codes from 0. start, end: (e,) seconds. label: (e,) classes."""
    recording: np.ndarray
    start: np.ndarray
    end: np.ndarray
    label: np.ndarray


def join_windows(
    starts: ArrayLike, ends: ArrayLike, active: ArrayLike
) -> list[tuple[float, float]]:
    """Join runs of consecutive active windows of one recording -> [(start, end)] in seconds.

    starts, ends: (w,) in ascending order. active: (w,) bool. An inactive window, or a gap between
    two windows, ends a run. Raises ValueError if the windows are not in order.
    """
    starts, ends = np.asarray(starts, np.float64), np.asarray(ends, np.float64)
    first, last = _runs(starts, ends, np.asarray(active, bool), np.zeros(len(starts), np.int64))
    return list(zip(starts[first].tolist(), ends[last].tolist()))


def join_all_windows(
    recording: ArrayLike, starts: ArrayLike, ends: ArrayLike, active: ArrayLike
) -> Events:
    """Join the active windows of each class and recording, as `join_windows`.

    recording: (w,) codes; the windows of each lie together. starts, ends: (w,) seconds, ascending
    within a recording. active: (w, C) bool, such as scores >= thresholds.
    """
    recording, active = np.asarray(recording, np.int64), np.asarray(active, bool)
    starts, ends = np.asarray(starts, np.float64), np.asarray(ends, np.float64)
    parts = []
    for c in range(active.shape[1]):
        first, last = _runs(starts, ends, active[:, c], recording)
        parts.append(Events(recording[first], starts[first], ends[last], np.full(len(first), c)))
    return Events(*(np.concatenate(values) for values in zip(*parts)))


def _runs(starts, ends, active, recording):
    """Indices of the first and of the last windows of the runs of active ones: (r,), (r,)."""
    same = recording[1:] == recording[:-1]
    if (same & ((starts[1:] < starts[:-1]) | (ends[1:] < ends[:-1]))).any():
        raise ValueError("the windows of a recording must be in order of time")
    goes_on = same & active[1:] & active[:-1] & (starts[1:] <= ends[:-1] + TOUCH)
    is_first, is_last = active.copy(), active.copy()
    is_first[1:] &= ~goes_on
    is_last[:-1] &= ~goes_on
    return np.flatnonzero(is_first), np.flatnonzero(is_last)


def match_events(
    true: Events, predicted: Events, min_share: float = 0.5, min_iou: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match annotated and predicted events of the same class and recording, one to one.

    Two events fit if they share at least min_share of the shorter one, and if intersection / union
    is at least min_iou. An annotated point fits a predicted event that contains it, for min_iou 0.
    As many pairs as possible are matched (J. Hopcroft and R. Karp, 1973).

    The default is lenient, because predicted events are whole windows: a call of 0.3 s in a window
    of 3 s has an IoU of 0.1. It still needs half of the call in it. Stricter rules of the field:
    min_iou=0.3 with the same matching (DCASE few-shot bioacoustic event detection), 0.5 or 0.7 of
    both events (intersections of PSDS, C. Bilen et al., 2020), and onsets within 0.2 s (sed_eval).

    Returns match (e,): the predicted event of each annotated one, -1 if none; is_met (e,) and
    hits (p,) bool: whether an event fits any of the other side, matched or not.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    pairs = _fitting_pairs(true, predicted, min_share, min_iou)
    n_true, n_predicted = len(true.start), len(predicted.start)
    is_met, hits = np.zeros(n_true, bool), np.zeros(n_predicted, bool)
    is_met[pairs[0]], hits[pairs[1]] = True, True
    if len(pairs[0]) == 0:
        return np.full(n_true, -1), is_met, hits
    graph = coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(n_true, n_predicted))
    return maximum_bipartite_matching(graph.tocsr(), perm_type="column"), is_met, hits


def _fitting_pairs(true, predicted, min_share, min_iou):
    """Indices of annotated and of predicted events that fit: (k,), (k,)."""
    t, p = _near_pairs(true, predicted)
    overlap = np.minimum(true.end[t], predicted.end[p]) - np.maximum(
        true.start[t], predicted.start[p])
    length_true, length_predicted = (true.end - true.start)[t], (predicted.end - predicted.start)[p]
    shorter = np.minimum(length_true, length_predicted)
    union = length_true + length_predicted - overlap
    fits = (overlap > 0) | ((overlap == 0) & (shorter == 0))
    fits &= overlap >= min_share * shorter * (1 - ROUNDING)
    fits &= overlap >= min_iou * union * (1 - ROUNDING)
    return t[fits], p[fits]


def _near_pairs(true, predicted):
    """Indices (k,), (k,) of pairs that include all overlapping ones of a recording and class."""
    if len(true.start) == 0 or len(predicted.start) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # One time line, on which the recordings and classes lie one after the other, a second apart.
    keys = np.concatenate([np.stack([e.recording, e.label], axis=1) for e in (true, predicted)])
    key = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    earliest = min(true.start.min(), predicted.start.min())
    shift = key * (max(true.end.max(), predicted.end.max()) - earliest + 1) - earliest
    shift_true, shift_predicted = np.split(shift, [len(true.start)])
    order = np.argsort(predicted.start + shift_predicted, kind="stable")
    begin = (predicted.start + shift_predicted)[order]
    reached = np.maximum.accumulate((predicted.end + shift_predicted)[order])
    # TOUCH covers the rounding of large shifts.
    first = np.searchsorted(reached, true.start + shift_true - TOUCH, side="left")
    last = np.searchsorted(begin, true.end + shift_true + TOUCH, side="right")
    n_each = np.maximum(last - first, 0)
    t = np.repeat(np.arange(len(n_each)), n_each)
    within = np.arange(len(t)) - np.repeat(np.cumsum(n_each) - n_each, n_each)
    return t, order[np.repeat(first, n_each) + within]


def score_events(
    true: Events,
    predicted: Events,
    n_classes: int,
    n_recordings: int,
    min_share: float = 0.5,
    min_iou: float = 0.0,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute precision, recall and F1 of events, with 95% intervals over recordings.

    Matching as in `match_events`. Per class: "found" annotated events, "missed" ones, "false"
    predicted ones, and "precision", "recall", "f1", each with "..._ci95". "micro" is over all
    events, "macro" the mean over classes with annotated events. The precision of a class that is
    never predicted is undefined and left out of that mean.

    One predicted event that covers a series of calls is one match, and the other calls are missed.
    "recall_any" is the share of annotated events that fit any predicted event, "precision_any" the
    share of predicted events that fit any annotated one: they do not depend on such joins.

    Intervals: 2.5th to 97.5th percentile over `n_boot` resamples of the `n_recordings` recordings,
    those without events included. None for one recording, and if undefined (0 / 0) in the data.

    Returns {"recordings", "micro", "macro", "per_class": [...]} of plain Python numbers.
    Raises ValueError if a class or recording is out of range, or an event ends before its start.
    """
    from . import resample_counts  # here, because the package imports its modules

    true, predicted = (_check_events(events, n_classes, n_recordings)
                       for events in (true, predicted))
    match, is_met, hits = match_events(true, predicted, min_share, min_iou)
    is_matched = np.zeros(len(hits), bool)
    is_matched[match[match >= 0]] = True
    sides = ((true, match >= 0), (true, match < 0), (predicted, ~is_matched),
             (true, is_met), (predicted, hits))
    counts = np.stack([_count(events, mask, n_classes, n_recordings) for events, mask in sides])
    point = _ratios(counts.sum(axis=2, keepdims=True))  # of counts (5, C, R)
    intervals = {name: np.full((2, n_classes + 2), np.nan) for name in point}
    if n_recordings > 1:
        values = [_ratios(counts @ weights) for weights in
                  resample_counts(n_recordings, n_boot, seed)]
        for name in point:
            intervals[name] = _percentiles(np.concatenate([v[name] for v in values], axis=1))
    rows = [_row(point, intervals, c) for c in range(n_classes + 2)]
    totals = counts.sum(axis=2)  # (5, C)
    for row, column in zip(rows, [*totals.T, totals.sum(axis=1)]):
        row.update(zip(("found", "missed", "false"), map(int, column)))
    return {"recordings": n_recordings, "micro": rows[n_classes], "macro": rows[n_classes + 1],
            "per_class": rows[:n_classes]}


def _count(events, mask, n_classes, n_recordings):
    """How many of the events in the mask each class has in each recording: (C, R)."""
    cells = events.label[mask] * n_recordings + events.recording[mask]
    flat = np.bincount(cells, minlength=n_classes * n_recordings)
    return flat.reshape(n_classes, n_recordings).astype(np.float64)


def _ratios(counts):
    """Counts (5, C, r) of `score_events` -> {name: (C + 2, r)}: classes, micro, macro."""
    has_events = counts[0] + counts[1] > 0
    counts = np.concatenate([counts, counts.sum(axis=1, keepdims=True)], axis=1)
    found, missed, false, met, hits = counts
    ratios = {
        "precision": ratio(found, found + false),
        "recall": ratio(found, found + missed),
        "f1": ratio(2 * found, 2 * found + missed + false),
        "precision_any": ratio(hits, found + false),
        "recall_any": ratio(met, found + missed),
    }
    for name, values in ratios.items():
        # A class without predicted events has no precision: it is left out of that mean.
        is_defined = has_events & np.isfinite(values[:-1])
        total = np.where(is_defined, values[:-1], 0).sum(axis=0)
        ratios[name] = np.vstack([values, ratio(total, is_defined.sum(axis=0))])
    return ratios


def _percentiles(values):
    """2.5th and 97.5th percentile of values (C + 2, n_boot) without nan -> (2, C + 2)."""
    interval = np.full((2, len(values)), np.nan)
    for i, row in enumerate(values):
        row = row[np.isfinite(row)]
        if len(row):
            interval[:, i] = np.percentile(row, (2.5, 97.5))
    return interval


def _row(point, intervals, i):
    """Values and intervals of one class as plain numbers; None if undefined."""
    row = {}
    for name, values in point.items():
        value, interval = float(values[i, 0]), intervals[name][:, i]
        is_defined = np.isfinite(value)
        row[name] = value if is_defined else None
        has_interval = is_defined and np.isfinite(interval).all()
        row[f"{name}_ci95"] = interval.tolist() if has_interval else None
    return row


def _check_events(events, n_classes, n_recordings):
    recording, start, end, label = (np.asarray(values) for values in events)
    if not start.ndim == 1 or not recording.shape == start.shape == end.shape == label.shape:
        raise ValueError("events need as many recordings, starts, ends and classes")
    recording, label = recording.astype(np.int64), label.astype(np.int64)
    start, end = start.astype(np.float64), end.astype(np.float64)
    for codes, n, what in ((label, n_classes, "class"), (recording, n_recordings, "recording")):
        outside = np.flatnonzero((codes < 0) | (codes >= n))
        if len(outside):
            raise ValueError(f"{what} {codes[outside[0]]} of an event is outside 0..{n - 1}")
    if not (np.isfinite(start) & np.isfinite(end) & (start <= end)).all():
        raise ValueError("an event ends before its start, or a time is not finite")
    return Events(recording, start, end, label)
