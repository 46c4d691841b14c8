"""The forms in which people have annotations: from tables to rows of events.

crowsetta reads several of these forms, but brings pandas, pandera and more, wants one file per call
and refuses what people change by hand. A few lines for each form are enough.
"""
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from util import plural

from .annotation_labels import choose_column, find_column, names_of_cells
from .annotation_text import (
    TRUTH,
    class_columns,
    frequency_columns,
    read_annotation_table,
    read_text,
    split_lines,
)
from .annotation_times import (
    check_order,
    column_of,
    frequencies,
    number,
    start_and_end,
    times_by_name,
)
from .clip_times import END, START
from .columns import COLUMNS, KNOWN_NAMES, choose_columns
from .csv_table import Table
from .manifest import DataError
from .names import MISSING


@dataclass
class Rows:
    """What one table says, in columns."""
    table: Table
    start: list[float]
    end: list[float]  # nan: the end of the recording
    recording: list[str] | None = None  # as the table has it; None: the table is named after it
    names: list[tuple[str, ...]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)  # recordings that have no event


class Reading(NamedTuple):
    """How tables are to be read, and what was decided."""
    label_column: str | None
    notes: list[str]
    sources: dict[str, str]


def read_form(form: str, paths: Sequence[Path], reading: Reading) -> list[Rows]:
    """Read tables of one form, a key of `FORMS`. Raises DataError."""
    if form == "audacity":
        return _label_tracks(paths, reading)
    tables = [read_annotation_table(path) for path in paths]
    return FORMS[form].read(tables, reading)


def _set_names(all_rows, reading, preferred=(), empty_is_nothing=False):
    """Choose the label's column of these Rows and fill in their names."""
    tables = [rows.table for rows in all_rows]
    if reading.label_column is not None:
        column = find_column(tables, reading.label_column)
    else:
        column = choose_column(tables, preferred, reading.notes)
    filled = [rows for rows in all_rows if rows.table.rows]
    if not filled:
        return all_rows
    indices = [rows.table.names.index(column) if column in rows.table.names else None
               for rows in filled]
    for rows, index in zip(filled, indices):
        if index is None:
            raise DataError(f"{rows.table.path} has no column {column} as other tables have; add "
                            "it, or give --label-column")
    texts = [[row[index].strip() for row in rows.table.rows]
             for rows, index in zip(filled, indices)]
    of_cell = names_of_cells([rows.table for rows in filled], column, texts, reading.notes,
                             empty_is_nothing)
    for rows, own in zip(filled, texts):
        rows.names = [of_cell[text] for text in own]
    reading.sources["label"] = f"column {filled[0].table.header[indices[0]]}"
    return all_rows


# ---- Raven

def _raven(tables, reading):
    tables, n_doubled = _without_doubled_views(tables)
    if n_doubled:
        reading.notes.append(f"left out: {plural(n_doubled, 'row')} that Raven doubled by View")
    reading.sources["time"] = "columns Begin Time (s), End Time (s)"
    is_birdnet = all({"common_name", "species_code", "confidence"} <= {*table.names}
                     for table in tables)
    preferred = ("scientific_name", "common_name") if is_birdnet else ()
    return _set_names([_raven_rows(table, reading.sources) for table in tables], reading, preferred)


def _without_doubled_views(tables):
    """Keep one row of each selection, that of the spectrogram. -> (tables, rows left out)."""
    kept, n_doubled = [], 0
    for table in tables:
        names = table.names
        if "view" not in names or "selection" not in names:
            kept.append(table)
            continue
        view = names.index("view")
        keys = [names.index(name) for name in ("selection", "begin_time_s", "end_time_s")]
        keys += [names.index(name) for name in ("begin_file", "channel") if name in names]
        views = {}
        for i, row in enumerate(table.rows):
            key = tuple(row[k] for k in keys)
            views.setdefault(key, {}).setdefault(row[view].lower(), []).append(i)
        chosen = []
        for own in views.values():
            best = max(own, key=lambda text: text.startswith("spectrogram"))
            chosen += own[best]
        n_doubled += len(table.rows) - len(chosen)
        chosen.sort()
        kept.append(Table(table.path, table.header, [table.numbers[i] for i in chosen],
                          [table.rows[i] for i in chosen]))
    return kept, n_doubled


