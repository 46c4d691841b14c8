"""Results of an evaluation on annotated recordings: by event, by recording, by site and day."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metrics.events import Events, join_all_windows, match_events, score_events
from util import CsvWriter, atomic_write, plural


def write_event_results(folder: Path, result, windows, active: np.ndarray, true_events,
                        places: Sequence[tuple[str, str]]) -> dict:
    """Write recordings.csv and places.csv -> figures by event, for metrics.json.

    A predicted event is a run of windows above the threshold of a class.

    Args:
        result: the Evaluation of the windows; `windows` is their manifest.
        active: (n, C) bool, the classes that are reported in each window of `result`.
        true_events: path (e,), start, end and label (e,) of the annotated events.
        places: (site, day) of each recording in the sorted order of the paths, "" if not known.
    """
    paths = sorted(set(windows.paths))
    code_of = {path: code for code, path in enumerate(paths)}
    recording = np.array([code_of[windows.paths[row]] for row in result.rows])
    order = np.lexsort((windows.start[result.rows], recording))
    rows = result.rows[order]
    predicted = join_all_windows(recording[order], windows.start[rows], windows.end[rows],
                                 active[order])
    true = Events(np.array([code_of[path] for path in true_events.path], np.int64),
                  np.asarray(true_events.start, np.float64),
                  np.asarray(true_events.end, np.float64), np.asarray(true_events.label))
    figures = score_events(true, predicted, active.shape[1], len(paths))
    counts = _count(true, predicted, len(paths))
    hours = np.zeros(len(paths))
    np.maximum.at(hours, recording, windows.end[result.rows] / 3600)
    columns = ["hours", "events", "found", "missed", "false"]
    with atomic_write(folder / "recordings.csv") as file:
        out = CsvWriter(file)
        out.writerow(["path", "site", "day", *columns])
        for code, path in enumerate(paths):
            out.writerow([path, *places[code], f"{hours[code]:.4f}", *counts[:, code].tolist()])
    with atomic_write(folder / "places.csv") as file:
        out = CsvWriter(file)
        out.writerow(["site", "day", "recordings", *columns])
        for place in sorted(set(places)):
            own = np.array([other == place for other in places])
            out.writerow([*place, int(own.sum()), f"{hours[own].sum():.4f}",
                          *counts[:, own].sum(axis=1).tolist()])
    return figures


def _count(true, predicted, n_recordings):
    """(4, R): annotated, found, missed and false events of each recording."""
    match, _, _ = match_events(true, predicted)
    is_false = np.ones(len(predicted.start), bool)
    is_false[match[match >= 0]] = False
    parts = (true.recording, true.recording[match >= 0], true.recording[match < 0],
             predicted.recording[is_false])
    return np.stack([np.bincount(part, minlength=n_recordings) for part in parts])


def event_lines(figures: dict) -> list[str]:
    """Lines for the terminal."""
    total = figures["micro"]
    line = (f"  events, of joined windows: {total['found']} found, {total['missed']} missed, "
            f"{total['false']} false, in {plural(figures['recordings'], 'recording')}")
    values, has_intervals = [], False
    for name in ("precision", "recall", "f1"):
        if total[name] is None:
            continue
        interval = total[f"{name}_ci95"]
        has_intervals |= interval is not None
        shown = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        values.append(f"{name} {total[name]:.3f}{shown}")
    if not values:
        return [line]
    over = "; 95% intervals over recordings" if has_intervals else ""
    return [line, f"    {', '.join(values)}{over}"]
