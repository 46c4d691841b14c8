"""Tables of annotations that programs write: BirdNET, Kaleidoscope, crowsetta, perch-hoplite.

crowsetta reads some of these forms, but brings pandas, pandera and more, takes one file per call
and refuses what people have changed by hand. A few lines for each form are enough.
"""
import re

from util import plural

from ..csv_table import Table
from ..manifest import DataError
from .labels import find_column
from .rows import (
    NOT_A_PERSON,
    Reading,
    Rows,
    add_source,
    plain_folder,
    recording_cells,
    set_names,
)
from .times import column_of, frequencies, start_and_end, times_by_name


def read_birdnet(tables: list[Table], reading: Reading) -> list[Rows]:
    """Result tables of BirdNET. Raises DataError."""
    reading.notes.append(NOT_A_PERSON)
    all_rows = []
    for table in tables:
        start, end = times_by_name(table, reading.sources)
        recording = None
        for name in ("file", "filepath"):
            if name in table.names and any(row[table.names.index(name)] for row in table.rows):
                recording = recording_cells(table, table.names.index(name))
        all_rows.append(Rows(table, start, end, recording))
    return set_names(all_rows, reading, ("scientific_name",))


def read_kaleidoscope(tables: list[Table], reading: Reading) -> list[Rows]:
    """Tables of Kaleidoscope, with what a person has put in. Raises DataError."""
    add_source(reading.sources, "time", "columns OFFSET, DURATION")
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
        recording = ["/".join(plain_folder(row[i]) for i in parts if row[i].strip())
                     for row in table.rows]
        all_rows.append(Rows(table, start, end, recording, by_name=False))
    return set_names(all_rows, reading, preferred)


def _with_text(tables, column):
    """Only the rows with something in a column. -> (tables, rows left out)."""
    kept, n_dropped = [], 0
    for table in tables:
        i = table.names.index(column) if column in table.names else None
        rows = [r for r, row in enumerate(table.rows) if i is not None and row[i].strip()]
        n_dropped += len(table.rows) - len(rows)
        kept.append(Table(table.path, table.header, [table.numbers[r] for r in rows],
                          [table.rows[r] for r in rows]))
    return kept, n_dropped


def read_generic_seq(tables: list[Table], reading: Reading) -> list[Rows]:
    """crowsetta's generic-seq. Raises DataError."""
    add_source(reading.sources, "time", "columns onset_s, offset_s")
    all_rows = []
    for table in tables:
        if "onset_s" not in table.names or "offset_s" not in table.names:
            raise DataError(f"{table.path} has no times in seconds; add the columns onset_s and "
                            "offset_s, which are samples divided by the sampling rate")
        start, end = start_and_end(table, table.names.index("onset_s"),
                                   table.names.index("offset_s"))
        recording = recording_cells(table, table.names.index("notated_path"))
        if set(recording) == {"None"}:
            recording = None  # crowsetta writes it if the recording is not known
        all_rows.append(Rows(table, start, end, recording))
    return set_names(all_rows, reading, ("label",))


def read_simple_seq(tables: list[Table], reading: Reading) -> list[Rows]:
    """A table of start, end and label for each recording, such as crowsetta's simple-seq.

    Raises DataError.
    """
    all_rows = []
    for table in tables:
        start, end = times_by_name(table, reading.sources)
        low, high = frequencies(table)
        all_rows.append(Rows(table, start, end, low=low, high=high))
    return set_names(all_rows, reading)


LABEL_TYPES = {"positive": True, "1": True, "labeltype.positive": True, "negative": False,
               "0": False, "labeltype.negative": False, "uncertain": False, "2": False,
               "labeltype.uncertain": False}


def read_hoplite(tables: list[Table], reading: Reading) -> list[Rows]:
    """Annotations of perch-hoplite and perch. Raises DataError."""
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
        all_rows.append(Rows(table, *times, recording_cells(table, path), by_name=False))
    set_names(all_rows, reading, ("label",))
    if reading.label_column is None and not any("label_type" in table.names for table in tables):
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
    if not several:
        return
    if len(evident) < len(several):
        name = next(name for name in several if name not in evident)
        raise DataError(f"{all_rows[0].table.path}: label {name!r} may be one name or several; "
                        "separate several with ;, or give --label-column label if it is one")
    reading.notes.append(f"blanks in label separate names, e.g. {several[0]}")
    for rows in all_rows:
        rows.names = [tuple(dict.fromkeys(part for name in own for part in name.split()))
                      for own in rows.names]
