"""Which column of annotation tables has the labels, and which names its cells hold."""
import re
from collections import Counter
from collections.abc import Sequence

from util import plural, summarize

from ..clip_times import is_clock_time, kind_of
from ..columns import COLUMNS
from ..csv_table import Table, as_text, column_name
from ..manifest import DataError
from ..names import MISSING
from ..tables import parse_names
from .text import LABEL_NAMES, PATH_NAMES

# The likeliest first; other columns with text may be labels, too.
ORDER = ["species", "annotation", "annotations", "label", "labels", "common_name",
         "scientific_name", "species_code", "sound_type", "call_type", "class", "name"]
# Columns of Raven and notes of people, which name no class.
NO_LABELS = {
    "", "selection", "view", "channel", "begin_file", "end_file", "begin_path", "end_path",
    "begin_date", "end_date", "file", "notes", "note", "comment", "comments", "remark",
    "remarks", "observer", "analyst", "annotator", "author", "reviewer", "validator",
    "confidence", "score", "rank", "quality", "date", "time", "week", "model", "species_list",
    "id", "begin_clock_time", "end_clock_time", "begin_date_time", "end_date_time",
    "date_time", "datetime", "timestamp",
} | {name for role in ("split", "fold", "group", "folder") for name in COLUMNS[role].split()}
UNIT = re.compile(r"\((s|min|ms|hz|khz|hz/s|db.*|u|%|bits|samples|.*fs.*)\)$", re.IGNORECASE)
NUMERIC = re.compile(r"[\s\d.,eE+-]*|nan|inf", re.IGNORECASE)
NOTHING = {"nocall", "no call", "no_call"}  # BirdNET's row for a recording without a bird


def find_column(tables: Sequence[Table], name: str) -> str:
    """The normal form of the column that --label-column names.

    Raises DataError if a table with rows does not have it.
    """
    wanted = column_name(name)
    for table in tables:
        if table.rows and wanted not in table.names:
            raise DataError(f"--label-column {name}: {table.path} has the columns "
                            f"{summarize(table.header, 20)}; name one of them")
    return wanted


def choose_column(tables: Sequence[Table], preferred: Sequence[str], notes: list[str]
                  ) -> str | None:
    """The normal form of the label's column, the same for all tables; None if they have no rows.

    preferred: the columns that the program that wrote the tables has for it, the best first.
    Raises DataError if there is none, or if two differ.
    """
    tables = [table for table in tables if table.rows]
    if not tables:
        return None
    for name in preferred:
        if all(name in table.names for table in tables):
            return name
    values = _values_by_column(tables)
    found = [name for name in values if _may_be_label(name, values[name], values)]
    found.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    if not found:
        raise DataError(f"{tables[0].path} has no column of labels with anything in it among "
                        f"{summarize(tables[0].header, 20)}; add one called Species, or name it "
                        "with --label-column")
    chosen, *others = found
    for other in others:
        if len(values[other]) == 1 and len(values[chosen]) > 1:
            continue
        if not _are_one_to_one(tables, chosen, other):
            table = max(tables, key=lambda table: len({chosen, other} & {*table.names}))
            raise DataError(f"{table.path}: both {_header(tables, chosen)} and "
                            f"{_header(tables, other)} may be the label; choose one with "
                            f'--label-column "{_header(tables, chosen)}"')
    if others:
        headers = summarize(_header(tables, name) for name in others)
        notes.append(f"columns not read, which name nothing else: {headers}")
    return chosen


def _header(tables, name):
    return next(table.header[table.names.index(name)] for table in tables if name in table.names)


def _values_by_column(tables):
    """{normal form: distinct values but empty ones} of columns that could have labels."""
    values = {}
    for table in tables:
        for i, (header, name) in enumerate(zip(table.header, table.names)):
            if name in NO_LABELS | PATH_NAMES or UNIT.search(header) or kind_of(name)[0]:
                continue
            own = {row[i].strip() for row in table.rows} - {""}
            if own:
                values.setdefault(name, set()).update(own)
    return values


def _may_be_label(name, values, all_values):
    is_number = all(NUMERIC.fullmatch(value) or is_clock_time(value) for value in values)
    if not is_number:
        return True
    # Numbers are labels only under a name that says so, and if there are no names.
    return name in LABEL_NAMES | set(ORDER) and not any(
        any(not NUMERIC.fullmatch(value) for value in others) for others in all_values.values())


def _are_one_to_one(tables, first, second):
    """Whether two columns divide all rows alike; empty fields do not count."""
    pairs = set()
    for table in tables:
        names = table.names
        if first in names and second in names:
            i, j = names.index(first), names.index(second)
            pairs.update((row[i].strip(), row[j].strip()) for row in table.rows)
        elif second in names:
            return False  # this table has only the other one
    pairs = [pair for pair in pairs if all(pair)]
    return len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


# ---- cells

def names_of_cells(tables: Sequence[Table], column: str, texts: Sequence[Sequence[str]],
                   notes: list[str], empty_is_nothing: bool = False
                   ) -> dict[str, tuple[str, ...]]:
    """{cell: names} of the label cells of tables; BirdNET's nocall has none.

    texts: the cells of each table. empty_is_nothing: whether an empty cell says that nothing is
    there. Raises DataError for an empty cell or one that stands for a missing value.
    """
    first, n_bad = None, 0
    for table, cells in zip(tables, texts):
        for row, text in enumerate(cells):
            if text in MISSING or (not text and not empty_is_nothing):
                n_bad += 1
                first = first or (table, row, text)
    if first is not None:
        table, row, text = first
        header = _header([table], column)
        more = f" (and {n_bad - 1:,} more)" if n_bad > 1 else ""
        what = f"is {text!r}, which stands for a missing value" if text else "is empty"
        raise DataError(f"{table.path} row {table.numbers[row]}{more}: {header} {what}; name what "
                        "is there, or remove the row")
    distinct = Counter(text for cells in texts for text in cells if text)
    rows = [[text] for text, n in distinct.items() for _ in range(min(n, 2))]
    pooled = Table(tables[0].path, [_header(tables, column)], [0] * len(rows), rows)
    names = parse_names(pooled, 0, list(distinct), "label", notes)
    of_cell = {text: () if as_text(text).lower() in NOTHING else own
               for text, own in zip(distinct, names)}
    n_nothing = sum(n for text, n in distinct.items() if not of_cell[text])
    if n_nothing:
        notes.append(f"{plural(n_nothing, 'row')} called nocall or the like: nothing is there")
    return {"": (), **of_cell}
