"""A folder or a CSV of labelled recordings -> one row per clip, in columns.

Read here: class folders, `train/ val/ test/` with class folders inside, a CSV of one clip per row, and the layouts
of ESC-50, UrbanSound8K, Speech Commands and BirdCLEF. Nothing here opens an audio file; `scan.py` does.
"""
import csv
import io
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from sys import intern

import numpy as np

from .audio import AUDIO_SUFFIXES
from .scan import audio_below, codes, printable, suffix, unite
from .xenocanto import column_name, join

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1,
               "test": 2, "testing": 2, "eval": 2, "evaluation": 2}

# Names that columns go by, the likeliest first; compared in lower case with _ for blanks, hyphens and dots.
COLUMNS = {
    "path": "path filepath file_path filename file_name file slice_file_name audio audio_path audio_file fname wav",
    "label": "label labels category primary_label class_name class species common_name scientific_name ebird_code target "
             "classid class_id label_id positive_labels",
    "secondary label": "secondary_labels secondary_label also unknown ignore",
    "split": "split subset set partition",
    "fold": "fold folds",
    "group": "group group_id recording_id recording src_file source_file fsid original original_file recordist author "
             "source",
    "start": "start start_time start_s onset",
    "end": "end end_time end_s stop",
}
LISTS = {"labels", "positive_labels", "secondary_labels", "also"}  # columns whose cells may be lists with commas: a,b or ['a', 'b']

# What a file name says of the recording that it was cut from: the first bracket, beside the two of a time
# range, which must rise. A weak one is not used where it would leave most classes in one group each.
WEAK_PATTERNS = ("segment number", "time range")
NAME_PATTERNS = {
    "ESC source number": r"^\d-(\d+)-[A-Z](?:-\d+)?$",
    "UrbanSound8K source number": r"^(\d+)-\d+-\d+-\d+$",
    "speaker": r"^([0-9a-f]+)_nohash_\d+$",  # Speech Commands
    "XC number": r"(?:^|[^A-Za-z0-9])XC[ _-]?(\d+)",
    "segment number": r"^(.+?)[ ._-]+(?:segment|seg|part|pt|chunk|clip|slice|split|window|win)[ ._-]*\d+$",
    "time range": r"^(.+?)[_-](\d+(?:\.\d+)?)(?:m?s)?[_-](\d+(?:\.\d+)?)(?:m?s)?$",
}

TABLES = ("meta/esc50.csv", "metadata/UrbanSound8K.csv", "train_metadata.csv")  # in a folder: ESC-50, UrbanSound8K, BirdCLEF
SPLIT_LISTS = {"validation_list.txt": 1, "testing_list.txt": 2}  # of Speech Commands: paths; the others are for training
NOISE = "_background_noise_"  # its folder of long recordings to be mixed in, no class


class DataError(ValueError):
    """Bad data from a person: one line that names the file or flag, says what is wrong, and the mend."""

    def __init__(self, message):
        super().__init__(printable(message))


COLUMN_TYPES = {"labels": np.int32, "start": np.float32, "end": np.float32, "group": np.int32, "split": np.int8,
                "fold": np.int16, "duration": np.float32, "label_set": np.int32}


