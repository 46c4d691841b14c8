"""Find the audio files that a table names, in the folders where data sets have them."""
import os
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from util import summarize

from .audio import AUDIO_SUFFIXES
from .csv_table import Table, as_text
from .files import find_audio, suffix
from .manifest import DataError, native_path

# Folders beside a table that may contain its audio; BirdCLEF uses train_audio (since 2022) and
# train_short_audio (2021).
AUDIO_FOLDERS = (".", "audio", "train_audio", "train_short_audio", "../audio")
N_PROBES = 50  # rows that are tried to choose a layout


@dataclass
class Place:
    """Where the files of a table are."""
    root: Path  # absolute
    paths: list[str]  # of each row, relative to the root; a missing file's is as the table has it
    notes: list[str] = field(default_factory=list)


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
        return path is not None and _is_file(os.path.join(self.root, path))


def locate_files(table: Table, audio_dir: str | os.PathLike | None, texts: list[str],
                 labels: list[str], folds: list[int] | None, folders: list[str] | None = None
                 ) -> Place:
    """Find the files of a table.

    texts: each row's path as the table has it. labels, folds, folders: each row's label, fold and
    folder column; they may be the folder that contains the file (dog/, fold3/).

    A file may have another audio suffix than the table says, or another case or Unicode form of its
    name; with `audio_dir` it may be anywhere below that folder. If most files are found, missing
    ones are left to the scan. Raises DataError if a path is outside the root or most are missing.
    """
    texts = [native_path(text) for text in texts]
    layouts = _layouts(table, audio_dir, len(texts), labels, folds, folders)
    probes = range(0, len(texts), max(1, len(texts) // N_PROBES))
    search = _Search(None)

    def n_found(layout):
        return sum(layout.exists(row, texts[row]) for row in probes)

    def n_similar(layout):
        return sum(search.find(layout, row, texts[row]) is not None for row in probes)

    layout = max(layouts, key=n_found)  # the first of equals
    if n_found(layout) < len(probes):
        layout = max(layouts, key=n_similar)
    search = _Search(audio_dir)
    place = Place(Path(layout.root), [])
    missing = []
    for row, text in enumerate(texts):
        path = search.find(layout, row, text)
        if path is None:
            path = layout.path(row, text)
            missing.append(row)
        if path is None:
            raise DataError(f"{table.path} row {table.numbers[row]}: {text} is outside "
                            f"{layout.root}; give --audio-dir, a folder that contains all the "
                            "audio")
        place.paths.append(path)
    if len(missing) >= len(texts) / 2:
        row = missing[0]
        raise DataError(
            f"{table.path} row {table.numbers[row]}: {texts[row]} is not in {layout.root} "
            f"({len(missing)} of {len(texts)} rows name a missing file); give --audio-dir, a "
            "folder that contains the files at any depth, or fix the paths")
    if missing:
        names = summarize((texts[row] for row in missing), 3)
        place.notes.append(f"missing: the files of {len(missing)} of {len(texts)} rows, {names}")
    for how, n in search.n_changed.items():
        text, path = search.examples[how]
        place.notes.append(f"{n} of {len(texts)} files are found {how}, e.g. {text} as {path}")
    return place


def _layouts(table, audio_dir, n, labels, folds, folders):
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
    folder_columns = [[""] * n, [native_path(label) for label in labels]]
    if folds:
        folder_columns.append([f"fold{fold}" for fold in folds])
    if folders:
        folder_columns.append([native_path(with_slashes(folder).strip("/")) for folder in folders])
    return [_Layout(root, base, column) for root, base in bases for column in folder_columns]


# ---- names that differ a little

class _Search:
    """Finds files whose names in the table are not quite those on the disk."""

    def __init__(self, audio_dir):
        self.audio_dir = audio_dir  # files may be anywhere below it, if it is not None
        self.listings = {}  # folder -> Names
        self.everywhere = None  # Names of all files below audio_dir
        self.n_changed = Counter()  # how a name differs -> number of rows
        self.examples = {}  # how a name differs -> (text, path)

    def find(self, layout, row, text):
        """The row's path relative to the layout's root, or None."""
        if layout.exists(row, text):
            return layout.path(row, text)
        variants = dict.fromkeys([text, with_slashes(text), native_path(as_text(text))])
        for variant in variants:
            path = layout.path(row, variant)
            if path is None:
                continue
            if variant != text and layout.exists(row, variant):
                return self._note("by another spelling", text, path)
            folder, name = os.path.split(path)
            listing = self._names_in(os.path.join(layout.root, folder))
            similar, how = listing.find(name)
            if similar is not None:
                return self._note(how, text, os.path.join(folder, similar))
        if self.audio_dir is None:
            return None
        if self.everywhere is None:
            above, top = os.path.split(layout.root)
            paths = find_audio(above, top, Counter())
            self.everywhere = Names([path.split("/", 1)[1] for path in paths])
        path, _ = self.everywhere.find(os.path.normpath(with_slashes(text)))
        return path and self._note("by name in another folder", text, path)

    def _names_in(self, folder):
        if folder not in self.listings:
            try:
                names = os.listdir(folder)
            except OSError:
                names = []
            self.listings[folder] = Names(
                [name for name in names if suffix(name) in AUDIO_SUFFIXES])
        return self.listings[folder]

    def _note(self, how, text, path):
        self.n_changed[how] += 1
        self.examples.setdefault(how, (text, path))
        return path


class Names:
    """Paths of audio files, to be found by names that are written in another way."""

    def __init__(self, paths):
        self.by_name = defaultdict(list)
        self.by_stem = defaultdict(list)
        for path in sorted(paths, key=os.fsencode):
            name = simplify(os.path.basename(path))
            self.by_name[name].append(path)
            self.by_stem[os.path.splitext(name)[0]].append(path)

    def find(self, text):
        """(the only path like `text`, how it differs); (None, None) if there is none or several."""
        for paths, how in self._alike(text):
            if len(paths) == 1:
                return paths[0], how
        return None, None

    def matches(self, text: str) -> list[str]:
        """The paths like `text`, those in folders that are the most alike."""
        return next((paths for paths, _ in self._alike(text) if paths), [])

    def _alike(self, text):
        name = simplify(os.path.basename(text))
        stem = os.path.splitext(name)[0] if suffix(name) in AUDIO_SUFFIXES else name
        for paths, how in ((self.by_name[name], "by another spelling"),
                           (self.by_stem[stem], "under another suffix")):
            yield _most_alike(paths, text) if len(paths) > 1 else paths, how


def _most_alike(paths, text):
    """The paths that share the most folders with `text`, counted from the end."""
    def n_shared(path):
        pairs = zip(_folders(path), _folders(text))
        return next((i for i, (a, b) in enumerate(pairs) if a != b),
                    min(len(_folders(path)), len(_folders(text))))

    most = max(map(n_shared, paths))
    return [path for path in paths if n_shared(path) == most] if most else paths


def _folders(path):
    return [simplify(name) for name in path.split("/")[-2::-1]]


def simplify(name: str) -> str:
    """A name in the form in which names that a system may confuse are equal."""
    return unicodedata.normalize("NFC", as_text(name)).casefold()


def with_slashes(text: str) -> str:
    """A Windows path with / and without its drive."""
    return re.sub(r"^[A-Za-z]:", "", text.replace("\\", "/")) if "\\" in text else text


def _is_file(path):
    """Whether there is anything but a folder; also a broken link, which the scan reports."""
    return os.path.lexists(path) and not os.path.isdir(path)
