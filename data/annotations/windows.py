"""Annotated recordings -> a manifest: first a row per event, then a row per window.

The events of a recording become windows once its length is known, after the scan. What an
annotation does not cover is either known to be empty or unknown; a person has to say which.
"""
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from util import plural

from ..build import build_manifest
from ..grouping import indices_by_value
from ..manifest import LabelSet, Manifest
from .event_windows import windows_of
from .load import Annotations, Event

MODES = {
    "all": "everything of the classes is annotated: the rest of a recording contains none of them",
    "parts": "only parts are annotated: what is in the rest is not known, so it is not used",
}

class AnnotationRules(NamedTuple):
    """How a person wants annotated events to be read."""
    annotated: str | None = None  # a key of MODES; None: the data are no annotations
    label_column: str | None = None  # of the tables; None: the one that looks like it
    min_overlap: float = 0.25  # seconds of an event in a window, for its class to count
    min_fraction: float = 0.5  # of an event in a window, for its class to count


POINT = 1e-3  # seconds that an event without a length gets


def manifest_of_events(annotations: Annotations, annotated: str,
                       known_classes: Collection[str] = (), real_classes: Collection[str] = ()
                       ) -> Manifest:
    """A row for each event, and for each stretch in which nothing was found.

    annotated: a key of `MODES`; with "all", a recording without any event is such a stretch. See
    `build_manifest` for known_classes and real_classes.
    """
    events = list(annotations.events)
    if annotated == "all":
        known = {event.path for event in events}
        events += [Event(path, 0.0, np.nan, (), np.nan, np.nan)
                   for path in annotations.recordings if path not in known]
    start = np.array([event.start for event in events])
    end = np.array([max(event.end, event.start + POINT) for event in events])  # nan stays
    label_names = [(event.labels, ()) for event in events]
    manifest = build_manifest(
        annotations.name, annotations.root, [event.path for event in events],
        [names[0] if names else "" for names, _ in label_names], list(annotations.notes),
        start=start.astype(np.float32), end=end.astype(np.float32), label_names=label_names,
        known_classes=known_classes, real_classes=real_classes)
    if not manifest.multi_label:
        manifest = manifest.with_label_sets(
            [((int(label),) if label >= 0 else (), ()) for label in manifest.labels])
    manifest.sources = dict(annotations.sources)
    return manifest


def cut_events(manifest: Manifest, file_seconds: np.ndarray, seconds: float,
               rules: AnnotationRules) -> tuple[Manifest, np.ndarray]:
    """Cut annotated recordings into windows with the classes that they contain.

    manifest: of `manifest_of_events`, to which negatives may have been added. file_seconds: (n,)
    length of each row's file. Which classes count in a window: see `windows_of`. A class with less
    of an event in it than the rules want is unknown there.

    -> (manifest with a row per window and `duration`, (n,) a row that each was made from).
    """
    path_code = np.unique(np.array(manifest.paths, object), return_inverse=True)[1]
    rows, starts, ends, label_sets = [], [], [], []
    for own in indices_by_value(path_code):
        events, classes = manifest.positives(own)
        length = float(file_seconds[own[0]])
        start, end = manifest.start[own], np.nan_to_num(manifest.end[own], nan=length)
        window_start, window_end, present, partial = windows_of(
            start[events], end[events], classes, length, seconds, seconds, len(manifest.classes),
            rules.min_overlap, rules.min_fraction)
        is_empty = ~manifest.has_label[own]
        is_known = _are_within(window_start, window_end, start[is_empty], end[is_empty])
        for i in range(len(window_start)):
            label_set = LabelSet(tuple(np.flatnonzero(present[i]).tolist()),
                                 tuple(np.flatnonzero(partial[i]).tolist()))
            if rules.annotated == "parts" and not label_set.present and not is_known[i]:
                continue
            rows.append(own[0])
            starts.append(window_start[i])
            ends.append(window_end[i])
            label_sets.append(label_set)
    rows = np.array(rows, np.int64)
    windows = manifest.select(rows)
    starts, ends = np.array(starts, np.float64), np.array(ends, np.float64)
    windows = replace(
        windows, start=starts.astype(np.float32), end=ends.astype(np.float32),
        duration=(ends - starts).astype(np.float32)).with_label_sets(label_sets)
    windows.notes.append(_describe(windows, seconds, rules))
    return windows, rows


def _are_within(window_start, window_end, start, end):
    """(w,) bool: which windows lie within stretches (s,), which may touch or overlap."""
    order = np.argsort(start)
    joined = []
    for begin, finish in zip(start[order].tolist(), end[order].tolist()):
        if joined and begin <= joined[-1][1] + POINT:
            joined[-1][1] = max(joined[-1][1], finish)
        else:
            joined.append([begin, finish])
    within = np.zeros(len(window_start), bool)
    for begin, finish in joined:
        within |= (window_start >= begin - POINT) & (window_end <= finish + POINT)
    return within


def _describe(windows, seconds, rules):
    n_negative = int(windows.is_negative.sum())
    rest = f"{n_negative} of them without any class" if rules.annotated == "all" else (
        "the rest of the recordings is unknown and not used")
    return (f"annotations: {plural(len(windows), 'window')} of {seconds:g} s, {rest}; a class "
            f"counts if {rules.min_overlap:g} s or {rules.min_fraction:.0%} of an event are in it")
