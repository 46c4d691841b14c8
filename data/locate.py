"""Find the audio files that a table names, in the folders where data sets have them."""
import os
from pathlib import Path
from typing import NamedTuple

from .csv_table import Table
from .manifest import DataError

# Folders beside a table that may contain its audio; BirdCLEF uses train_audio (since 2022) and
# train_short_audio (2021).
AUDIO_FOLDERS = (".", "audio", "train_audio", "train_short_audio", "../audio")
N_PROBES = 50  # rows that are tried to choose a layout


class _Layout(NamedTuple):
    """One way to read the paths of a table."""
    root: str  # absolute; every file must be inside
    base: str  # absolute; the folder that paths are relative to
    folders: list[str]  # of each row: a folder below `base`, "" for none

    def path(self, row, text):
        """The row's path relative to the root; None if it is outside."""
        folder = self.folders[row]
        if folder and os.path.normpath(text).startswith("../"):
            return None  # it would only undo the folder
        path = os.path.normpath(os.path.join(self.base, folder, text))
        prefix = self.root.rstrip("/") + "/"
        return path[len(prefix):] if path.startswith(prefix) else None

    def exists(self, row, text):
        path = self.path(row, text)
        return path is not None and os.path.lexists(os.path.join(self.root, path))


def locate_files(table: Table, audio_dir: str | os.PathLike | None, texts: list[str],
                 labels: list[str], folds: list[int] | None) -> tuple[Path, list[str]]:
    """Find the files of a table: the root folder and each row's path below it.

    texts: each row's path as the table has it. labels, folds: each row's label and fold, which
    may be the name of the folder that contains the file (dog/, fold3/).

    Raises DataError if a path is outside the root or a file is missing.
    """
    layouts = _layouts(table, audio_dir, len(texts), labels, folds)
    probes = range(0, len(texts), max(1, len(texts) // N_PROBES))

    def n_found(layout):
        return sum(layout.exists(row, texts[row]) for row in probes)

    layout = max(layouts, key=n_found)  # the first of equals
    paths = [layout.path(row, text) for row, text in enumerate(texts)]
    if None in paths:
        row = paths.index(None)
        raise DataError(f"{table.path} row {table.numbers[row]}: {texts[row]} is outside "
                        f"{layout.root}; give --audio-dir, a folder that contains all the audio")
    missing = [row for row, text in enumerate(texts) if not layout.exists(row, text)]
    if missing:
        row = missing[0]
        raise DataError(
            f"{table.path} row {table.numbers[row]}: {texts[row]} is not in {layout.root} "
            f"({len(missing)} of {len(texts)} rows name a missing file); give --audio-dir, or fix "
            "the paths")
    return Path(layout.root), paths


def _layouts(table, audio_dir, n, labels, folds):
    """The layouts to try, the likeliest first."""
    table_folder = str(table.path.parent)
    if audio_dir is None:
        roots = [os.path.normpath(table.path.parent / folder) for folder in AUDIO_FOLDERS]
        bases = [(root, root) for root in roots]
    else:
        root = os.path.abspath(audio_dir)
        if not os.path.isdir(root):
            raise DataError(f"--audio-dir {audio_dir}: no such folder; give the one that contains "
                            "the CSV's files")
        bases = [(root, root), (root, table_folder)]
    folder_columns = [[""] * n, labels]
    if folds:
        folder_columns.append([f"fold{fold}" for fold in folds])
    return [_Layout(root, base, folders) for root, base in bases for folders in folder_columns]
