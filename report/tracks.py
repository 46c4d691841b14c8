"""Predictions for the windows of a recording, in the formats that other programs read.

Each function takes an open text file and returns one that writes a window: its start and end in
seconds and [(class, score as text)], best first.
"""
import itertools
import json
from collections.abc import Callable, Sequence
from typing import TextIO

from util import CsvWriter, printable

RAVEN = ("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)",
         "High Freq (Hz)", "Label", "Score")


def labelled(scores: Sequence[tuple[int, float]], classes: Sequence[str]
             ) -> list[tuple[str, str]]:
    """[(class index, score)] -> [(class, score as text)]."""
    return [(classes[i], f"{score:.6f}") for i, score in scores]


def window_rows(file: TextIO, recording) -> Callable:
    """CSV: a row for each window and class, one with an empty label if no class is predicted."""
    def write(start, end, labels):
        window = [recording.path, f"{start:.3f}", f"{end:.3f}"]
        CsvWriter(file).writerows([*window, *label] for label in labels or [("", "")])
    return write


def window_lines(file: TextIO, recording) -> Callable:
    """JSON, a line for each window.

    A byte of the path that is not UTF-8 is an escaped lone surrogate, as Python reads it.
    """
    def write(start, end, labels):
        row = {"path": recording.path, "start": round(start, 3), "end": round(end, 3),
               "labels": [{"label": label, "score": float(score)} for label, score in labels]}
        text = json.dumps(row, ensure_ascii=False)
        file.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
    return write


def selection_table(file: TextIO, low: float, high: float) -> Callable:
    """A selection table of Raven Pro, tab-separated, in the band from `low` to `high` Hz."""
    band, numbers = f"{low:.1f}\t{high:.1f}", itertools.count(1)
    file.write("\t".join(RAVEN) + "\n")

    def write(start, end, labels):
        for label, score in labels:
            file.write(f"{next(numbers)}\tSpectrogram 1\t1\t{start:.6f}\t{end:.6f}\t{band}\t"
                       f"{printable(label)}\t{score}\n")
    return write


def label_track(file: TextIO) -> Callable:
    """A label track of Audacity.

    https://manual.audacityteam.org/man/importing_and_exporting_labels.html
    """
    def write(start, end, labels):
        for label, _ in labels:
            file.write(f"{start:.6f}\t{end:.6f}\t{printable(label)}\n")
    return write
