"""A CSV with one clip per row -> a manifest: choose the columns, parse the fields."""
import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np

from util import plural

from .build import build_manifest
from .csv_table import column_name, read_table
from .folders import SPLIT_WORDS
from .locate import locate_files
from .manifest import DataError, Manifest
from .xenocanto import join_recordings

# Names of columns for each role, the likeliest first, in the form of `column_name`.
COLUMNS = {
    "path": "path filepath file_path filename file_name file slice_file_name audio audio_path "
            "audio_file fname wav",
    "label": "label labels category primary_label class_name class species common_name "
             "scientific_name ebird_code target classid class_id label_id positive_labels",
    "secondary label": "secondary_labels secondary_label also unknown ignore",
    "split": "split subset set partition",
    "fold": "fold folds",
    "group": "group group_id recording_id recording src_file source_file fsid original "
             "original_file recordist author source",
    "start": "start start_time start_s onset",
    "end": "end end_time end_s stop",
}
# Columns whose cells may be lists with commas: a,b or ['a', 'b'].
LIST_COLUMNS = {"labels", "positive_labels", "secondary_labels", "also"}
# In UrbanSound8K, times are positions in the source recording that the files were cut from.
URBANSOUND_COLUMNS = {"slice_file_name", "fsid"}
MAX_SECONDS = 1e9


def load_table(path: Path, audio_dir: str | os.PathLike | None,
               known_classes: Collection[str]) -> Manifest:
    """Read a table; see `load_manifest`. Raises DataError."""
    table = read_table(path)
    table, notes = _join_xeno_canto(table, audio_dir)
    columns, column_notes = _choose_columns(table)
    notes = notes + column_notes

    fields = _parse_fields(table, columns)
    labels = [names[0] for names in fields["label"]]
    start, end = _times(table, fields)
    root, paths = locate_files(table, audio_dir, fields["path"], labels, fields.get("fold"))
    if root != path.parent and audio_dir is None:
        notes.append(f"the audio is in {root}")

    rows = _distinct_rows(table, columns, fields, paths, start, end)
    if len(rows) < len(paths):
        notes.append(f"left out: {plural(len(paths) - len(rows), 'repeated row')}")
    fields = {role: [values[row] for row in rows] for role, values in fields.items()}
    name = path.parent.parent.name if path.parent.name in ("meta", "metadata") else path.stem
    group_source = f"column {table.header[columns['group']]}" if "group" in columns else None
    return build_manifest(
        name, root, [paths[row] for row in rows], [labels[row] for row in rows], notes,
        split=fields.get("split"), fold=fields.get("fold"), start=start[rows], end=end[rows],
        group=fields.get("group"), group_source=group_source, label_names=_label_names(fields),
        known_classes=known_classes)


def _join_xeno_canto(table, audio_dir):
    """Add the paths of the recordings if the table is Xeno-Canto's. -> (table, notes)."""
    root = os.path.abspath(audio_dir or table.path.parent)
    try:
        joined = join_recordings(table, root)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; give --audio-dir, a folder that can "
                        "be read") from None
    if joined is None:
        return table, []
    if not joined[0].rows:
        raise DataError(f"{table.path}: none of its {len(table.rows)} recordings is in {root}; "
                        "give --audio-dir, a folder with files such as XC76967.mp3, 76967.mp3 or "
                        "Genus-species-76967.mp3")
    return joined


# ---- columns

def _choose_columns(table):
    """-> ({role: index of its column}, notes on the choice)."""
    names = table.names
    columns = {}
    notes = []
    for role, known_names in COLUMNS.items():
        candidates = [names.index(name) for name in known_names.split() if name in names]
        candidates = [i for i in candidates if any(row[i].strip() for row in table.rows)]
        if role == "label":
            candidates.sort(key=lambda i: _has_few_names(table, i))
        if role == "group":
            candidates = _usable_groups(table, candidates, notes)
        if role in ("start", "end") and URBANSOUND_COLUMNS.issubset(names):
            continue
        if candidates:
            i = candidates[0]
            columns[role] = i
            if names.count(names[i]) > 1:
                raise DataError(f"{table.path}: the column {table.header[i]} occurs twice; remove "
                                "one")
        elif role in ("path", "label"):
            raise DataError(f"{table.path} has no {role} column with anything in it among "
                            f"{', '.join(table.header)}; name one of them {role}")
    used = []
    for role, i in columns.items():
        used.append(table.header[i] if names[i] == role else f"{table.header[i]} as {role}")
    return columns, ["columns used: " + ", ".join(used), *notes]


def _has_few_names(table, column):
    """Whether a column has fewer than two values that are not just numbers."""
    values = {row[column] for row in table.rows}
    return sum(not re.fullmatch(r"[\s\d.-]*", value) for value in values) < 2


def _usable_groups(table, candidates, notes):
    """The group columns of which no value fills more than half the rows, such as an archive's name.

    A column called `group` is always used.
    """
    usable = []
    for i in candidates:
        value, n = Counter(row[i] for row in table.rows).most_common(1)[0]
        if column_name(table.header[i]) != "group" and n > max(2, len(table.rows) / 2):
            notes.append(f"column {table.header[i]} is not used as group: {n} of "
                         f"{len(table.rows)} rows have {value or 'none'}")
        else:
            usable.append(i)
    return usable