def _raven_rows(table, sources):
    names = table.names
    start, end = start_and_end(table, names.index("begin_time_s"), names.index("end_time_s"))
    recording = _raven_recordings(table)
    if recording is not None:
        offset = next((names.index(name) for name in ("file_offset_s", "begin_file_offset_s")
                       if name in names and all(row[names.index(name)].strip()
                                                for row in table.rows)), None)
        if offset is not None:
            start, end = _times_in_file(table, start, end, offset, sources)
        elif len({_base_name(text) for text in recording}) > 1:
            raise DataError(f"{table.path} is about several recordings, so Begin Time (s) may count"
                            " from the start of the first; add Raven's column File Offset (s)")
    low, high = frequencies(table)
    return Rows(table, start, end, recording, low=low, high=high)


def _raven_recordings(table):
    """The recording of each row by Begin Path or Begin File; None without such columns."""
    names = table.names
    columns = [names.index(name) for name in ("begin_path", "begin_file") if name in names]
    columns = [i for i in columns if any(row[i].strip() for row in table.rows)]
    if not columns:
        return None
    texts = [next((row[i].strip() for i in columns if row[i].strip()), "") for row in table.rows]
    if "" in texts:
        row = texts.index("")
        raise DataError(f"{table.path} row {table.numbers[row]}: {table.header[columns[0]]} is "
                        "empty; name the recording")
    return texts


def _base_name(text):
    return re.split(r"[\\/]", text)[-1].casefold()


def _times_in_file(table, start, end, offset, sources):
    """Times that count from the start of a row's own file, not of the first of several."""
    offsets, _ = start_and_end(table, offset, offset)
    if all(abs(a - b) < 0.005 for a, b in zip(start, offsets)):
        return start, end  # the same, but not rounded
    sources["time"] = "column File Offset (s), and the difference of Begin and End Time (s)"
    end = [round(begin + b - a, 9) for begin, a, b in zip(offsets, start, end)]
    check_order(table, offsets, end)
    return offsets, end


# ---- Audacity

LABEL_TRACK_HEADER = ["start", "end", "label"]


def _label_tracks(paths, reading):
    reading.sources["time"] = "columns 1 and 2 of the label tracks"
    all_rows = [_label_track(path) for path in paths]
    _set_names(all_rows, Reading(None, reading.notes, reading.sources), ("label",))
    reading.sources["label"] = "column 3 of the label tracks"
    return all_rows


def _label_track(path):
    """The rows of a label track; a line that begins with a backslash has frequencies."""
    numbers, rows, low, high = [], [], [], []
    for line_number, line in enumerate(split_lines(read_text(path)), 1):
        fields = line.split("\t")
        if line.startswith("\\") and rows:
            try:
                low[-1], high[-1] = (number(text.strip()) for text in fields[1:3])
            except ValueError:
                raise DataError(f"{path} line {line_number}: {line!r}; make it a backslash and two "
                                "frequencies, separated by tabs") from None
        elif line.strip():
            if not 2 <= len(fields) <= 3:
                raise DataError(f"{path} line {line_number}: {len(fields)} fields; a label track "
                                "has start, end and label, separated by tabs")
            numbers.append(line_number)
            rows.append((fields + [""])[:3])
            low.append(math.nan)
            high.append(math.nan)
    table = Table(path, LABEL_TRACK_HEADER, numbers, rows)
    start, end = start_and_end(table, 0, 1)
    low, high = ([value if value >= 0 else math.nan for value in band] for band in (low, high))
    return Rows(table, start, end, low=low, high=high)


# ---- tables of programs

def _birdnet(tables, reading):
    reading.notes.append("these are results of BirdNET, not of a person; check some of them")
    all_rows = []
    for table in tables:
        start, end = times_by_name(table, reading.sources)
        recording = None
        for name in ("file", "filepath"):
            if name in table.names and any(row[table.names.index(name)] for row in table.rows):
                recording = _cells(table, table.names.index(name))
        all_rows.append(Rows(table, start, end, recording))
    return _set_names(all_rows, reading, ("scientific_name",))


