"""False alarms on recordings that contain none of the classes: file, figures and words."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metrics.false_alarms import false_alarms, recall_at, reported_classes
from util import CsvWriter, atomic_write, plural

RATES = (0.1, 1, 10)  # false alarms of a class per hour, for which recall is given
HOW_TO = ("give recordings that contain none of the classes, in a folder called noise, as rows "
          "with an empty label, or with --negatives")


def write_false_alarms(path: Path, calibrated: np.ndarray, result, manifest,
                       classes: Sequence[str], calibration: dict) -> dict | None:
    """Write a row for each false alarm, highest score first -> figures for metrics.json.

    None, and no file, without a negative. calibrated: (n, C) scores of `result`, an Evaluation.
    The figures are those of `metrics.false_alarms`, and "recall_at": see there.
    """
    negative = manifest.is_negative[result.rows]
    if not negative.any():
        path.unlink(missing_ok=True)  # of earlier data
        return None
    scores, rows = calibrated[negative], result.rows[negative]
    hours = manifest.duration[rows] / 3600
    top_k = None if manifest.multi_label else 1
    figures = false_alarms(scores, calibration["thresholds"], hours, manifest.group[rows], top_k)
    labelled = manifest.has_label[result.rows]
    figures["recall_at"] = recall_at(calibrated[labelled], result.labels[labelled], scores, hours,
                                     RATES, top_k)
    windows, alarms = np.nonzero(reported_classes(scores, calibration["thresholds"], top_k))
    order = np.argsort(-scores[windows, alarms], kind="stable")
    with atomic_write(path) as file:
        out = CsvWriter(file)
        out.writerow(["path", "start", "end", "class", "score"])
        for window, c in zip(windows[order].tolist(), alarms[order].tolist()):
            row = rows[window]
            end = manifest.start[row] + manifest.duration[row]
            out.writerow([manifest.paths[row], f"{manifest.start[row]:g}", f"{end:g}", classes[c],
                          f"{scores[window, c]:.6f}"])
    return figures


def false_alarm_lines(figures: dict | None) -> list[str]:
    """Lines for the terminal."""
    if figures is None:
        return ["  false alarms       not known; " + HOW_TO]
    low, high = figures["per_hour_ci95"]
    lines = [f"  {'false alarms':<18} {figures['per_hour']:.1f} per hour   (95% interval {low:.1f} "
             f"to {high:.1f}; {plural(figures['windows_with_alarm'], 'window')} in "
             f"{figures['hours']:.2f} h with none of the classes, from "
             f"{plural(figures['recordings'], 'recording')})"]
    recall_at_rate = mean_recalls(figures)
    recalls = [f"{recall:.3f} at {rate}" if recall is not None else f"not known at {rate}"
               for rate, recall in recall_at_rate.items()]
    too_few = ""
    if None in recall_at_rate.values():
        too_few = "; not known, since the hours are too few"
    lines.append(f"  {'recall':<18} {', '.join(recalls)} false alarms of a class per hour{too_few}")
    return lines


def mean_recalls(figures: dict) -> dict[str, float | None]:
    """{false alarms per hour: mean recall of the classes, None if there is too little audio}."""
    return {at["per_hour"]: at["recall"] for at in figures["recall_at"]["at"]}