@dataclass
class Manifest:
    """Clips in columns, sorted by path and start; about 30 bytes a clip beyond the path strings."""
    name: str
    root: Path  # absolute
    classes: list[str]
    paths: list[str]  # relative to root, with /; bytes that are not UTF-8 as surrogate escapes
    labels: np.ndarray  # (n,) int32 index into classes; of several labels the first one
    start: np.ndarray  # (n,) float32 seconds into the file
    end: np.ndarray  # (n,) float32 seconds into the file; nan is the file's end
    group: np.ndarray  # (n,) int32: clips of one recording share a code
    group_source: str  # where the groups come from: "column src_file", "file name (XC number)", ...
    split: np.ndarray  # (n,) int8 index into SPLITS, -1 not assigned
    fold: np.ndarray | None  # (n,) int16
    notes: list[str]  # lines worth printing
    duration: np.ndarray | None = None  # (n,) float32 seconds of the clip, as a scan finds it
    # Where clips may have several labels, else None and []: the classes that a clip holds, its first label first, and those of
    # which it is not known whether it does. Counts, splits and rare classes go by all labels, samplers by the first one.
    label_set: np.ndarray | None = None  # (n,) int32 index into label_sets
    label_sets: list = field(default_factory=list)  # [((class, ...), (unknown class, ...))], each once

    def __len__(self):
        return len(self.paths)

    def file(self, row):
        """Path of the row's file."""
        return self.root / self.paths[row]

    def take(self, rows):
        """The manifest of these rows (indices or a mask), in that order; all classes are kept."""
        rows = np.arange(len(self))[rows]
        columns = {name: column[rows] for name in COLUMN_TYPES if (column := getattr(self, name)) is not None}
        return replace(self, paths=[self.paths[row] for row in rows], notes=list(self.notes), **columns)

    def rows(self, split):
        """Rows of the split of that name, (k,) rising."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    @property
    def multi_label(self):
        """Whether each class is a question of its own: scores are then sigmoids, targets rows of `targets`."""
        return self.label_set is not None

    def positives(self, rows):
        """Every label of these rows: (m,) index into rows and (m,) class."""
        if not self.multi_label:
            return np.arange(len(rows)), self.labels[rows]
        held = [self.label_sets[i][0] for i in self.label_set[rows].tolist()]
        return (np.repeat(np.arange(len(held)), np.array([len(classes) for classes in held], np.int64)),
                np.array([c for classes in held for c in classes], np.int32))

    def targets(self, rows):
        """(k, classes) float32 of these rows: 1 for the labels of a clip, NaN for the unknown classes, else 0."""
        found = np.zeros((len(rows), len(self.classes)), np.float32)
        if self.multi_label:
            for i, row in enumerate(self.label_set[rows].tolist()):
                found[i, list(self.label_sets[row][1])] = np.nan
        found[self.positives(rows)] = 1
        return found

    def label_text(self, row):
        """The class of a row, or several as a; b."""
        names = self.label_sets[self.label_set[row]][0] if self.multi_label else [self.labels[row]]
        return "; ".join(self.classes[c] for c in names)

    def counts(self):
        """Clips per class, (classes,); a clip of several labels counts for each."""
        return np.bincount(self.positives(np.arange(len(self)))[1], minlength=len(self.classes))

    def having(self, chosen):
        """(n,) bool: which clips have a label among the chosen classes, a (classes,) mask."""
        clip, label = self.positives(np.arange(len(self)))
        return np.bincount(clip[np.asarray(chosen)[label]], minlength=len(self)) > 0

    def relabelled(self, classes, index):
        """With other classes: index (old classes,) says which of the new ones each has become, -1 none. Clips that keep
        no label are left out."""
        index = np.asarray(index)
        found = self.take(self.having(index >= 0))
        found.classes = list(classes)
        if not self.multi_label:
            found.labels = index[found.labels].astype(np.int32)
            return found
        sets = [tuple(tuple(int(index[c]) for c in part if index[c] >= 0) for part in both) for both in self.label_sets]
        return found.with_sets([sets[i] for i in found.label_set])

    def with_sets(self, sets):
        """With these labels: for each clip (classes, unknown classes)."""
        tidy = {both: ((both[0][0], *sorted(set(both[0][1:]) - {both[0][0]})), tuple(sorted(set(both[1]) - set(both[0]))))
                for both in set(sets)}
        place = {both: i for i, both in enumerate(sorted(set(tidy.values())))}
        return replace(self, label_sets=list(place), label_set=np.array([place[tidy[both]] for both in sets], np.int32),
                       labels=np.array([both[0][0] for both in sets], np.int32))

    def one_label(self):
        """For a softmax over the classes: the same without secondary labels. Raises DataError where clips have several."""
        if not self.multi_label:
            return self
        several = [row for row, i in enumerate(self.label_set.tolist()) if len(self.label_sets[i][0]) > 1]
        if several:
            raise DataError(f"--data {self.name}: {len(several)} of {len(self)} clips have several labels, such as "
                            f"{self.paths[several[0]]} ({self.label_text(several[0])}): use --loss bce or focal-bce with "
                            "--monitor val_map; if the separator is part of a class's name, take it out there")
        return replace(self, label_set=None, label_sets=[], notes=[*self.notes, "secondary labels are not used by a softmax "
                       "loss and count as absent; --loss bce or focal-bce leaves them out"])

    def to_dict(self):
        """In plain types, for a checkpoint."""
        plain = {name: value.tolist() if name in COLUMN_TYPES and value is not None else value
                 for name, value in vars(self).items()}
        return {**plain, "root": str(self.root)}

    @classmethod
    def from_dict(cls, plain):
        """The manifest that `to_dict` took apart. Raises ValueError, or what else the parts raise, for one that it
        did not: it may come from a file that somebody else wrote."""
        plain = {"label_set": None, "label_sets": [], **plain}  # which older checkpoints lack
        columns = {name: np.array(plain[name], kind) for name, kind in COLUMN_TYPES.items() if plain[name] is not None}
        found = cls(**{**plain, **columns, "root": Path(plain["root"])})
        if any(column.shape != (len(found),) for column in columns.values()):
            raise ValueError("the columns of its manifest are not of one length")
        if not (np.isin(found.labels, range(len(found.classes))).all() and np.isin(found.split, range(-1, 3)).all()
                and (found.start >= 0).all() and not (found.end < 0).any()):
            raise ValueError("its manifest has a label, split, start or end out of range")
        found.label_sets = [tuple(tuple(part) for part in both) for both in found.label_sets]
        for held, unknown in found.label_sets:
            both = [*held, *unknown]
            if not held or len(set(both)) < len(both) or any(type(c) is not int or not 0 <= c < len(found.classes) for c in both):
                raise ValueError("its manifest has a set of labels that is empty, out of range or not a set")
        if found.multi_label and not (np.isin(found.label_set, range(len(found.label_sets))).all() and (
                found.labels == [found.label_sets[i][0][0] for i in found.label_set]).all()):
            raise ValueError("its manifest has clips whose sets of labels do not fit")
        for path in found.paths:
            if path.startswith("/") or "\0" in path or ".." in path.split("/"):
                raise ValueError(f"its manifest names {path[:80]}, outside of the data folder")
        return found


def load_manifest(data, audio_dir=None, known=()):
    """Read labelled recordings from a folder or a CSV.

    data: a folder with one folder per class, the same under train/ val/ test/, a folder laid out like ESC-50,
    UrbanSound8K, Speech Commands or BirdCLEF, or a CSV, also of Xeno-Canto. audio_dir: the folder that a CSV's paths are
    relative to, and must stay inside; by default the CSV's own, or an audio/ folder beside it. A cell of a CSV's label column
    may name several classes, as a;b or a|b, and a column secondary_labels (or also, unknown, ignore) those of which it is not
    known whether the clip holds them. known: classes that may stand there alone; else a class needs a clip of its own.

    Raises DataError for anything that leaves a clip without a file or a class.
    """
    data = Path(os.path.abspath(data))
    if os.path.isdir(data):
        for table in TABLES:
            if os.path.isfile(data / table):
                return _from_table(data / table, audio_dir, known)
        if audio_dir is not None:
            raise DataError(f"--audio-dir goes with a CSV, but --data {data} is a folder: leave --audio-dir out")
        return _from_folder(data)
    if not os.path.isfile(data) or suffix(data.name) not in (".csv", ".tsv", ".txt"):
        what = "is no .csv, .tsv or .txt table" if os.path.exists(data) else "is not there"
        raise DataError(f"--data {data} {what}; give a folder with one folder per class, or a CSV")
    return _from_table(data, audio_dir, known)


# ---- folders

def _from_folder(folder):
    ignored, notes, split, depth = Counter(), [], None, 0  # depth: at which the class folders are
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        tops = {name: None for name in names if os.path.isdir(folder / name)}  # in order
        found = [path for top in tops for path in audio_below(folder, top, ignored)]
    except OSError as error:
        raise DataError(f"--data {error.filename}: {error.strerror}; make it readable or take it away") from None
    loose = [name for name in names if name not in tops and suffix(name) in AUDIO_SUFFIXES]
    ignored.update(suffix(name) for name in names if name not in tops and suffix(name) not in AUDIO_SUFFIXES)
    if NOISE in tops:
        del tops[NOISE]
        noise, found = len(found), [path for path in found if not path.startswith(NOISE + "/")]
        notes.append(f"{NOISE} is no class, left out: {noise - len(found)} recordings; to mix them in: --noise-p 0.5 "
                     f"--noise-dir {folder / NOISE}")
    used = {path.split("/", 1)[0] for path in found}
    split_of = {top: SPLIT_WORDS[top.lower()] for top in sorted(used) if top.lower() in SPLIT_WORDS}
    if len(split_of) == len(used) and 0 in split_of.values():
        notes.append(f"splits are given by the folders {', '.join(split_of)}")
        loose += sorted(path for path in found if path.count("/") == 1)
        found = [path for path in found if path.count("/") > 1]
        split, depth = [split_of[path.split("/", 1)[0]] for path in found], 1
    elif all(name in names for name in SPLIT_LISTS):
        notes.append(f"splits are given by {' and '.join(SPLIT_LISTS)}")
        listed = {line: i for name, i in SPLIT_LISTS.items() for line in _lines(folder / name)}
        split = [listed.get(path, 0) for path in found]
    elif split_of:
        notes.append(f"folders {', '.join(split_of)} are taken as classes, like the folders beside them")
    kinds = ", ".join(f"{n} {kind or 'without suffix'}" for kind, n in sorted(ignored.items()))
    if loose and not found:
        raise DataError(f"--data {folder}: audio lies outside any class folder ({loose[0]}); put it in one folder per "
                        f"class, such as {folder}/dog/a.wav, or give a CSV with the columns path,label")
    if not found:
        raise DataError(f"--data {folder} holds no audio (other files: {kinds or 'none'}); give a folder with one "
                        f"folder per class and files in {' '.join(sorted(AUDIO_SUFFIXES))}")
    if loose:
        notes.append(f"left out: {len(loose)} audio files outside any class folder, e.g. {loose[0]}")
    if len(used) < len(tops):
        notes.append(f"folders without audio: {', '.join(top for top in tops if top not in used)}")
    if ignored:
        notes.append(f"left out: {sum(ignored.values())} files that are not audio ({kinds})")
    notes += [f"{name} is not read; give it as --data to use it" for name in names if suffix(name) == ".csv"]
    labels = [intern(path.split("/", 2)[depth]) for path in found]  # one string a class, not a clip
    return _build(folder.name, folder, found, labels, notes, split)


def _lines(path):
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape").split()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; make it readable") from None


# ---- tables

def _valid(value, is_valid):
    if not is_valid:
        raise ValueError
    return value


PARSERS = {  # of one field, and what it must be
    "path": (lambda field: _valid(field, field), "the path of a file"),
    "split": (lambda field: SPLIT_WORDS[field.lower()], "train, val or test, or take the column out"),
    "fold": (lambda field: int(float(_valid(field, re.fullmatch(r"\d{1,4}(\.0)?", field)))), "a whole number"),
    "start": (lambda field: _valid(float(field or 0), 0 <= float(field or 0) < 1e9), "seconds from 0 up, such as 1.5"),
    "end": (lambda field: _valid(float(field or "nan"), not field or 0 <= float(field) < 1e9), "seconds, such as 1.5"),
}


def _names(field, is_list):
    """The names in a cell, each once: a;b or a|b, and where the column may hold lists a,b or ['a', "b"] too."""
    if is_list and re.fullmatch(r"\[.*\]", field, re.S):
        found = [max(parts) for parts in re.findall(r"'([^']*)'|\"([^\"]*)\"|([^\s,;|'\"][^,;|'\"]*)", field[1:-1])]
    else:
        found = re.split(r"[;|,]" if is_list else r"[;|]", field)
    return tuple(dict.fromkeys(name.strip() for name in found if name.strip()))


def _from_table(table, audio_dir, known):
    header, numbers, rows = _read_table(table)
    header, numbers, rows, joined = _with_recordings(table, audio_dir, header, numbers, rows)
    columns, notes = _choose_columns(table, header, rows)
    notes = joined + notes
    fields = {role: [row[i] if role == "path" else row[i].strip() for row in rows] for role, i in columns.items()}
    for role, (parse, wanted) in PARSERS.items():
        for i, text in enumerate(fields.get(role, ())):
            try:
                fields[role][i] = parse(text)
            except (KeyError, ValueError):
                raise DataError(f"{table} row {numbers[i]}: {header[columns[role]]} is {text!r}; make it "
                                f"{wanted}") from None
    for role in ("label", "secondary label"):
        is_list = role in columns and re.sub(r"[ -]", "_", header[columns[role]].lower()) in LISTS
        names = {text: _names(text, is_list) for text in {*fields.get(role, [""])}}  # one tuple a cell's text, not a row
        fields[role] = [names[text] for text in fields.get(role, [""] * len(rows))]
    if () in fields["label"]:
        i = fields["label"].index(())
        raise DataError(f"{table} row {numbers[i]}: {header[columns['label']]} is {rows[i][columns['label']].strip()!r}; make it "
                        "the name of a class")
    first_labels = [names[0] for names in fields["label"]]
    start = np.array(fields.get("start", np.zeros(len(rows))), np.float32)
    end = np.array(fields.get("end", np.full(len(rows), np.nan)), np.float32)
    for i in np.flatnonzero(end <= start):
        raise DataError(f"{table} row {numbers[i]}: the clip ends at {end[i]:g} s, not after its start; mend the row")
    root, paths = _place(table, audio_dir, numbers, {**fields, "label": first_labels})
    if root != table.parent and audio_dir is None:
        notes.append(f"the audio is in {root}")
    first, kept = {}, []
    for i, clip in enumerate(zip(paths, start.tolist(), np.nan_to_num(end, nan=-1).tolist())):
        j = first.setdefault(clip, i)
        for role in ("label", "split", "fold", "secondary label"):
            if role in fields and fields[role][i] != fields[role][j]:
                one, other = rows[j][columns[role]].strip(), rows[i][columns[role]].strip()
                raise DataError(f"{table} rows {numbers[j]} and {numbers[i]}: one clip with two {role}s, {one} and {other}; take "
                                "one row out" + f", or name both in one row as {one};{other}" * (role == "label"))
        if i == j:
            kept.append(i)
    notes += [f"left out: {len(rows) - len(kept)} rows that repeat another row"] * (len(kept) < len(rows))
    name = table.parent.parent.name if table.parent.name in ("meta", "metadata") else table.stem
    pick = {role: [values[i] for i in kept] for role, values in fields.items()}
    sets = zip(pick["label"], pick["secondary label"], strict=True)
    sets = list(sets) if any(pick["secondary label"]) or any(len(names) > 1 for names in pick["label"]) else None
    return _build(name, root, [paths[i] for i in kept], [first_labels[i] for i in kept], notes, pick.get("split"),
                  pick.get("fold"), start[kept], end[kept], pick.get("group"), "column " + header[columns.get("group", 0)],
                  sets, known)


def _read_table(table):
    """Header, row numbers as a spreadsheet counts them, and rows as long as the header."""
    try:
        text = table.read_bytes().decode("utf-8-sig", "surrogateescape")
        top = text.split("\n", 1)[0]
        if "\0" in top:
            raise DataError(f"{table} is not UTF-8 text; save it as CSV in UTF-8")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=top.count), skipinitialspace=True)
        lines = [(number, row) for number, row in enumerate(reader, 1) if any(row)]
    except (OSError, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {error}; mend it") from None
    if len(lines) < 2:
        raise DataError(f"{table} has no rows; it needs a header such as path,label and one row per clip")
    header = [name.strip() for name in lines[0][1]]
    for number, row in lines[1:]:
        if any(row[len(header):]):
            raise DataError(f"{table} row {number}: {len(row)} fields under a header of {len(header)}; put quotes "
                            "around a field that has the separator in it")
        row += [""] * (len(header) - len(row))
    return header, [number for number, _ in lines[1:]], [row for _, row in lines[1:]]


def _with_recordings(table, audio_dir, header, numbers, rows):
    """The table with the paths of its recordings, and notes, if it is Xeno-Canto's; else as it is."""
    root = os.path.abspath(audio_dir or table.parent)
    try:
        joined = join(header, numbers, rows, root)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; give --audio-dir, a folder that can be read") from None
    if joined is None:
        return header, numbers, rows, []
    if not joined[2]:
        raise DataError(f"{table}: none of its {len(rows)} recordings is in {root}; give --audio-dir, a folder with files "
                        "such as XC76967.mp3, 76967.mp3 or Genus-species-76967.mp3")
    return joined


