"""Class names: one spelling for names that look alike, and cells that mean "nothing"."""
import re
import unicodedata
from collections.abc import Collection, Iterable

from util import printable, summarize

from .csv_table import as_text
from .manifest import DataError

# Cells that a spreadsheet or a data frame writes for a missing value. "none" can be a class.
MISSING = {"nan", "NaN", "NAN", "NA", "N/A", "n/a", "#N/A", "<NA>", "null", "NULL", "None", "NaT"}


def tidy(name: str) -> str:
    """A name in Unicode's composed form (NFC), with single blanks and without control bytes.

    Names that look the same on a screen become equal. The result can be printed anywhere.
    """
    if name.isascii() and name.isprintable() and "  " not in name and name.strip() == name:
        return name
    name = unicodedata.normalize("NFC", name)
    name = re.sub(r"[\u200b-\u200d\u2060\ufeff\u00ad]", "", name)  # invisible characters
    name = re.sub(r"[^\S\n\r]+", " ", name).strip(" ")
    return printable(name)


def unify_names(names: Iterable[str], known: Collection[str] = (), data: object = ""
                ) -> tuple[dict[str, str], list[str]]:
    """One class name for each name that the data has -> ({name: class name}, notes).

    names: as the data has them. known: class names of a checkpoint; they win over other spellings.
    data: the folder of the data, for messages.

    Names that differ in blanks or Unicode form are one class, and so are 0 and 0.0. Raises
    DataError for names that differ in case, underscores or leading zeros: they may be one or two.
    """
    names = sorted(set(names))
    of_name = {name: tidy(_decode(name)) for name in names}
    spelled = {tidy(name): name for name in known}
    integers = _as_integers(set(of_name.values()))
    for name, text in of_name.items():
        text = integers.get(text, text)
        of_name[name] = spelled.get(text, text)
    _refuse_similar(set(of_name.values()), known, data)
    merged = {}
    for name, text in of_name.items():
        merged.setdefault(text, []).append(name)
    pairs = [f"{' = '.join(map(ascii, spellings))}" for text, spellings in merged.items()
             if len(spellings) > 1]
    if not pairs:
        return of_name, []
    return of_name, [f"names of one class in several spellings: {summarize(pairs, 3)}"]


def _decode(name):
    """A name whose bytes are UTF-8 after all; other bytes stay as they are, to be escaped."""
    text = as_text(name)
    if text == name:
        return name
    raw = name.encode("utf-8", "surrogateescape")
    return text if text.encode("utf-8", "surrogateescape") == raw else name


def _as_integers(names):
    """{"0.0": "0"} for numbers that occur in both forms."""
    return {name: name[:-2] for name in names
            if re.fullmatch(r"-?\d+\.0", name) and name[:-2] in names}


def _refuse_similar(names, known, data):
    """Raise DataError if two names differ only in case, underscores or leading zeros."""
    first = {}
    for name in sorted(names):
        key = re.sub(r"[\s_-]+", " ", name.casefold()).strip() or name
        if re.fullmatch(r"\d+(\.0+)?", name):
            key = float(name)
        other = first.setdefault(key, name)
        if other != name and not (other in known and name in known):
            raise DataError(f"--data {data}: the names of the classes {other} and {name} differ "
                            "only in case, blanks or zeros; write both alike if they are one "
                            "class, or rename one")