def _kaleidoscope(tables, reading):
    reading.sources["time"] = "columns OFFSET, DURATION"
    preferred = []
    if reading.label_column is None:
        for table in tables:
            has_manual = "manual_id" in table.names and any(
                row[table.names.index("manual_id")].strip() for row in table.rows)
            if has_manual:
                preferred = ["manual_id"]
            elif "scientific_name" in table.names:  # BirdNET's
                preferred = preferred or ["scientific_name"]
        if not preferred and any(table.rows for table in tables):
            raise DataError(f"{tables[0].path}: MANUAL ID is empty or missing, so nobody has "
                            'checked the rows; to use another column: --label-column "AUTO ID"')
        column = preferred[0] if preferred else None
    else:
        column = find_column(tables, reading.label_column)
    tables, n_dropped = _with_text(tables, column)
    if n_dropped:
        reading.notes.append(
            f"left out: {plural(n_dropped, 'row')} without {column.replace('_', ' ').upper()}; "
            "with --annotated all they count as nothing")
    all_rows = []
    for table in tables:
        start, end = start_and_end(table, column_of(table, "offset"),
                                   duration=column_of(table, "duration"))
        parts = [table.names.index(name) for name in ("indir", "folder", "in_file")
                 if name in table.names]
        recording = ["/".join(_plain_folder(row[i]) for i in parts if row[i].strip())
                     for row in table.rows]
        all_rows.append(Rows(table, start, end, recording))
    return _set_names(all_rows, reading, preferred)


def _plain_folder(text):
    return re.sub(r"^[A-Za-z]:", "", text.strip().replace("\\", "/")).rstrip("/")


def _with_text(tables, column):
    """Only the rows with something in a column. -> (tables, rows left out)."""
    kept, n_dropped = [], 0
    for table in tables:
        i = table.names.index(column) if column in table.names else None
        rows = [r for r, row in enumerate(table.rows) if i is None or row[i].strip()]
        n_dropped += len(table.rows) - len(rows)
        kept.append(Table(table.path, table.header, [table.numbers[r] for r in rows],
                          [table.rows[r] for r in rows]))
    return kept, n_dropped


def _cells(table, column):
    """The texts of a column. Raises DataError if one is empty."""
    texts = [row[column].strip() for row in table.rows]
    if "" in texts:
        row = texts.index("")
        raise DataError(f"{table.path} row {table.numbers[row]}: {table.header[column]} is empty; "
                        "name the recording")
    return texts


def _generic_seq(tables, reading):
    reading.sources["time"] = "columns onset_s, offset_s"
    all_rows = []
    for table in tables:
        if "onset_s" not in table.names or "offset_s" not in table.names:
            raise DataError(f"{table.path} has no times in seconds; add the columns onset_s and "
                            "offset_s, which are samples divided by the sampling rate")
        start, end = start_and_end(table, table.names.index("onset_s"),
                                   table.names.index("offset_s"))
        recording = _cells(table, table.names.index("notated_path"))
        if "None" in recording:
            recording = None  # crowsetta writes it if the recording is not known
        all_rows.append(Rows(table, start, end, recording))
    return _set_names(all_rows, reading, ("label",))


def _simple_seq(tables, reading):
    all_rows = []
    for table in tables:
        start, end = times_by_name(table, reading.sources)
        low, high = frequencies(table)
        all_rows.append(Rows(table, start, end, low=low, high=high))
    return _set_names(all_rows, reading)


LABEL_TYPES = {"positive": True, "1": True, "labeltype.positive": True, "negative": False,
               "0": False, "labeltype.negative": False, "uncertain": False, "2": False,
               "labeltype.uncertain": False}


def _hoplite(tables, reading):
    all_rows = []
    for table in tables:
        table = _positive_rows(table, reading)
        path = column_of(table, "filename", "recording", "recording_filename", "file", "path",
                         "source_id", "recording_id")
        times = _offset_list(table)
        if times is None:
            table = _with_plain_offsets(table)
            times = times_by_name(table, reading.sources)
        if times is None:
            raise DataError(f"{table.path} has no times among {', '.join(table.header)}; add "
                            "start_time_s and end_time_s")
        all_rows.append(Rows(table, *times, _cells(table, path)))
    _set_names(all_rows, reading, ("label",))
    if reading.label_column is None:
        _split_at_blanks(all_rows, reading)
    return all_rows