def _choose_columns(table, header, rows):
    """Column index of each role that is there, and a note that says which."""
    names = [column_name(name) for name in header]
    columns, notes = {}, []
    for role, known in COLUMNS.items():
        present = [names.index(name) for name in known.split() if name in names]
        present = [i for i in present if any(row[i].strip() for row in rows)]
        if role == "label":  # a column of names before one of numbers or of one value
            present.sort(key=lambda i: len({row[i] for row in rows if not re.fullmatch(r"[\s\d.-]*", row[i])}) < 2)
        for i in list(present) if role == "group" else ():
            value, n = Counter(row[i] for row in rows).most_common(1)[0]
            if names[i] != "group" and n > max(2, len(rows) / 2):  # such as a `source` that names the archive
                notes.append(f"column {header[i]} is not used as group: {n} of {len(rows)} rows have {value or 'none'}")
                present.remove(i)
        if {"slice_file_name", "fsid"} <= set(names) and role in ("start", "end"):
            continue  # UrbanSound8K: times in the source recording, whose cuts these files are
        if present:
            columns[role] = present[0]
            if names.count(names[present[0]]) > 1:
                raise DataError(f"{table}: the column {header[present[0]]} is there twice; take one out")
        elif role in ("path", "label"):
            raise DataError(f"{table} has no {role} column with anything in it among {', '.join(header)}; name one of "
                            f"them {role}")
    return columns, ["columns used: " + ", ".join(
        header[i] if names[i] == role else f"{header[i]} as {role}" for role, i in columns.items())] + notes


