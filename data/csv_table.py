"""Read a CSV, TSV or semicolon table as text."""
import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from .manifest import DataError


@dataclass
class Table:
    """The fields of a table as text."""
    path: Path
    header: list[str]
    numbers: list[int]  # of each row as a spreadsheet counts them, for messages
    rows: list[list[str]]  # each as long as the header

    @property
    def names(self) -> list[str]:
        """The column names in their normal form."""
        return [column_name(name) for name in self.header]


def column_name(text: str) -> str:
    """Lower-case a column's name and write _ for blanks, hyphens and dots."""
    return re.sub(r"[ .-]", "_", text.lower())


def read_table(path: Path) -> Table:
    """Read a table in UTF-8; its first line tells the separator. Empty rows are skipped.

    Raises DataError if it cannot be read, has no rows, or has a row longer than the header.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        first_line = text.split("\n", 1)[0]
        if "\0" in first_line:
            raise DataError(f"{path} is not UTF-8 text; save it as CSV in UTF-8")
        separator = max(",;\t", key=first_line.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator,
                            skipinitialspace=True)
        lines = [(number, row) for number, row in enumerate(reader, 1) if any(row)]
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}; fix the file") from None
    if len(lines) < 2:
        raise DataError(f"{path} has no rows; it needs a header such as path,label and one row per "
                        "clip")
    (_, header), *lines = lines
    for number, row in lines:
        if any(row[len(header):]):
            raise DataError(f"{path} row {number}: {len(row)} fields under a header of "
                            f"{len(header)}; put quotes around a field that contains the separator")
        row += [""] * (len(header) - len(row))
    return Table(path, [name.strip() for name in header], [number for number, _ in lines],
                 [row for _, row in lines])
