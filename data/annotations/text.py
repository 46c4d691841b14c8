"""Read a table of annotations as text, and tell by its header in which form it is."""
import os
import re
from pathlib import Path

from util import open_regular, unescape_cell

from ..clip_times import kind_of
from ..columns import COLUMNS, KNOWN_NAMES
from ..csv_table import TABLE_SUFFIXES, Table, column_name, read_rows, skip_preamble
from ..manifest import DataError

HEAD = 1 << 14  # bytes that tell the form of a table
# Other names of the path in tables of events, the likeliest first.
EVENT_PATHS = ("begin_path", "begin_file", "recording_filename", "recording", "sound_files",
               "source_file", "notated_path", "in_file")
PATH_NAMES = {*COLUMNS["path"].split(), *EVENT_PATHS}
LABEL_NAMES = {*COLUMNS["label"].split(), "name", "syllable"}
LOW = {"low_freq", "low_frequency", "low_f", "freq_low", "f_low", "min_freq", "min_frequency",
       "freq_min", "fmin", "f_min", "low", "minimum_frequency", "lower_frequency", "frequency_low",
       "frequency_min"}
HIGH = {"high_freq", "high_frequency", "high_f", "freq_high", "f_high", "max_freq",
        "max_frequency", "freq_max", "fmax", "f_max", "high", "maximum_frequency",
        "upper_frequency", "frequency_high", "frequency_max"}
# Columns beside those of a one-hot table's classes.
NO_CLASSES = {"", "id", "index", "row", "unnamed", "unnamed_0", "selection", "view", "channel",
              "datasetid", "confidence", "score", "duration", "annotator", "notes", "train", "val",
              "test", "is_train", "is_val", "is_test", "verified", "reviewed", "checked", "valid"}
TRUTH = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
NUMBER = re.compile(r"-?\d+([.,]\d*)?([eE][-+]?\d+)?")


def read_text(path: Path, size: int = -1) -> str:
    """The text of a file, UTF-8 or UTF-16 with a byte-order mark; other bytes as escapes.

    size: the number of bytes to read, -1 for all. Raises DataError.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; fix the file") from None
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", "replace")
    if b"\0" in raw[:200]:
        raise DataError(f"{path} is not UTF-8 text; save it as CSV in UTF-8")
    return raw.decode("utf-8-sig", "surrogateescape")


def split_lines(text: str) -> list[str]:
    """Lines as editors count them; str.splitlines also splits at separators within names."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_annotation_table(path: Path) -> Table:
    """Read a table with a header; unlike a table of clips it may have no rows. Raises DataError."""
    text, n_skipped, separator = skip_preamble(read_text(path))
    if separator == "\t" and '"' not in text:  # the usual case, which is much faster
        lines = [(number, line.split("\t")) for number, line
                 in enumerate(split_lines(text), 1 + n_skipped) if line.strip("\t ")]
    else:
        lines = [(number, row) for number, row in read_rows(path, text, separator, n_skipped)
                 if any(row)]
        if separator != "\t":  # selection tables are not escaped
            lines = [(number, [unescape_cell(cell) for cell in row]) for number, row in lines]
    if not lines:
        raise DataError(f"{path} is empty; write its header, or remove it")
    (_, header), *lines = lines
    header = [name.strip() for name in header]
    n = len(header)
    for number, row in lines:
        if len(row) != n:
            if any(row[n:]):
                raise DataError(f"{path} row {number}: {len(row)} fields under a header of {n}; "
                                "put quotes around a field that contains the separator")
            row[:] = (row + [""] * n)[:n]
    return Table(path, header, [number for number, _ in lines], [row for _, row in lines])


