"""Numbers in annotation tables: times in seconds and frequencies in Hz."""
import math
from collections.abc import Sequence

from ..clip_times import TimeColumn, is_clock_time, time_columns
from ..csv_table import Table
from ..manifest import DataError
from .rows import add_source
from .text import frequency_columns

DAY = 86400.0  # seconds; an event beyond a day is a mistake in its unit


def number(text: str) -> float:
    """A number, also with a decimal comma; raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        value = float(text.replace(",", ".")) if text.count(",") == 1 and "." not in text else None
        if value is None:
            raise
    if "_" in text:  # Python allows 1_000
        raise ValueError(text)
    return value


def seconds_of(table: Table, column: int, unit: float = 1.0, most: float = DAY) -> list[float]:
    """The times of a column in seconds. unit: seconds per unit. most: seconds that are possible.

    Raises DataError.
    """
    texts = [row[column] for row in table.rows]
    try:
        values = [unit * float(text) for text in texts]
        if all(0 <= value <= most for value in values) and "_" not in "".join(texts):
            return values
    except ValueError:
        pass
    return [_checked_seconds(table, row, column, unit, most) for row in range(len(texts))]


def _checked_seconds(table, row, column, unit, most):
    text = table.rows[row][column].strip()
    place = f"{table.path} row {table.numbers[row]}: {table.header[column]} is"
    try:
        value = unit * number(text)
    except ValueError:
        value = math.nan
    if value > most:
        raise DataError(f"{place} {value:.10g} s, which is beyond a day; make it seconds from the "
                        "start of the recording")
    if not value >= 0:
        hint = "; a time of day is no time in the recording" if is_clock_time(text) else ""
        raise DataError(f"{place} {text!r}; make it a time from 0 up, such as 1.5{hint}")
    return value


def column_of(table: Table, *names: str) -> int:
    """The column with one of these names in its normal form. Raises DataError if none has."""
    for name in names:
        if name in table.names:
            return table.names.index(name)
    raise DataError(f"{table.path} has no column {names[0]} among {', '.join(table.header)}; "
                    "add it")


def start_and_end(table: Table, start: int, end: int | None = None, duration: int | None = None,
                  units: Sequence[float] = (1.0, 1.0), most: float = DAY
                  ) -> tuple[list[float], list[float]]:
    """Times of each row in seconds, from columns of start and either end or duration.

    units: seconds per unit of the two. most: seconds that are possible. Raises DataError, also if
    an event ends before its start.
    """
    starts = seconds_of(table, start, units[0], most)
    if end is not None:
        ends = seconds_of(table, end, units[1], most)
    else:
        lengths = seconds_of(table, duration, units[1], most)
        # Without the error of the sum, which could reach into the next window.
        ends = [round(a + b, 9) for a, b in zip(starts, lengths)]
    check_order(table, starts, ends, most)
    return starts, ends


def check_order(table: Table, starts: Sequence[float], ends: Sequence[float], most: float = DAY
                ) -> None:
    """Raise DataError if an event ends before its start or beyond `most` seconds."""
    for row, (start, end) in enumerate(zip(starts, ends)):
        if end < start:
            raise DataError(f"{table.path} row {table.numbers[row]}: the event ends at {end:g} s, "
                            f"before its start at {start:g} s; fix the row")
        if end > most:
            raise DataError(f"{table.path} row {table.numbers[row]}: the event ends at {end:.10g} "
                            "s, which is beyond a day; make it seconds from the start of the "
                            "recording")


def times_by_name(table: Table, sources: dict[str, str]) -> tuple[list[float], list[float]] | None:
    """Start and end of each row by the columns called so; None if the table has no such columns.

    sources: gets how the times were read. Raises DataError.
    """
    columns = time_columns(table.header, [True] * len(table.header), table.path)
    if not columns:
        return None
    last = columns.get("end", columns.get("duration"))
    if "start" not in columns or last is None:
        missing = "start" if "start" not in columns else "end"
        raise DataError(f"{table.path} has no column of the event's {missing} among "
                        f"{', '.join(table.header)}; add one, in seconds")
    add_source(sources, "time", "columns " + ", ".join(
        _describe(table, role, column) for role, column in columns.items()))
    units = columns["start"].seconds, last.seconds
    if "end" in columns:
        return start_and_end(table, columns["start"].index, last.index, units=units)
    return start_and_end(table, columns["start"].index, duration=last.index, units=units)


def _describe(table, role, column: TimeColumn):
    unit = "" if column.seconds == 1 else f", in units of {column.seconds:g} s"
    return f"{table.header[column.index]} as {role}{unit}"


def frequencies(table: Table) -> tuple[list[float], list[float]]:
    """The lowest and highest frequency of each row in Hz, nan where not given.

    Raises DataError.
    """
    bands = []
    for column in frequency_columns(table):
        if column is None:
            bands.append([math.nan] * len(table.rows))
            continue
        index, unit = column
        try:
            bands.append([unit * float(row[index] or "nan") for row in table.rows])
        except ValueError:
            bands.append([_checked_hertz(table, row, index, unit)
                          for row in range(len(table.rows))])
    return bands[0], bands[1]


def _checked_hertz(table, row, column, unit):
    text = table.rows[row][column].strip()
    try:
        return unit * number(text) if text else math.nan
    except ValueError:
        raise DataError(f"{table.path} row {table.numbers[row]}: {table.header[column]} is "
                        f"{text!r}; make it a frequency in Hz, or leave it empty") from None
