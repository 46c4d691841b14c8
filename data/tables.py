"""A CSV with one clip per row -> a manifest: parse the fields of the chosen columns."""
import os
import re
from collections import Counter
from collections.abc import Collection
from itertools import chain
from pathlib import Path

import numpy as np

from util import plural

from .build import build_manifest
from .clip_times import is_clock_time, parse_time
from .columns import choose_columns, group_values
from .csv_table import Table, as_text, read_table
from .folder_words import splits_of
from .locate import locate_files
from .manifest import DataError, Manifest
from .names import MISSING
from .xenocanto import join_recordings

# Columns whose cells may be lists with commas: a,b or ['a', 'b'].
LIST_COLUMNS = {"labels", "positive_labels", "secondary_labels", "also"}
MAX_SECONDS = 1e9
# Bytes, as surrogate escapes, that no Western name has: three in a row, or some of Windows-1252's
# signs. They are Cyrillic, Chinese or Japanese in an encoding of their own.
NOT_WESTERN = re.compile(
    "[\udc80-\udcff]{3}|[\udc81-\udc84\udc86-\udc89\udc8b\udc8d\udc8f\udc90]")


def load_table(path: Path, audio_dir: str | os.PathLike | None,
               known_classes: Collection[str], real_classes: Collection[str] = ()) -> Manifest:
    """Read a table; see `load_manifest`. Raises DataError."""
    table = read_table(path)
    table, notes = _join_xeno_canto(table, audio_dir)
    table, columns = choose_columns(table)
    notes = [*table.notes, *notes, *columns.notes]

    fields = _parse_fields(table, columns, notes)
    labels = [names[0] if names else "" for names in fields["label"]]
    start, end = _times(table, fields)
    place = locate_files(table, audio_dir, fields["path"], labels, fields.get("fold"),
                         fields.get("folder"))
    notes += place.notes
    if place.root != path.parent and audio_dir is None:
        notes.append(f"the audio is in {place.root}")

    rows = _distinct_rows(table, columns, fields, place.paths, start, end)
    if len(rows) < len(place.paths):
        notes.append(f"left out: {plural(len(place.paths) - len(rows), 'repeated row')}")
    fields = {role: [values[row] for row in rows] for role, values in fields.items()}
    name = path.parent.parent.name if path.parent.name in ("meta", "metadata") else path.stem
    sources = _sources(table, columns)
    manifest = build_manifest(
        name, place.root, [place.paths[row] for row in rows], [labels[row] for row in rows], notes,
        split=fields.get("split"), fold=fields.get("fold"), start=start[rows], end=end[rows],
        group=fields.get("group"), group_source=sources.get("group"),
        label_names=_label_names(fields), known_classes=known_classes, real_classes=real_classes)
    manifest.sources = sources
    return manifest


def _sources(table, columns):
    """{role: the column that decided it}; the times of a clip have the role "time"."""
    sources = {role: f"column {table.header[i]}" for role, i in columns.index.items()}
    if columns.times:
        times = [f"{table.header[column.index]} as {role}"
                 + ("" if column.seconds == 1 else f", in units of {column.seconds:g} s")
                 for role, column in columns.times.items()]
        sources["time"] = f"columns {', '.join(times)}"
    return sources


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


# ---- fields

def _parse_path(text):
    if not text:
        raise ValueError
    return text


def _parse_fold(text):
    match = re.fullmatch(r"(?:fold[ _-]?)?(\d{1,4})(?:\.0)?", text.lower())
    if match is None:
        raise ValueError
    return int(match[1])


# How to parse a field of each role, and what the field must be. Parsers raise ValueError or
# KeyError.
PARSERS = {
    "path": (_parse_path, "the path of a file"),
    "fold": (_parse_fold, "a whole number"),
}