def form_of(path: Path) -> str | None:
    """In which form a file has annotations: a key of `forms.FORMS`.

    "table" is a table with a row per event or clip of many recordings, "empty" a file without
    text, None anything else. Raises DataError if it cannot be read.
    """
    text = read_text(path, HEAD)
    if not text.strip():
        return "empty"
    if os.path.getsize(path) > HEAD:
        text = text[:text.rfind("\n") + 1]  # the last line may be cut
    if path.name.lower().endswith(".txt") and _is_label_track(text):
        return "audacity"
    text, _, separator = skip_preamble(text)
    lines = [line for line in split_lines(text) if line]

    def first_rows():
        return [[field.strip(' "') for field in line.split(separator)] for line in lines[1:]]

    header = lines[0].split(separator) if lines else []
    names = [column_name(name.strip(' "')) for name in header]
    return _form_of_names(names, first_rows, path.name.lower())


def _form_of_names(names, first_rows, file_name):
    has = set(names).issuperset
    if has({"begin_time_s", "end_time_s"}) and (
            {"selection", "view"} & set(names) or re.search(r"selections?(\.table)?\.txt$",
                                                            file_name)):
        return "raven"
    if has({"in_file", "offset", "duration"}):
        return "kaleidoscope"
    if has({"scientific_name", "common_name"}) and (
            has({"start_s", "end_s"}) or has({"start", "end", "confidence"})):
        return "birdnet"
    if has({"label", "notated_path", "annot_path"}):
        return "generic-seq"
    if has({"itemid", "hasbird"}):
        return "one-hot"
    known = {KNOWN_NAMES.get(name.replace("_", ""), name) for name in names} | set(names)
    has_times = _has_times(names)
    has_path = bool(known & PATH_NAMES)
    if "label_type" in names or (file_name == "annotations.csv" and names == [
            "filename", "start_time_s", "end_time_s", "label"]):
        return "hoplite"
    if has_times and has_path and not known & LABEL_NAMES and class_columns(names, first_rows()):
        return "one-hot"
    if has_times and not has_path and known & LABEL_NAMES:
        return "simple-seq"
    return "table" if has_path else None


def _has_times(names):
    kinds = {kind_of(name)[0] for name in names}
    return ("start" in kinds and bool(kinds & {"end", "offset", "duration"})) or (
        {"offset", "duration"} <= kinds)


def class_columns(names: list[str], rows: list[list[str]]) -> list[int]:
    """The columns of a one-hot table's classes: those that have only 0 and 1 or False and True.

    names: of all columns, in their normal form.
    """
    known = {name for role in ("path", "split", "fold", "group", "folder")
             for name in COLUMNS[role].split()} | PATH_NAMES | NO_CLASSES | LOW | HIGH
    return [i for i, name in enumerate(names)
            if name not in known and kind_of(name)[0] is None and rows
            and all(i < len(row) and row[i].strip().lower() in TRUTH for row in rows)]


def _is_label_track(text):
    """Whether a text is a label track of Audacity: no header, and start, end, label in each line.

    Three columns of numbers can be anything; whole numbers in the last one can be labels.
    """
    first = text.lstrip("\r\n").split("\t", 1)[0].strip()
    if not NUMBER.fullmatch(first):
        return False
    lines = [line.split("\t") for line in split_lines(text) if line.strip()]
    events = [fields for fields in lines[:200] if fields[0] != "\\"]
    if not all(
            len(fields) in (2, 3) and all(NUMBER.fullmatch(field.strip()) for field in fields[:2])
            for fields in events[:3]):
        return False
    labels = [fields[2].strip() for fields in events if len(fields) == 3]
    return any(labels) and not any(re.fullmatch(r"-?\d*[.,]\d+", label) for label in labels)


def frequency_columns(table: Table) -> tuple[tuple[int, float] | None, ...]:
    """The columns of the lowest and the highest frequency, each as (index, Hz per unit) or None."""
    found = []
    for names in (LOW, HIGH):
        column = None
        for i, name in enumerate(table.names):
            bare = re.sub(r"_k?hz$", "", name)
            if bare in names and column is None:
                column = i, 1000.0 if name.endswith("_khz") else 1.0
        found.append(column)
    return tuple(found)


def is_table(name: str) -> bool:
    """Whether a file may be a table by its name."""
    return os.path.splitext(name)[1].lower() in TABLE_SUFFIXES
