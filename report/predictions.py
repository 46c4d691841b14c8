"""What predict.py writes: one part per recording while it runs, then tables of all recordings.

A recording is a `data.stream.Recording`. Its part lies in parts/ under a name that is a hash of the
file's path: a line of JSON that sums it up, then a line for each window, [start, end, [[class,
score], ...]], with start and end in samples. A part appears only when it is complete, so a stopped
run continues with the recordings that have none.
"""
import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from report.tracks import label_track, labelled, selection_table, window_lines, window_rows
from util import CsvWriter, atomic_write

# Formats with a file for each recording, and how its name ends.
SUFFIXES = {"raven": ".Table.1.selections.txt", "audacity": ".txt", "embeddings": ".npz"}

# Names of the temporary files that util.atomic_write leaves behind if the process is killed.
LEFTOVER = re.compile(r"\.(settings\.json|(files|classes|windows|bad_files)\.csv|windows\.jsonl|"
                      r"[0-9a-f]{32}\.(jsonl|npz))\.[a-z0-9_]{8}")

Labels = list[list]  # [class index, calibrated score], best first


class RecordingWriter:
    """Collect the results of one recording, then write its part.

    Until then they are in unnamed temporary files, so that memory does not grow with the
    recording. label(probabilities (classes,)) -> Labels. dim: size of the features to write, or 0.
    """

    def __init__(self, folder: Path, recording, label: Callable[[np.ndarray], Labels], dim: int):
        self.folder, self.recording, self.label, self.dim = folder, recording, label, dim
        self.rows = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115
        self.features = tempfile.TemporaryFile(dir=folder) if dim else None  # noqa: SIM115
        self.sum_of_probabilities, self.n_windows, self.n_silent, self.n_samples = 0.0, 0, 0, 0

    def add(self, start: int, end: int, probabilities: np.ndarray, features: np.ndarray,
            is_silent: bool = False) -> int:
        """Add a window, start and end in samples -> samples that no window before covered.

        is_silent: the window has no signal; it gets no label and does not count in the mean.
        """
        labels = [] if is_silent else self.label(probabilities)
        self.rows.write(json.dumps([start, end, labels]) + "\n")
        if self.dim:
            self.features.write(features.tobytes())
        n_new = end - self.n_samples
        if is_silent:
            self.n_silent += 1
        else:
            self.sum_of_probabilities = self.sum_of_probabilities + probabilities
        self.n_windows += 1
        self.n_samples = end
        return n_new

    def finish(self, reason: str | None, rate: int) -> None:
        """Write the part: all windows were added, or there will be no more for this reason."""
        path = part_path(self.folder, self.recording)
        head = {"size": self.recording.size, "mtime_ns": self.recording.mtime_ns, "reason": reason,
                "truncated": self.recording.truncated}
        if reason is None:
            # The calibration was fitted on means over a clip, so it is applied to the mean.
            n_with_signal = self.n_windows - self.n_silent
            scores = []
            if n_with_signal:
                scores = self.label(self.sum_of_probabilities / n_with_signal)
            head |= {"windows": self.n_windows, "scores": scores, "silent": self.n_silent,
                     "bytes": self.rows.tell()}
            if self.dim:
                self._write_features(path.with_suffix(".npz"), rate)
        with atomic_write(path, durable=False) as file:  # a lost part is made again
            file.write(json.dumps(head) + "\n")
            if reason is None:
                self.rows.seek(0)
                shutil.copyfileobj(self.rows, file)

    def _write_features(self, path, rate):
        self.features.flush()
        self.rows.seek(0)
        spans = np.array([json.loads(line)[:2] for line in self.rows]) / rate  # (windows, 2)
        shape = (self.n_windows, self.dim)
        with atomic_write(path, "wb", durable=False) as file:
            np.savez(file, embeddings=np.memmap(self.features, np.float32, "r", shape=shape),
                     start=spans[:, 0], end=spans[:, 1])


def part_path(folder: Path, recording) -> Path:
    return folder / f"{recording.key}.jsonl"


def finished_part(folder: Path, recording, embeddings: bool) -> dict | None:
    """The first line of a recording's part; None if there is no complete one.

    Also None if the recording has changed since.
    """
    path = part_path(folder, recording)
    try:
        with open(path, "rb") as file:
            line = file.readline()
        head = json.loads(line)
        if (head["size"], head["mtime_ns"]) != (recording.size, recording.mtime_ns):
            return None
        if head["reason"] is None:
            if path.stat().st_size != len(line) + head["bytes"]:
                return None
            if embeddings and not path.with_suffix(".npz").exists():
                return None
        return head
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sort_by_outcome(out: Path, recordings: Sequence) -> tuple[list, list[tuple[str, str]]]:
    """(recordings with predictions, (path, reason) of the others).

    Removes older results of the others, which may have been readable before.
    """
    good, bad = [], []
    for recording in recordings:
        if recording.reason is None:
            with open(part_path(out / "parts", recording), "rb") as file:
                head = json.loads(file.readline())
            recording.reason, recording.truncated = head["reason"], head.get("truncated")
        if recording.reason is None:
            good.append(recording)
            continue
        bad.append((recording.path, recording.reason))
        for name in SUFFIXES:
            own_file(out, name, recording).unlink(missing_ok=True)
    return good, bad


