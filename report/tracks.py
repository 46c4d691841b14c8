"""What was predicted for the windows of a recording, in the forms that other programs read.

Each function takes an open text file and gives one that writes a window: its start and end in seconds and
[(class, score as text)], best first.
"""
import csv
import itertools
import json

from .markup import clean

RAVEN = "Selection,View,Channel,Begin Time (s),End Time (s),Low Freq (Hz),High Freq (Hz),Label,Score".split(",")


def labelled(found, classes):
    return [(classes[i], f"{score:.6f}") for i, score in found]


def window_rows(file, recording):
    """CSV: a row for each window and class, one with an empty label where there is none."""
    def write(start, end, found):
        csv.writer(file).writerows([recording.path, f"{start:.3f}", f"{end:.3f}", *one] for one in found or [("", "")])
    return write


def window_lines(file, recording):
    """JSON, a line for each window; a byte of the path that is not UTF-8 is an escaped lone surrogate, as Python reads it."""
    def write(start, end, found):
        row = {"path": recording.path, "start": round(start, 3), "end": round(end, 3),
               "labels": [{"label": label, "score": float(score)} for label, score in found]}
        file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n")
    return write


def selection_table(file, low, high):
    """A selection table of Raven Pro: columns with tabs between, numbered selections, in the band from `low` to `high` Hz."""
    band, number = f"{low:.1f}\t{high:.1f}", itertools.count(1)
    file.write("\t".join(RAVEN) + "\n")

    def write(start, end, found):
        for label, score in found:
            file.write(f"{next(number)}\tSpectrogram 1\t1\t{start:.6f}\t{end:.6f}\t{band}\t{clean(label)}\t{score}\n")
    return write


def label_track(file):
    """A label track of Audacity, https://manual.audacityteam.org/man/importing_and_exporting_labels.html"""
    def write(start, end, found):
        for label, _ in found:
            file.write(f"{start:.6f}\t{end:.6f}\t{clean(label)}\n")
    return write
