"""Read a CSV, TSV or semicolon table as text."""
import csv
import functools
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

from util import read_regular, unescape_cell

from .files import suffix
from .manifest import DataError

SEPARATORS = ",;\t|"
TABLE_SUFFIXES = (".csv", ".tsv", ".txt")  # of files that may be tables


@dataclass
class Table:
    """The fields of a table as text."""
    path: Path
    header: list[str]
    numbers: list[int]  # of each row as a spreadsheet counts them, for messages
    rows: list[list[str]]  # each as long as the header
    notes: list[str] = field(default_factory=list)  # lines worth printing
    short: dict[int, int] = field(default_factory=dict)  # number of a row that lacks fields: has

    @property
    def names(self) -> list[str]:
        """The column names in their normal form."""
        return [column_name(name) for name in self.header]


@functools.lru_cache(1000)
def column_name(text: str) -> str:
    """Normal form of a column's name: Begin Time (s), beginTime_s and begin-time.s are alike."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", text)
    return re.sub(r"[^\w#]+", "_", words.lower()).strip("_")


def read_table(path: Path) -> Table:
    """Read a table in UTF-8 or Windows-1252; its header tells the separator.

    Skipped are empty rows, lines with # above the header, and Excel's line sep=;. In a table with
    tabs, a quote is special only if it encloses a whole field. An apostrophe that keeps a cell
    from being a formula is removed, see `util.escape_cell`.

    Raises DataError if it cannot be read, has no rows, has a row longer than the header or a quote
    that is not closed.
    """
    try:
        text = read_regular(path).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; fix the file") from None
    if "\0" in text.split("\n", 1)[0]:
        raise DataError(f"{path} is not UTF-8 text; save it as CSV in UTF-8")
    text, n_skipped, separator = skip_preamble(text)
    lines = [(number, row) for number, row in read_rows(path, text, separator, n_skipped)
             if any(row)]
    if len(lines) < 2:
        raise DataError(f"{path} has no rows; it needs a header such as path,label and one row per "
                        "clip")
    (_, header), *lines = lines
    header = [name.strip() for name in header]
    _refuse_missing_header(path, header)
    short = {number: len(row) for number, row in lines if len(row) < len(header)}
    for number, row in lines:
        if any(row[len(header):]):
            raise DataError(f"{path} row {number}: {len(row)} fields under a header of "
                            f"{len(header)}; put quotes around a field that contains the separator")
        row += [""] * (len(header) - len(row))
        row[:] = [unescape_cell(cell) for cell in row]
    return Table(path, header, [number for number, _ in lines], [row for _, row in lines],
                 short=short)


def as_text(field: str) -> str:
    """The text of a field or name with bytes that could not be decoded.

    The bytes are UTF-8 if that is possible (the system's encoding was another), else Windows-1252.
    """
    if field.isascii() or not re.search("[\udc80-\udcff]", field):
        return field
    raw = field.encode("utf-8", "surrogateescape")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        # Five bytes have no meaning in Windows-1252; Latin-1 has one for each.
        return raw.decode("cp1252" if not re.search(rb"[\x81\x8d\x8f\x90\x9d]", raw) else "latin-1")


def skip_preamble(text: str) -> tuple[str, int, str]:
    """Find the header. -> (text from the header on, number of lines above it, separator)."""
    lines = text.split("\n")
    n_skipped = 0
    separator = None
    match = re.fullmatch(r"\s*\"?sep=(.|\\t)\"?\s*", lines[0], re.IGNORECASE)
    if match:
        separator = "\t" if match[1] == "\\t" else match[1]
        n_skipped = 1
    first = n_skipped
    while n_skipped < len(lines) and (lines[n_skipped].startswith("#") or (
            n_skipped > first and not lines[n_skipped].strip())):
        n_skipped += 1
    header = lines[n_skipped] if n_skipped < len(lines) else ""
    separator = separator or max(SEPARATORS, key=header.count)
    if n_skipped > first:
        # The last comment may be the header: "# YTID, start_seconds, end_seconds, labels".
        comment = lines[n_skipped - 1].lstrip("# ")
        n_fields = len(next(csv.reader([header], delimiter=separator, skipinitialspace=True), []))
        if comment.count(separator) + 1 == n_fields > 1 and _is_data(header, separator):
            n_skipped -= 1
            lines[n_skipped] = comment
    return "\n".join(lines[n_skipped:]), n_skipped, separator


def _is_data(line, separator):
    """Whether a line cannot be a header: a field is a number or names an audio file."""
    fields = [text.strip(' "') for text in line.split(separator)]
    return any(re.fullmatch(r"-?\d+([.,]\d+)?", text) or _names_audio(text) for text in fields)


def _names_audio(text):
    return suffix(text) in {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".m4a"}


def _refuse_missing_header(path, header):
    audio = next((name for name in header if _names_audio(name)), None)
    if audio is not None:
        raise DataError(f"{path} has no header: its first line is a clip ({audio}); put a line "
                        "such as path,label above it")


def read_rows(path: Path, text: str, separator: str, n_skipped: int
              ) -> list[tuple[int, list[str]]]:
    """[(number, fields)] of the header and each row. Raises DataError for a quote left open."""
    read = _tab_rows if separator == "\t" else _csv_rows
    return read(path, text, separator, n_skipped)


def _csv_rows(path, text, separator, n_skipped):
    """[(number, fields)] of each row; quotes enclose fields."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True,
                        strict=True)
    rows = []
    try:
        for row in reader:
            rows.append((len(rows) + 1 + n_skipped, row))
            # A quote that is closed in a later row by chance.
            for field in row:
                if "\n" in field and field.count(separator) >= len(rows[0][1]) - 1 > 0:
                    raise _unclosed(path, rows[-1][0])
    except csv.Error as error:
        if "field larger" in str(error):
            raise DataError(f"{path} cannot be read: {error}; fix the file") from None
        tidy = re.sub(rf'"[ ]+(?=[{separator}\r\n])', '"', text)  # blanks after a closing quote
        if tidy != text:
            return _csv_rows(path, tidy, separator, n_skipped)
        raise _unclosed(path, len(rows) + 1 + n_skipped) from None
    return rows


def _unclosed(path, number):
    return DataError(f'{path} row {number}: a quote (") does not enclose a whole field; remove it, '
                     'or write the field as "5"" pipe"')


def _tab_rows(path, text, separator, n_skipped):
    """[(number, fields)] of each line; a quote within a field is an ordinary character."""
    rows = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1 + n_skipped):
        fields = [_unquote(text.lstrip(" ")) for text in line.split("\t")]
        if '"' in line and rows and len(fields) > len(rows[0][1]):  # a tab within quotes
            fields = next(csv.reader([line], delimiter="\t"))
        rows.append((number, fields))
    return rows


def _unquote(field):
    inner = field[1:-1].replace('""', "")
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner:
        return field[1:-1].replace('""', '"')
    return field
