"""Annotated recordings for an evaluation: windows of the model's length, and the true events."""
from typing import NamedTuple

import numpy as np

from data.annotations import AnnotationRules, cut_events
from data.clip_times import check_times
from data.load import load_manifest
from data.manifest import LabelSet, Manifest
from data.scan import scan
from util import plural, summarize

from .given_data import count_seen, readable_part

MAX_BAD_SHARE = 0.05  # of the events, whose times may lie beyond the end of their recordings


class TrueEvents(NamedTuple):
    """Annotated events of the run's classes, e of them."""
    path: list[str]
    start: np.ndarray  # (e,) seconds
    end: np.ndarray  # (e,) seconds
    label: np.ndarray  # (e,) classes


def annotated_windows(run: Manifest, data: str, audio_dir: str | None, rules: AnnotationRules,
                      seconds: float) -> tuple[Manifest, TrueEvents, list[str]]:
    """Annotated recordings as windows with the classes of a run -> (manifest, events, notes).

    Events of other classes are left out: a window with only such events contains none of the run's
    classes. Raises DataError if no recording can be read.
    """
    given = load_manifest(data, audio_dir, run.classes, annotated=rules.annotated,
                          label_column=rules.label_column)
    notes = [f"annotations: {given.root}", *(f"  {note}" for note in given.notes)]
    unknown = [name for name in given.classes if name not in run.classes]
    if unknown:
        notes.append(f"  events of classes that the checkpoint does not know count as none: "
                     f"{summarize(unknown)}")
    given = _in_classes(given, run.classes)
    found = scan(given, None, full=False)
    check_times(given, found.file_seconds, found.rate, MAX_BAD_SHARE)
    readable_events, readable = readable_part(
        given, found, f"--annotations {data}: none of the recordings")
    if len(readable) < len(given):
        notes.append(f"  left out: {plural(len(given) - len(readable), 'event')} that cannot be "
                     f"read, such as {given.paths[min(found.reasons)]}: "
                     f"{found.reasons[min(found.reasons)]}")
    given = readable_events
    length = found.file_seconds[readable]
    windows, _ = cut_events(given, length, seconds, rules)
    notes.append(f"  {windows.notes[-1]}")
    windows.split = np.full(len(windows), -1, np.int8)
    n_seen = count_seen(run, windows, np.arange(len(windows)))
    if n_seen:
        notes.append(f"LEAK: {n_seen} of {len(windows)} windows are of recordings used in training "
                     "or validation of this checkpoint: the results are too good")
    return windows, _events_of(given, length), notes


def _in_classes(given, classes):
    """The manifest with the classes of a run; a row may lose its labels, but stays."""
    index = {name: classes.index(name) for name in given.classes if name in classes}
    new_index = [index.get(name, -1) for name in given.classes]

    def translate(old_classes):
        return tuple(new_index[c] for c in old_classes if new_index[c] >= 0)

    sets = [LabelSet(translate(s.present), translate(s.unknown)) for s in given.label_sets]
    given.classes = list(classes)
    return given.with_label_sets([sets[i] for i in given.label_set])


def _events_of(given, length):
    rows, labels = given.positives(np.arange(len(given)))
    end = np.where(np.isnan(given.end), length, given.end)
    return TrueEvents([given.paths[row] for row in rows.tolist()], given.start[rows], end[rows],
                      labels)