# ---- fields

def _parse_path(text):
    if not text:
        raise ValueError
    return text


def _parse_fold(text):
    if not re.fullmatch(r"\d{1,4}(\.0)?", text):
        raise ValueError
    return int(float(text))


def _parse_start(text):
    return _seconds(text or "0")


def _parse_end(text):
    return _seconds(text) if text else float("nan")  # nan: the end of the file


def _seconds(text):
    seconds = float(text)
    if not 0 <= seconds < MAX_SECONDS:
        raise ValueError
    return seconds


# How to parse a field of each role, and what the field must be. Parsers raise ValueError or
# KeyError.
PARSERS = {
    "path": (_parse_path, "the path of a file"),
    "split": (lambda text: SPLIT_WORDS[text.lower()],
              "train, val or test, or remove the column"),
    "fold": (_parse_fold, "a whole number"),
    "start": (_parse_start, "seconds from 0 up, such as 1.5"),
    "end": (_parse_end, "seconds, such as 1.5"),
}


def _parse_fields(table, columns):
    """Parse the chosen columns: {role: value of each row}.

    "label" and "secondary label" are always there and have a tuple of names for each row. The other
    roles are there if the table has a column for them.
    """
    fields = {}
    for role, i in columns.items():
        texts = [row[i] for row in table.rows]
        fields[role] = texts if role == "path" else [text.strip() for text in texts]
    for role, (parse, wanted) in PARSERS.items():
        if role in fields:
            fields[role] = _parse_column(table, columns[role], fields[role], parse, wanted)
    for role in ("label", "secondary label"):
        if role in columns:
            fields[role] = _parse_names(fields[role], table.header[columns[role]])
        else:
            fields[role] = [()] * len(table.rows)
    if () in fields["label"]:
        row = fields["label"].index(())
        text = table.rows[row][columns["label"]].strip()
        raise DataError(f"{table.path} row {table.numbers[row]}: "
                        f"{table.header[columns['label']]} is {text!r}; make it the name of a "
                        "class")
    return fields


def _parse_column(table, column, texts, parse, wanted):
    values = []
    for row, text in enumerate(texts):
        try:
            values.append(parse(text))
        except (KeyError, ValueError):
            raise DataError(f"{table.path} row {table.numbers[row]}: {table.header[column]} is "
                            f"{text!r}; make it {wanted}") from None
    return values


def _parse_names(texts, header):
    """A tuple of names for each cell; equal cells share one tuple, to save memory."""
    may_be_list = re.sub(r"[ -]", "_", header.lower()) in LIST_COLUMNS
    names_of = {text: _split_names(text, may_be_list) for text in set(texts)}
    return [names_of[text] for text in texts]


def _split_names(text, may_be_list):
    """The distinct names in a cell: a;b or a|b; with `may_be_list` also a,b or ['a', "b"]."""
    if may_be_list and re.fullmatch(r"\[.*\]", text, re.DOTALL):
        quoted_or_bare = r"'([^']*)'|\"([^\"]*)\"|([^\s,;|'\"][^,;|'\"]*)"
        names = [max(groups) for groups in re.findall(quoted_or_bare, text[1:-1])]
    elif may_be_list:
        names = re.split(r"[;|,]", text)
    else:
        names = re.split(r"[;|]", text)
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def _label_names(fields):
    """(all labels, secondary labels) of each row; None if every row has just one label."""
    has_several = any(len(names) > 1 for names in fields["label"])
    if not has_several and not any(fields["secondary label"]):
        return None
    return list(zip(fields["label"], fields["secondary label"], strict=True))


def _times(table, fields):
    """Start and end of each row, (n,) float32 seconds; the end is nan if it is the file's end."""
    n = len(table.rows)
    start = np.array(fields.get("start", np.zeros(n)), np.float32)
    end = np.array(fields.get("end", np.full(n, np.nan)), np.float32)
    wrong = np.flatnonzero(end <= start)
    if len(wrong):
        row = wrong[0]
        raise DataError(f"{table.path} row {table.numbers[row]}: the clip ends at {end[row]:g} s, "
                        "not after its start; fix the row")
    return start, end


def _distinct_rows(table, columns, fields, paths, start, end):
    """The first row of each clip. Raises DataError if another row of a clip contradicts it."""
    first_row = {}
    rows = []
    for row, clip in enumerate(zip(paths, start.tolist(), np.nan_to_num(end, nan=-1).tolist())):
        first = first_row.setdefault(clip, row)
        if first == row:
            rows.append(row)
            continue
        for role in ("label", "split", "fold", "secondary label"):
            if role in fields and fields[role][row] != fields[role][first]:
                raise _contradiction(table, columns[role], role, first, row)
    return rows


def _contradiction(table, column, role, first, second):
    """The error of two rows with one clip and different values."""
    numbers = table.numbers
    values = [table.rows[row][column].strip() for row in (first, second)]
    fix = "remove one row"
    if role == "label":
        fix += f", or name both in one row as {values[0]};{values[1]}"
    return DataError(f"{table.path} rows {numbers[first]} and {numbers[second]}: one clip with two "
                     f"{role}s, {values[0]} and {values[1]}; {fix}")
