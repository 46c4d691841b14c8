"""The forms in which people have annotations."""
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from util import plural

from .many import read_many, read_one_hot
from .programs import (
    read_birdnet,
    read_generic_seq,
    read_hoplite,
    read_kaleidoscope,
    read_simple_seq,
)
from .raven import read_label_tracks, read_raven
from .rows import Reading, Rows
from .text import read_annotation_table


class Form(NamedTuple):
    """A form of annotations. read: (tables, Reading) -> a Rows per table."""
    title: str
    read: Callable | None


FORMS = {
    "raven": Form("Raven selection table", read_raven),
    "audacity": Form("Audacity label track", None),
    "birdnet": Form("BirdNET result table", read_birdnet),
    "kaleidoscope": Form("Kaleidoscope table", read_kaleidoscope),
    "generic-seq": Form("crowsetta generic-seq table", read_generic_seq),
    "simple-seq": Form("single-recording table", read_simple_seq),
    "hoplite": Form("perch-hoplite table", read_hoplite),
    "one-hot": Form("one-hot table", read_one_hot),
    "table": Form("event table", read_many),
}


def count_forms(forms: Sequence[str]) -> str:
    """"3 Raven selection tables, 1 ...": how many tables are in which form, for people."""
    return ", ".join(plural(n, FORMS[form].title) for form, n in Counter(forms).most_common())


def read_form(form: str, paths: Sequence[Path], reading: Reading) -> list[Rows]:
    """Read tables of one form, a key of `FORMS`. Raises DataError."""
    if form == "audacity":
        return read_label_tracks(paths, reading)
    tables = [read_annotation_table(path) for path in paths]
    return FORMS[form].read(tables, reading)
