"""Windows of an annotated recording: which classes are present in each, and which are unknown.

Times are rounded to integer microseconds first, so that every comparison is exact.
"""
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..audio import tile_starts

TICKS = 1_000_000  # per second
PARTS = 1_000_000  # min_fraction is rounded to millionths


class Windows(NamedTuple):
    """w windows of a recording and what is in them.

    starts, ends: (w,) seconds. present: (w, C) bool. partial: (w, C) bool, classes that reach into
    the window but not enough: they are unknown there, neither present nor absent.
    """
    starts: np.ndarray
    ends: np.ndarray
    present: np.ndarray
    partial: np.ndarray


def windows_of(
    events_start: ArrayLike,
    events_end: ArrayLike,
    events_class: ArrayLike,
    duration: float,
    seconds: float,
    hop: float,
    n_classes: int,
    min_overlap: float = 0.25,
    min_fraction: float = 0.5,
) -> Windows:
    """Cut one recording of `duration` seconds into windows and label them by its events.

    events_start, events_end: (e,) seconds; equal if the event is a point. events_class: (e,) ints
    below n_classes. Only the part of an event within the recording counts.

    Windows of `seconds` start every `hop` seconds; the last is moved back to end with the
    recording (`audio.tile_starts`). A recording shorter than a window is one window.

    A class is present in a window in three cases. It has a point event there. Or its events cover
    at least min_overlap seconds of the window, all together, overlaps counted once. Or one event
    has at least min_fraction of its own length there, so one that lies within it always counts.

    The rules follow `BoxedAnnotations.clip_labels` of opensoundscape, and the defaults its advice:
    a min_label_overlap of 0.25 s for bird songs, less for very short calls. With a
    min_label_fraction of 0.5 every event counts in at least one window if there are no gaps.
    Unlike here, it makes partial classes absent, and measures each event on its own.

    Raises ValueError if an argument is out of range.
    """
    total, length, step = (_positive_ticks(*pair) for pair in (
        (duration, "duration"), (seconds, "seconds"), (hop, "hop")))
    if min_overlap < 0 or not 0 < min_fraction <= 1:
        raise ValueError(f"min_overlap must be at least 0 and min_fraction in (0, 1], "
                         f"got {min_overlap} and {min_fraction}")
    start, end, label = _check_events(events_start, events_end, events_class, n_classes)
    starts = np.array(tile_starts(total, length, step), dtype=np.int64)
    ends = np.minimum(starts + length, total)
    present = np.zeros((len(starts), n_classes), dtype=bool)
    touched = np.zeros_like(present)

    is_point = start == end
    inside = is_point & (start <= total)
    # A window contains its start but not its end, except at the end of the recording.
    first = np.minimum(np.searchsorted(ends, start[inside], side="right"), len(ends) - 1)
    last = np.searchsorted(starts, start[inside], side="right")
    event, window = _pairs(first, last)
    present[window, label[inside][event]] = True

    start, end = np.maximum(start, 0), np.minimum(end, total)
    inside = ~is_point & (start < end)
    start, end, label = start[inside], end[inside], label[inside]
    event, window, overlap = _overlaps(start, end, starts, ends)
    touched[window, label[event]] = True
    is_enough = overlap * PARTS >= round(min_fraction * PARTS) * (end - start)[event]
    present[window[is_enough], label[event][is_enough]] = True

    start, end, label = _union(start, end, label, total)
    event, window, overlap = _overlaps(start, end, starts, ends)
    cells, cell_of = np.unique(window * n_classes + label[event], return_inverse=True)
    covered = np.bincount(cell_of, weights=overlap, minlength=len(cells))  # integers below 2^53
    cells = cells[covered >= round(min_overlap * TICKS)]
    present[cells // n_classes, cells % n_classes] = True
    return Windows(starts / TICKS, ends / TICKS, present, touched & ~present)


def _overlaps(start, end, starts, ends):
    """Pairs of events and windows that share time -> event (p,), window (p,), overlap (p,) ticks.

    start, end: (e,) of events. starts, ends: (w,) of windows, both ascending.
    """
    first = np.searchsorted(ends, start, side="right")
    last = np.searchsorted(starts, end, side="left")
    event, window = _pairs(first, last)
    overlap = np.minimum(end[event], ends[window]) - np.maximum(start[event], starts[window])
    return event, window, overlap


def _pairs(first, last):
    """All (i, j) with first[i] <= j < last[i], as two arrays."""
    n_each = np.maximum(last - first, 0)
    i = np.repeat(np.arange(len(first)), n_each)
    offsets = np.cumsum(n_each) - n_each
    j = np.arange(len(i)) - np.repeat(offsets, n_each) + np.repeat(first, n_each)
    return i, j


def _union(start, end, label, total):
    """Join the events of each class that overlap or touch. All are within 0..total ticks."""
    if len(start) == 0:
        return start, end, label
    # One time line, on which the classes lie one after the other with a gap.
    shift = label * (total + 1)
    order = np.argsort(start + shift, kind="stable")
    start, end, label, shift = (values[order] for values in (start, end, label, shift))
    reached = np.maximum.accumulate(end + shift)
    begins = np.flatnonzero(np.concatenate(([True], start[1:] + shift[1:] > reached[:-1])))
    finishes = np.concatenate((begins[1:], [len(start)])) - 1
    return start[begins], (reached - shift)[finishes], label[begins]


def _positive_ticks(value, name):
    ticks = round(value * TICKS)
    if ticks < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return ticks


def _check_events(start, end, label, n_classes):
    """(e,) int64 ticks, ticks and classes. Raises ValueError."""
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
    label = np.asarray(label)
    if start.ndim != 1 or start.shape != end.shape or start.shape != label.shape:
        raise ValueError(f"events have {start.shape} starts, {end.shape} ends, "
                         f"{label.shape} classes")
    bad = np.flatnonzero(~((start <= end) & np.isfinite(start) & np.isfinite(end)))
    if len(bad):
        raise ValueError(f"event {bad[0]} is from {start[bad[0]]} s to {end[bad[0]]} s")
    label = label.astype(np.int64)
    if len(label) and not (label.min() >= 0 and label.max() < n_classes):
        raise ValueError(f"classes of events must be 0..{n_classes - 1}")
    return (np.rint(start * TICKS).astype(np.int64), np.rint(end * TICKS).astype(np.int64), label)
