"""Selection tables of Raven and label tracks of Audacity: what people draw on a spectrogram."""
import math
import re
from collections.abc import Sequence
from pathlib import Path

from util import plural

from ..audio import AUDIO_SUFFIXES
from ..csv_table import Table
from ..files import suffix
from ..manifest import DataError
from .rows import NOT_A_PERSON, Reading, Rows, add_source, set_names
from .text import read_text, split_lines
from .times import check_order, frequencies, number, seconds_of, start_and_end

ROUNDED = 0.005  # seconds: Raven writes offsets with fewer digits than times
MONTHS = 1e8  # seconds: recordings that are opened together


def read_raven(tables: list[Table], reading: Reading) -> list[Rows]:
    """Selection tables of Raven. Raises DataError."""
    tables, n_doubled = _without_doubled_views(tables)
    if n_doubled:
        reading.notes.append(f"left out: {plural(n_doubled, 'row')} that Raven doubled by View")
    add_source(reading.sources, "time", "columns Begin Time (s), End Time (s)")
    all_rows = [_raven_rows(table, reading.sources) for table in tables]
    preferred = ()
    if all(rows.is_birdnet for rows in all_rows):
        preferred = "scientific_name", "common_name"
        reading.notes.append(NOT_A_PERSON)
    return set_names(all_rows, reading, preferred)


def _without_doubled_views(tables):
    """Keep one row of each selection, that of the spectrogram. -> (tables, rows left out)."""
    kept, n_doubled = [], 0
    for table in tables:
        names = table.names
        view = names.index("view") if "view" in names and "selection" in names else None
        if view is None or len({row[view] for row in table.rows}) < 2:
            kept.append(table)
            continue
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
    begin, finish = table.names.index("begin_time_s"), table.names.index("end_time_s")
    recording = _raven_recordings(table)
    offset = None if recording is None else _offset_column(table)
    if offset is not None:
        start, end = _times_in_file(table, begin, finish, offset, sources)
    elif recording is not None and len({_base_name(text) for text in recording}) > 1:
        raise DataError(f"{table.path} is about several recordings, so Begin Time (s) may count "
                        "from the start of the first; add Raven's column File Offset (s)")
    else:
        start, end = start_and_end(table, begin, finish)
    low, high = frequencies(table)
    return Rows(table, start, end, recording, low=low, high=high)


def _offset_column(table):
    """The column of where an event begins in its own file, if each row has it."""
    for name in ("file_offset_s", "begin_file_offset_s"):
        if name in table.names:
            i = table.names.index(name)
            if all(row[i].strip() for row in table.rows):
                return i
    return None


def _raven_recordings(table):
    """The recording of each row by Begin Path or Begin File; None without such columns."""
    names = table.names
    columns = [names.index(name) for name in ("begin_path", "begin_file") if name in names]
    columns = [i for i in columns if any(row[i].strip() for row in table.rows)]
    if not columns:
        return None
    texts = [_path_of(*(row[i].strip() for i in columns)) for row in table.rows]
    if "" in texts:
        row = texts.index("")
        raise DataError(f"{table.path} row {table.numbers[row]}: {table.header[columns[0]]} is "
                        "empty; name the recording")
    return texts


def _path_of(first, second=""):
    """The path from Begin Path and Begin File; the first may be the folder of the second."""
    if second and first and _base_name(first) != _base_name(second) and (
            suffix(first) not in AUDIO_SUFFIXES):
        return f"{first}/{second}"
    return first or second


def _base_name(text):
    return re.split(r"[\\/]", text)[-1].casefold()


def _times_in_file(table, begin, finish, offset, sources):
    """Times in a row's own file; begin and end may count from the start of the first of several."""
    offsets = seconds_of(table, offset)
    start, end = start_and_end(table, begin, finish, most=MONTHS)
    is_same = [abs(a - b) < ROUNDED for a, b in zip(start, offsets)]
    if not all(is_same):
        add_source(sources, "time", "column File Offset (s), its end by End Time - Begin Time")
    end = [b if same else round(first + b - a, 9)
           for first, a, b, same in zip(offsets, start, end, is_same)]
    start = [a if same else first for first, a, same in zip(offsets, start, is_same)]
    check_order(table, start, end)
    return start, end


# ---- Audacity

LABEL_TRACK_HEADER = ["start", "end", "label"]


def read_label_tracks(paths: Sequence[Path], reading: Reading) -> list[Rows]:
    """Label tracks of Audacity. Raises DataError."""
    all_rows = [_label_track(path) for path in paths]
    set_names(all_rows, Reading(None, reading.notes, {}), ("label",))
    add_source(reading.sources, "time", "columns 1 and 2 of the label tracks")
    add_source(reading.sources, "label", "column 3 of the label tracks")
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
            rows.append([*fields, ""][:3])
            low.append(math.nan)
            high.append(math.nan)
    table = Table(path, LABEL_TRACK_HEADER, numbers, rows)
    start, end = start_and_end(table, 0, 1)
    low, high = ([value if value >= 0 else math.nan for value in band] for band in (low, high))
    return Rows(table, start, end, low=low, high=high)