def _positive_rows(table, reading):
    if "label_type" not in table.names:
        return table
    column = table.names.index("label_type")
    rows = []
    for i, row in enumerate(table.rows):
        text = row[column].strip().lower()
        if text not in LABEL_TYPES:
            raise DataError(f"{table.path} row {table.numbers[i]}: label_type is {row[column]!r}; "
                            "make it POSITIVE, NEGATIVE or UNCERTAIN")
        if LABEL_TYPES[text]:
            rows.append(i)
    n_dropped = len(table.rows) - len(rows)
    if n_dropped:
        reading.notes.append(f"left out: {plural(n_dropped, 'row')} with a label_type that is not "
                             "POSITIVE; with --annotated all they count as nothing")
    return Table(table.path, table.header, [table.numbers[i] for i in rows],
                 [table.rows[i] for i in rows])


def _offset_list(table):
    """Times in a column of pairs such as [5.0, 10.0]; None if there is none."""
    if "offsets" not in table.names:
        return None
    column = table.names.index("offsets")
    pairs = []
    for i, row in enumerate(table.rows):
        texts = re.split(r"[,;\s]+", row[column].strip("[]() "))
        if len(texts) != 2:
            raise DataError(f"{table.path} row {table.numbers[i]}: offsets is {row[column]!r}; "
                            "make it a start and an end, such as [5.0, 10.0]")
        pairs.append(texts)
    return start_and_end(Table(table.path, ["offsets", "offsets"], table.numbers, pairs), 0, 1)


def _with_plain_offsets(table):
    """start_offset_s and end_offset_s under the names that are known."""
    header = [re.sub(r"^(start|end)_offsets?_s$", r"\1_s", name) for name in table.names]
    return Table(table.path, header, table.numbers, table.rows)


def _split_at_blanks(all_rows, reading):
    """Several names of a cell are separated by blanks in perch's tables, if each is a name."""
    names = {name for rows in all_rows for own in rows.names for name in own}
    several = sorted(name for name in names if " " in name)
    evident = {name for name in several if all(part in names for part in name.split())}
    if not several or not evident:
        return
    if len(evident) < len(several):
        other = next(name for name in several if name not in evident)
        raise DataError(f"{all_rows[0].table.path}: label {min(evident)!r} looks like several "
                        f"names, but {other!r} like one; separate several with ;")
    reading.notes.append(f"blanks in label separate names, e.g. {several[0]}")
    for rows in all_rows:
        rows.names = [tuple(dict.fromkeys(part for name in own for part in name.split()))
                      for own in rows.names]


# ---- tables of many recordings

def _one_hot(tables, reading):
    return [_one_hot_rows(table, reading) for table in tables]


def _one_hot_rows(table, reading):
    names = [KNOWN_NAMES.get(name.replace("_", ""), name) for name in table.names]
    path = next(names.index(name) for name in COLUMNS["path"].split() if name in names)
    columns = _classes(table)
    if reading.label_column is not None:
        raise DataError(f"--label-column is for tables with one label per row, but {table.path} has"
                        " a column per class; leave it out")
    times = times_by_name(table, reading.sources)
    if times is None:
        reading.notes.append("no times: each row is about a whole recording")
        times = [0.0] * len(table.rows), [math.nan] * len(table.rows)
    classes = [re.sub("^has(?=bird$)", "", table.header[i]) for i in columns]
    values = [[TRUTH[row[i].strip().lower()] for i in columns] for row in table.rows]
    low, high = frequencies(table)
    reading.sources["label"] = f"{plural(len(classes), 'column')} of 0 and 1: " + ", ".join(
        classes[:20]) + (" ..." if len(classes) > 20 else "")
    return Rows(table, *times, _cells(table, path), [
        tuple(name for name, value in zip(classes, own) if value) for own in values], low, high)