def _place(table, audio_dir, numbers, fields):
    """Root folder and every path below it; raises DataError for a path outside and for missing files."""
    texts, here = fields["path"], str(table.parent)
    if audio_dir is not None:
        root = os.path.abspath(audio_dir)
        if not os.path.isdir(root):
            raise DataError(f"--audio-dir {audio_dir}: no such folder; give the one that holds the CSV's files")
        bases = [(root, root), (root, here)]
    else:
        beside = (os.path.normpath(table.parent / folder) for folder in (
            ".", "audio", "train_audio", "train_short_audio", "../audio"))  # BirdCLEF's from 2022 on, and of 2021
        bases = [(root, root) for root in beside]
    below = [[""] * len(texts), fields["label"], [f"fold{fold}" for fold in fields.get("fold", ())]]
    layouts = [(root, base, folders) for root, base in bases for folders in below if folders]

    def located(layout, i):
        root, base, folders = layout
        if folders[i] and os.path.normpath(texts[i]).startswith("../"):  # would only undo the folder
            return None
        path, inside = os.path.normpath(os.path.join(base, folders[i], texts[i])), root.rstrip("/") + "/"
        return path[len(inside):] if path.startswith(inside) else None

    def there(layout, i):
        path = located(layout, i)
        return path is not None and os.path.lexists(os.path.join(layout[0], path))

    probes = range(0, len(texts), max(1, len(texts) // 50))
    layout = max(layouts, key=lambda layout: sum(there(layout, i) for i in probes))  # the first of equals
    paths = [located(layout, i) for i in range(len(texts))]
    if None in paths:
        i = paths.index(None)
        raise DataError(f"{table} row {numbers[i]}: {texts[i]} lies outside {layout[0]}; give --audio-dir, a folder "
                        "that holds all the audio")
    missing = [i for i in range(len(texts)) if not there(layout, i)]
    if missing:
        raise DataError(f"{table} row {numbers[missing[0]]}: {texts[missing[0]]} is not in {layout[0]} ({len(missing)} "
                        f"of {len(texts)} rows name a missing file); give --audio-dir, or mend the paths")
    return Path(layout[0]), paths


def _build(name, root, paths, labels, notes, split=None, fold=None, start=None, end=None, group=None, source=None,
           sets=None, known=()):
    """The manifest of these columns, sorted, so that it is the same in whatever order the rows came. sets: where clips may
    have several labels, all names of each clip and those that it may hold or not."""
    start = np.zeros(len(paths), np.float32) if start is None else start
    end = np.full(len(paths), np.nan, np.float32) if end is None else end
    order = np.lexsort((np.nan_to_num(end, nan=-1), start)).tolist()
    plain = all(map(str.isascii, paths))  # else by bytes, as bytes that are not UTF-8 have no place among characters
    order.sort(key=paths.__getitem__ if plain else lambda i: os.fsencode(paths[i]))
    paths, labels = [paths[i] for i in order], [labels[i] for i in order]
    shown = {label: printable(label) for label in set(labels).union(*(held for held, _ in sets or ()))}
    classes = set(shown.values())
    if sets:
        unsure = {label: printable(label) for label in set().union(*(unsure for _, unsure in sets))}
        strange = sorted(set(unsure.values()) - classes - set(known))
        notes += [f"secondary labels left out, since no clip has them as its own: {', '.join(strange[:5])}"
                  + f" and {len(strange) - 5} more" * (len(strange) > 5)] * bool(strange)
        classes |= set(unsure.values()) & set(known)
        shown = unsure | shown
    classes = sorted(classes)
    if len(classes) < 2:
        raise DataError("; ".join([f"--data {root}: only one class ({classes[0]}); give two or more, each a folder "
                                   "directly in --data or a label of its own", *notes]))
    position = {name: i for i, name in enumerate(classes)}
    labels = np.array([position[shown[label]] for label in labels], np.int32)
    file_of = np.cumsum([False] + [one != other for one, other in pairwise(paths)], dtype=np.int32)  # they are sorted
    if group is None:
        group, source = _groups_by_name(paths, file_of, labels, notes)
    else:  # an empty field says nothing; \0 is in no path
        group = unite(codes(group[i] or "\0" + path for i, path in zip(order, paths)), file_of)
    if sets:
        sets = [tuple(tuple(position[shown[label]] for label in names if shown[label] in position) for names in sets[i])
                for i in order]
        several, unknown = sum(len(held) > 1 for held, _ in sets), sum(bool(unsure) for _, unsure in sets)
        notes += [f"several labels: {several} of {len(sets)} clips, {max(len(held) for held, _ in sets)} at most; secondary "
                  f"labels, neither present nor absent: {unknown} clips"] * bool(several or unknown)
    order = np.array(order)
    found = Manifest(
        name, Path(root), classes, paths, labels, start[order], end[order], group, source,
        np.full(len(paths), -1, np.int8) if split is None else np.array(split, np.int8)[order],
        None if fold is None else np.array(fold, np.int16)[order], [printable(note) for note in notes])
    return found.with_sets(sets) if sets and (several or unknown) else found


def _groups_by_name(paths, file_of, labels, notes):
    """Group codes by what the file names show, if nearly all of them do; else every file alone."""
    for name, pattern in NAME_PATTERNS.items():
        group = _matches(re.compile(pattern, re.I), paths)
        if group is None or group.max() == file_of[-1]:
            continue  # too few names show it, or none of them share it
        n_groups = int(group.max()) + 1
        groups_of = np.bincount(np.unique(labels * np.int64(n_groups) + group) // n_groups)  # (classes,)
        if name not in WEAK_PATTERNS or np.mean(groups_of > 1) >= 0.5:
            return group, f"file name ({name})"
        notes.append(f"file names end in a {name}, but by that most classes would be one group each, so each file is "
                     "taken alone; if clips are cut from one recording, give a CSV with a column group")
    return file_of, "each file alone"


def _matches(pattern, paths):
    """Codes of what the pattern finds in the file names, a name without it alone; None below nine in ten."""
    found, hits = [], 0
    for i, path in enumerate(paths):
        m = pattern.search(os.path.splitext(os.path.basename(path))[0])
        shows = m and (m.lastindex == 1 or float(m[2]) < float(m[3]))
        found.append(m[1] if shows else "\0" + path)  # \0 is in no name
        hits += bool(shows)
        if hits + len(paths) - 1 - i < 0.9 * len(paths):  # the rest would not do any more
            return None
    return codes(found)
