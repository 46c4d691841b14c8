"""Selection tables of Raven and label tracks of Audacity: what people draw on a spectrogram."""
import math
import re
from collections.abc import Sequence
from pathlib import Path

from util import plural

from .annotation_rows import Reading, Rows, set_names
from .annotation_text import read_text, split_lines
from .annotation_times import check_order, frequencies, number, start_and_end
from .audio import AUDIO_SUFFIXES
from .csv_table import Table
from .files import suffix
from .manifest import DataError


def read_raven(tables: list[Table], reading: Reading) -> list[Rows]:
    """Selection tables of Raven. Raises DataError."""
    tables, n_doubled = _without_doubled_views(tables)
    if n_doubled:
        reading.notes.append(f"left out: {plural(n_doubled, 'row')} that Raven doubled by View")
    reading.sources["time"] = "columns Begin Time (s), End Time (s)"
    is_birdnet = all({"common_name", "species_code", "confidence"} <= {*table.names}
                     for table in tables)
    preferred = ("scientific_name", "common_name") if is_birdnet else ()
    return set_names([_raven_rows(table, reading.sources) for table in tables], reading, preferred)


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


def read_label_tracks(paths: Sequence[Path], reading: Reading) -> list[Rows]:
    """Label tracks of Audacity. Raises DataError."""
    reading.sources["time"] = "columns 1 and 2 of the label tracks"
    all_rows = [_label_track(path) for path in paths]
    set_names(all_rows, Reading(None, reading.notes, reading.sources), ("label",))
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
            rows.append([*fields, ""][:3])
            low.append(math.nan)
            high.append(math.nan)
    table = Table(path, LABEL_TRACK_HEADER, numbers, rows)
    start, end = start_and_end(table, 0, 1)
    low, high = ([value if value >= 0 else math.nan for value in band] for band in (low, high))
    return Rows(table, start, end, low=low, high=high)