def _classes(table):
    """The columns of classes. Raises DataError if another column looks like one but is none."""
    columns = class_columns(table.names, table.rows)
    taken = {i for i, name in enumerate(table.names) if name in START | END}
    taken |= {column[0] for column in frequency_columns(table) if column}
    for i, header in enumerate(table.header):
        if i in columns or i in taken:
            continue
        texts = [row[i].strip().lower() for row in table.rows]
        n_truth = sum(text in TRUTH for text in texts)
        if n_truth < len(texts) and n_truth > 0.5 * len(texts) and i > min(columns, default=0):
            row = next(row for row, text in enumerate(texts) if text not in TRUTH)
            raise DataError(f"{table.path} row {table.numbers[row]}: {header} is "
                            f"{table.rows[row][i]!r}; make it 0 or 1, or remove the column")
    return columns


def _many_recordings(tables, reading):
    return [_many_recordings_rows(table, reading) for table in tables]


def _many_recordings_rows(table, reading):
    if not table.rows:
        raise DataError(f"{table.path} has no rows; it needs one per event")
    if reading.label_column is not None:
        table = _with_label_column(table, find_column([table], reading.label_column))
    try:
        table, columns = choose_columns(table)
    except DataError as error:
        raise DataError(str(error).replace("call the right one label", "choose one with "
                                           "--label-column")) from None
    label = table.names[columns.index["label"]]
    path = columns.index["path"]
    without = [all(row[i].strip() in ("", *MISSING) for role, i in [
        ("label", columns.index["label"]), *((role, c.index) for role, c in columns.times.items())])
        for row in table.rows]
    listed = [_cells(table, path)[i] for i, is_empty in enumerate(without) if is_empty]
    kept = [i for i, is_empty in enumerate(without) if not is_empty]
    if listed:
        reading.notes.append(f"{plural(len(listed), 'row')} without times and label: nothing is in "
                             "the recording")
    table = Table(table.path, table.header, [table.numbers[i] for i in kept],
                  [table.rows[i] for i in kept])
    times = times_by_name(table, reading.sources)
    if times is None:
        raise DataError(f"{table.path} has no times of events among {', '.join(table.header)}; add "
                        "start and end, or leave --annotated out if a row is a whole clip")
    low, high = frequencies(table)
    rows = Rows(table, *times, _with_folders(table, columns, _cells(table, path)), low=low,
                high=high, listed=listed)
    _set_names([rows], Reading(label, reading.notes, reading.sources), empty_is_nothing=True)
    reading.notes += columns.notes
    return rows


def _with_folders(table, columns, texts):
    if "folder" not in columns.index:
        return texts
    folders = [row[columns.index["folder"]].strip() for row in table.rows]
    return [f"{_plain_folder(folder)}/{text}" if folder else text
            for folder, text in zip(folders, texts)]


def _with_label_column(table, wanted):
    """The table with this column called label, and any other of that name something else."""
    header = [name if name_form != "label" else f"{name} (not read)"
              for name, name_form in zip(table.header, table.names)]
    header[table.names.index(wanted)] = "label"
    return Table(table.path, header, table.numbers, table.rows)


class Form(NamedTuple):
    """A form of annotations. read: (tables, Reading) -> a Rows per table."""
    title: str
    read: Callable | None


FORMS = {
    "raven": Form("Raven selection tables", _raven),
    "audacity": Form("Audacity label tracks", None),
    "birdnet": Form("BirdNET result tables", _birdnet),
    "kaleidoscope": Form("Kaleidoscope tables", _kaleidoscope),
    "generic-seq": Form("crowsetta's generic-seq", _generic_seq),
    "simple-seq": Form("tables of start, end and label, one per recording", _simple_seq),
    "hoplite": Form("perch-hoplite's annotations", _hoplite),
    "one-hot": Form("tables with a column per class", _one_hot),
    "table": Form("tables with a row per event", _many_recordings),
}


def count_forms(forms: Sequence[str]) -> str:
    """"3 Raven selection tables, 1 ...": how many tables are in which form, for people."""
    return ", ".join(f"{n} {FORMS[form].title}" for form, n in Counter(forms).most_common())
