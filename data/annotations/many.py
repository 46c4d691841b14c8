"""Tables of many recordings: a row per event, or a row per stretch and a column per class."""
import math
import re

from util import plural

from ..columns import COLUMNS, KNOWN_NAMES, choose_columns
from ..csv_table import Table
from ..manifest import DataError
from ..names import MISSING
from .labels import find_column
from .rows import Reading, Rows, plain_folder, recording_cells, set_names
from .text import EVENT_PATHS, LABEL_NAMES, TRUTH, class_columns
from .times import frequencies, times_by_name


def read_one_hot(tables: list[Table], reading: Reading) -> list[Rows]:
    """Tables with a column of 0 and 1 for each class. Raises DataError."""
    return [_one_hot_rows(table, reading) for table in tables]


def _one_hot_rows(table, reading):
    path = _path_column(table)
    columns = _classes(table)
    if not columns:
        raise DataError(f"{table.path} has no column of 0 and 1 for a class in all its rows; give "
                        "it one, or a column label")
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
    return Rows(table, *times, recording_cells(table, path), [
        tuple(name for name, value in zip(classes, own) if value) for own in values], low, high,
        by_name=False)


def _path_column(table):
    """The column of the recordings, or None."""
    names = [KNOWN_NAMES.get(name.replace("_", ""), name) for name in table.names]
    known = [*COLUMNS["path"].split(), *EVENT_PATHS]
    return next((names.index(name) for name in known if name in names), None)


def _classes(table):
    """The columns of classes. Raises DataError if another column is almost one."""
    columns = class_columns(table.names, table.rows)
    for i, (header, name) in enumerate(zip(table.header, table.names)):
        if i in columns or not class_columns([name], [["0"]]):  # times, paths and the like
            continue
        texts = [row[i].strip().lower() for row in table.rows]
        bad = [row for row, text in enumerate(texts) if text not in TRUTH]
        if bad and len(bad) < len(texts) and all(_is_score(texts[row]) for row in bad):
            raise DataError(f"{table.path} row {table.numbers[bad[0]]}: {header} is "
                            f"{table.rows[bad[0]][i]!r}; make it 0 or 1, or remove the column")
    return columns


def _is_score(text):
    """Whether a cell is empty, stands for a missing value or is a number from 0 to 1."""
    try:
        return not text or text == "na" or (not float(text) < 0 and not float(text) > 1)
    except ValueError:
        return text in {name.lower() for name in MISSING}


def read_many(tables: list[Table], reading: Reading) -> list[Rows]:
    """Tables with a row for each event of many recordings. Raises DataError."""
    return [_many_recordings_rows(table, reading) for table in tables]


def _many_recordings_rows(table, reading):
    if not table.rows:
        raise DataError(f"{table.path} has no rows; it needs one per event")
    given = None
    if reading.label_column is not None:
        wanted = find_column([table], reading.label_column)
        given = table.header[table.names.index(wanted)]
        table = _with_label_column(table, wanted)
    path = _path_column(table)
    if path is not None and table.names[path] in EVENT_PATHS:
        header = [*table.header[:path], "path", *table.header[path + 1:]]
        table = Table(table.path, header, table.numbers, table.rows)
    known = {KNOWN_NAMES.get(name.replace("_", ""), name) for name in table.names}
    if not known & LABEL_NAMES and class_columns(table.names, table.rows):
        raise DataError(f"{table.path} has a column per class, but no times of events; add start "
                        "and end")
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
    listed = [recording_cells(table, path)[i] for i, is_empty in enumerate(without) if is_empty]
    kept = [i for i, is_empty in enumerate(without) if not is_empty]
    if listed:
        reading.notes.append(f"{plural(len(listed), 'row')} without times and label: nothing is in "
                             "the recording")
    table = Table(table.path, table.header, [table.numbers[i] for i in kept],
                  [table.rows[i] for i in kept])
    # UrbanSound8K's times are positions in the recordings that its clips were cut from.
    times = times_by_name(table, reading.sources) if columns.times else None
    if times is None:
        raise DataError(f"{table.path} has no times of events among {', '.join(table.header)}; add "
                        "start and end, or leave --annotated out if a row is a whole clip")
    low, high = frequencies(table)
    rows = Rows(table, *times, _with_folders(table, columns, recording_cells(table, path)), low=low,
                high=high, by_name=False, listed=listed)
    set_names([rows], Reading(label, reading.notes, reading.sources), empty_is_nothing=True)
    if given is not None:
        reading.sources["label"] = f"column {given}"
    reading.notes.extend(columns.notes)
    return rows


def _with_folders(table, columns, texts):
    if "folder" not in columns.index:
        return texts
    folders = [row[columns.index["folder"]].strip() for row in table.rows]
    return [f"{plain_folder(folder)}/{text}" if folder else text
            for folder, text in zip(folders, texts)]


def _with_label_column(table, wanted):
    """The table with this column called label, and any other of that name something else."""
    header = [name if name_form != "label" else f"{name} (not read)"
              for name, name_form in zip(table.header, table.names)]
    header[table.names.index(wanted)] = "label"
    return Table(table.path, header, table.numbers, table.rows)