def own_file(out: Path, name: str, recording) -> Path:
    """The file that a recording has of its own in the format `name`."""
    return out / name / (recording.name + SUFFIXES[name])


def link_embeddings(out: Path, recordings: Sequence, link: Callable[[Path, Path], None]) -> None:
    for recording in recordings:
        path = own_file(out, "embeddings", recording)
        path.parent.mkdir(parents=True, exist_ok=True)
        link(part_path(out / "parts", recording).with_suffix(".npz"), path)


def assemble_tables(out: Path, recordings: Sequence, formats: Sequence[str],
                    classes: Sequence[str], config) -> tuple[list[str], int, int, int]:
    """Put the parts of the recordings together in these formats.

    config: the FrontendConfig. Returns (what was written, silent windows, other windows without
    a class, windows).
    """
    n_silent = n_empty = n_windows = 0
    tables = [name for name in formats if name not in SUFFIXES]  # csv, jsonl: one for all
    own = [name for name in formats if name in SUFFIXES]
    with contextlib.ExitStack() as stack:
        def new_table(name):
            return stack.enter_context(atomic_write(out / name, durable=False))

        files, counts = CsvWriter(new_table("files.csv")), CsvWriter(new_table("classes.csv"))
        files.writerow(["path", "seconds", "windows", "label", "score"])
        counts.writerow(["path", "label", "windows", "highest", "at"])
        together = {name: new_table(f"windows.{name}") for name in tables}
        if "csv" in together:
            CsvWriter(together["csv"]).writerow(["path", "start", "end", "label", "score"])
        for recording in recordings:
            head, summary = _copy_windows(out, recording, together, own, classes, config)
            seconds = f"{recording.info.seconds:.3f}"
            for label, score in labelled(head["scores"], classes) or [("", "")]:
                files.writerow([recording.path, seconds, head["windows"], label, score])
            counts.writerows(summary.rows(recording.path, classes, config.sample_rate))
            n_silent += head.get("silent", 0)
            n_empty += summary.n_empty
            n_windows += summary.n_windows
    written = ["files.csv", "classes.csv", *(f"windows.{name}" for name in tables),
               *(f"{name}/" for name in own)]
    return written, n_silent, n_empty - n_silent, n_windows


def _copy_windows(out, recording, tables, own, classes, config):
    """Copy a recording's windows from its part to all formats -> (first line, _ClassSummary)."""
    rate, summary = config.sample_rate, _ClassSummary()
    with contextlib.ExitStack() as stack:
        writers = []
        for name, table in tables.items():
            new_writer = window_rows if name == "csv" else window_lines
            writers.append(new_writer(table, recording))
        for name in own:
            file = stack.enter_context(
                atomic_write(own_file(out, name, recording), durable=False))
            if name == "raven":
                highest = min(config.fmax, recording.info.rate / 2)
                writers.append(selection_table(file, config.fmin, highest))
            else:
                writers.append(label_track(file))
        part = stack.enter_context(open(part_path(out / "parts", recording), encoding="utf-8"))
        head = json.loads(part.readline())
        for line in part:
            start, end, labels = json.loads(line)
            for write in writers:
                write(start / rate, end / rate, labelled(labels, classes))
            summary.add(start, labels)
    return head, summary


class _ClassSummary:
    """In how many windows each class is predicted, and where its score is highest."""

    def __init__(self):
        self.by_class = {}  # class index -> (windows, highest score, start of that window)
        self.n_windows = self.n_empty = 0

    def add(self, start, labels):
        self.n_windows += 1
        self.n_empty += not labels
        for i, score in labels:
            n, highest, place = self.by_class.get(i, (0, -1.0, 0))
            if score > highest:
                highest, place = score, start
            self.by_class[i] = n + 1, highest, place

    def rows(self, path, classes, rate):
        """Rows of classes.csv, the most frequent class first."""
        ordered = sorted(self.by_class.items(), key=lambda item: -item[1][0])
        return [[path, classes[i], n, f"{highest:.6f}", f"{place / rate:.3f}"]
                for i, (n, highest, place) in ordered]


def foreign_files(out: Path) -> list[str]:
    """Names in a folder without settings.json that predict.py does not write before them."""
    return sorted(name for name in os.listdir(out)
                  if name not in (".lock", "parts") and not LEFTOVER.fullmatch(name))


def remove_leftovers(out: Path) -> None:
    """Remove temporary files of a process that was killed; the folder must be locked."""
    for folder in (out, out / "parts"):
        for name in os.listdir(folder):
            if LEFTOVER.fullmatch(name):
                (folder / name).unlink(missing_ok=True)