def _parse_fields(table, columns, notes):
    """Parse the chosen columns: {role: value of each row}.

    "label" and "secondary label" are always there and have a tuple of names for each row. The other
    roles are there if the table has a column for them.
    """
    fields = {}
    for role, i in columns.index.items():
        texts = [row[i] for row in table.rows]
        fields[role] = texts if role == "path" else [text.strip() for text in texts]
    for role, (parse, wanted) in PARSERS.items():
        if role in fields:
            fields[role] = _parse_column(table, columns.index[role], fields[role], parse, wanted)
    if "split" in fields:
        split_of = splits_of(set(fields["split"]))
        fields["split"] = _parse_column(table, columns.index["split"], fields["split"],
                                        split_of.__getitem__,
                                        "train, val or test, or remove the column")
    if "group" in fields:
        fields["group"] = group_values(fields["group"])
    for role in columns.times:
        fields[role] = _parse_times(table, columns.times[role], role)
    for role in ("label", "secondary label"):
        if role in columns.index:
            fields[role] = parse_names(table, columns.index[role], fields[role], role, notes)
        else:
            fields[role] = [()] * len(table.rows)
    for row, names in enumerate(fields["label"]):
        if not names:
            _check_no_label(table, columns.index["label"], row)
    return fields


def _check_no_label(table, column, row):
    """Raise DataError unless the label of a row is empty on purpose: the clip is a negative."""
    place = f"{table.path} row {table.numbers[row]}"
    header, text = table.header[column], table.rows[row][column].strip()
    if column >= table.short.get(table.numbers[row], len(table.header)):
        raise DataError(f"{place} ends before its {header}; add the name of a class, or an empty "
                        "field if the clip contains none")
    if text and not BRACKETS.fullmatch(text):
        raise DataError(f"{place}: {header} is {text!r}; make it the name of a class, or leave it "
                        "empty if the clip contains none")


def _parse_column(table, column, texts, parse, wanted):
    values = []
    for row, text in enumerate(texts):
        try:
            values.append(parse(text))
        except (KeyError, ValueError):
            raise DataError(f"{table.path} row {table.numbers[row]}: {table.header[column]} is "
                            f"{text!r}; make it {wanted}") from None
    return values


def _parse_times(table, column, role):
    """Seconds of each row. An empty start is 0, an empty end or duration the end of the file."""
    empty = 0.0 if role == "start" else float("nan")

    def parse(text):
        if not text:
            return empty
        seconds = parse_time(text, column)
        if not 0 <= seconds < MAX_SECONDS:
            raise ValueError
        return seconds

    texts = [row[column.index].strip() for row in table.rows]
    unit = "seconds" if column.seconds == 1 else "a number"
    wanted = f"{unit} from 0 up, such as 1.5" if role == "start" else f"{unit}, such as 1.5"
    if any(map(is_clock_time, texts)):
        wanted = ("seconds into the file, such as 90.5; if it is a time of day, call the column "
                  "something else")
    return _parse_column(table, column.index, texts, parse, wanted)


# ---- labels

def parse_names(table: Table, column: int, texts: list[str], role: str, notes: list[str]
                ) -> list[tuple[str, ...]]:
    """A tuple of names for each cell; equal cells share one tuple, to save memory.

    role: "label" or "secondary label". Raises DataError.
    """
    header = table.header[column]
    decoded = {text: as_text(text) for text in set(texts)}
    odd = [text for text in decoded.values() if text not in decoded]
    foreign = [text for text in decoded if NOT_WESTERN.search(text)]
    if foreign:
        raise DataError(f"{table.path}: {header} {decoded[min(foreign)]!r} is in an encoding that "
                        "is not known; save the table as CSV in UTF-8")
    if odd:
        notes.append(f"{header} is not UTF-8 and read as Windows-1252, e.g. {min(odd)}; if that is "
                     "wrong, save the table as CSV in UTF-8")
    cells = set(decoded.values())
    if role == "label":
        for row, text in enumerate(texts):
            if text in MISSING:
                raise DataError(f"{table.path} row {table.numbers[row]}: {header} is {text!r}, "
                                "which stands for a missing value; remove the row, or give the "
                                "class another name")
    separators = ";|"
    if _has_comma_lists(table, header, cells, role):
        separators = ";|,"
        if role == "label" and table.names[column] not in LIST_COLUMNS:
            example = min(text for text in cells if "," in text)
            notes.append(f"commas in {header} separate labels, e.g. {example}")
    names_of = {text: _split_names(cell, separators) for text, cell in decoded.items()}
    if role != "label":
        names_of = {text: tuple(name for name in names if name not in MISSING)
                    for text, names in names_of.items()}
    return [names_of[text] for text in texts]


