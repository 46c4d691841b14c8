"""Rows of events, as a table of annotations has them."""
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..csv_table import Table
from ..manifest import DataError
from .labels import choose_column, find_column, names_of_cells

NOT_A_PERSON = "these are results of BirdNET, not of a person; check some of them"


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
    by_name: bool = True  # whether a table without rows belongs to the recording of its name
    listed: list[str] = field(default_factory=list)  # recordings that have no event

    @property
    def is_birdnet(self) -> bool:
        """Whether BirdNET wrote the table, in whichever form."""
        return {"common_name", "confidence"} <= {*self.table.names}


class Reading(NamedTuple):
    """How tables are to be read, and what was decided."""
    label_column: str | None
    notes: list[str]
    sources: dict[str, str]


def set_names(all_rows: Sequence[Rows], reading: Reading, preferred: Sequence[str] = (),
              empty_is_nothing: bool = False) -> Sequence[Rows]:
    """Choose the label's column of these Rows and fill in their names; returns them.

    preferred: see `choose_column`; empty_is_nothing: see `names_of_cells`. Raises DataError.
    """
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
        if rows.table.names.count(column) > 1:
            raise DataError(f"{rows.table.path}: the column {rows.table.header[index]} occurs "
                            "twice; remove one")
    texts = [[row[index].strip() for row in rows.table.rows]
             for rows, index in zip(filled, indices)]
    of_cell = names_of_cells([rows.table for rows in filled], column, texts, reading.notes,
                             empty_is_nothing)
    for rows, own in zip(filled, texts):
        rows.names = [of_cell[text] for text in own]
    add_source(reading.sources, "label", f"column {filled[0].table.header[indices[0]]}")
    return all_rows


def add_source(sources: dict[str, str], role: str, source: str) -> None:
    """Note what decided a role; tables in another form may have decided it otherwise."""
    known = sources.get(role, "").split("; ")
    if source not in known:
        sources[role] = "; ".join([*filter(None, known), source])


def recording_cells(table: Table, column: int) -> list[str]:
    """The texts of a column. Raises DataError if one is empty."""
    texts = [row[column].strip() for row in table.rows]
    if "" in texts:
        row = texts.index("")
        raise DataError(f"{table.path} row {table.numbers[row]}: {table.header[column]} is empty; "
                        "name the recording")
    return texts


def plain_folder(text: str) -> str:
    """A folder, also of Windows, with / and without its drive."""
    return re.sub(r"^[A-Za-z]:", "", text.strip().replace("\\", "/")).rstrip("/")