BRACKETS = re.compile(r"\[.*\]", re.DOTALL)
QUOTED_LIST = re.compile(r"""\[\s*(['"].*)?\]""", re.DOTALL)


def _has_comma_lists(table, header, cells, role):
    """Whether commas in the cells of a label column separate names, or are part of names.

    They separate if every name of a cell occurs in other cells as well. In columns called labels
    they also do if nothing speaks against it. Raises DataError if it is not clear.
    """
    is_list_column = re.sub(r"\W+", "_", header.lower()) in LIST_COLUMNS or role != "label"
    plain = {text for text in cells if not BRACKETS.fullmatch(text)}
    with_comma = [text for text in plain if "," in text]
    if not with_comma:
        return is_list_column
    if any(re.search("[;|]", text) for text in plain):  # the separator is another one
        return False
    pieces_of = {text: {name.strip() for name in text.split(",")} - {""} for text in plain}
    cells_with = {}
    for piece in chain.from_iterable(pieces_of.values()):
        cells_with[piece] = cells_with.get(piece, 0) + 1
    evident = [text for text in with_comma
               if all(cells_with[piece] > 1 for piece in pieces_of[text])]
    example = min(with_comma)
    if is_list_column:
        own = [text for text in with_comma if any(cells_with[piece] == 1
                                                  for piece in pieces_of[text])]
        if role == "label" and not evident and _n_repeated(table, header, own) > len(plain) / 4:
            raise DataError(f"{table.path}: {header} {example!r} may be one name or several; call "
                            "the column label for one name, or separate several with ;")
        return True
    if not evident:
        return False
    if len(evident) < len(with_comma) / 2:
        raise DataError(f"{table.path}: {header} {min(evident)!r} looks like several labels, but "
                        f"{min(set(with_comma) - set(evident))!r} like one; separate several "
                        "labels with ;")
    return True


def _n_repeated(table, header, texts):
    """How many of these cells occur in more than one row."""
    column = table.header.index(header)
    counts = Counter(row[column].strip() for row in table.rows)
    return sum(counts[text] > 1 for text in texts)


def _split_names(text, separators):
    """The distinct names in a cell: a;b or a|b, ['a', "b"]; with a comma also a,b and [a, b]."""
    if QUOTED_LIST.fullmatch(text) or ("," in separators and BRACKETS.fullmatch(text)):
        quoted_or_bare = r"'([^']*)'|\"([^\"]*)\"|([^\s,;|'\"][^,;|'\"]*)"
        names = [max(groups) for groups in re.findall(quoted_or_bare, text[1:-1])]
    else:
        names = re.split(f"[{separators}]", text)
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def _label_names(fields):
    """(all labels, secondary labels) of each row; None if every row has just one label."""
    has_several = any(len(names) > 1 for names in fields["label"])
    if not has_several and not any(fields["secondary label"]):
        return None  # at most one label per row
    return list(zip(fields["label"], fields["secondary label"], strict=True))


def _times(table, fields):
    """Start and end of each row, (n,) float32 seconds; the end is nan if it is the file's end."""
    n = len(table.rows)
    start = np.array(fields.get("start", np.zeros(n)), np.float64)
    if "duration" in fields:
        end = start + np.array(fields["duration"], np.float64)
    else:
        end = np.array(fields.get("end", np.full(n, np.nan)), np.float64)
    start, end = start.astype(np.float32), end.astype(np.float32)
    wrong = np.flatnonzero(end <= start)
    if len(wrong):
        row = wrong[0]
        raise DataError(f"{table.path} row {table.numbers[row]}: the clip ends at {end[row]:g} s, "
                        "not after its start; fix the row")
    if "start" in fields and np.isnan(end).all():
        _refuse_overlaps(table, fields["path"], start)
    return start, end


def _refuse_overlaps(table, paths, start):
    """Raise DataError if clips without an end begin at several times of one file."""
    first = {}
    for row, path in enumerate(paths):
        other = first.setdefault(path, row)
        if start[other] != start[row]:
            raise DataError(f"{table.path} rows {table.numbers[other]} and {table.numbers[row]}: "
                            f"two clips of {path} without an end, so they overlap; add a column "
                            "end or duration")


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
                raise _contradiction(table, columns.index[role], role, first, row)
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
