"""A Xeno-Canto metadata table and its recordings -> a table of clips.

The table is an answer of the API with one recording per row (https://xeno-canto.org/explore/api:
id, gen, sp, rec, en, file, file-name, group, also ...), or what `query_xc` of the R package warbleR
makes of it (Recording_ID, Genus, Specific_epithet, Recordist ...). Its `group` is birds or bats,
its `file` is a web address, and neither names a file on this disk. So the recordings are found by
their catalogue number, which the usual download tools write into the file name.

The label is the scientific name, genus and species: all groups have one (many insects and bats have
no English name), it rarely changes, and `also`, the species in the background, uses such names.
Subspecies are merged. If the table has a column `label`, that one is used instead.
"""
import os
import re
from collections import Counter

from util import plural

from .csv_table import Table
from .files import find_audio

# Columns of the number, genus, species and recordist: of the API, of warbleR.
FORMATS = (("id", "gen", "sp", "rec"),
           ("recording_id", "genus", "specific_epithet", "recordist"))
# Columns that are replaced, or whose names would be misread.
DROPPED_COLUMNS = {"path", "label", "id", "rec", "recording_id", "recordist", "group", "file",
                   "file_name", "audio_file"}
# XC76967-x.mp3, 76967.mp3, Genus-species-76967.mp3
NUMBER_PATTERN = re.compile(r"(?:^|[^A-Za-z0-9])XC[ _-]?(\d+)|^(\d+)$|-(\d+)$", re.IGNORECASE)


def join_recordings(table: Table, root: str) -> tuple[Table, list[str]] | None:
    """Add each recording's path below the folder `root`, its label and its recordist.

    A recording that is not in `root` has no row in the result; one with several files has a row for
    each. -> (the joined table, notes), or None if the table is not of Xeno-Canto. Raises OSError
    if a folder cannot be read.
    """
    names = table.names
    columns = next((form for form in FORMATS if set(form[:3]) <= set(names)), None)
    if columns is None:
        return None
    number, genus, species = (names.index(name) for name in columns[:3])
    recordist = names.index(columns[3]) if columns[3] in names else None
    label = names.index("label") if "label" in names else None
    kept_columns = [i for i, name in enumerate(names) if name not in DROPPED_COLUMNS]

    paths_of = _paths_by_number(root)
    rows = []
    row_numbers = []
    missing = []
    for row_number, row in zip(table.numbers, table.rows):
        paths = paths_of.get(_catalogue_number(row[number]), [])
        if not paths:
            missing.append(row[number])
        scientific_name = f"{row[genus].strip()} {row[species].strip()}".strip()
        row_label = scientific_name if label is None else row[label]
        row_recordist = "" if recordist is None else row[recordist]
        for path in paths:
            rows.append([path, row_label, row_recordist, *(row[i] for i in kept_columns)])
            row_numbers.append(row_number)

    label_source = f"{table.header[genus]} {table.header[species]}" if label is None else "label"
    notes = [f"Xeno-Canto metadata: {label_source} is the label; recordings are found by their "
             "catalogue numbers"]
    if missing:
        notes.append(f"left out: {len(missing)} of {plural(len(table.rows), 'recording')}, not in "
                     f"{root}, e.g. {missing[0]}")
    header = ["path", "label", "recordist", *(table.header[i] for i in kept_columns)]
    return Table(table.path, header, row_numbers, rows), notes


def _catalogue_number(text):
    return text.strip().upper().removeprefix("XC").lstrip("0")


def _paths_by_number(root):
    """{catalogue number: paths below `root` that have it in their file name}."""
    root = os.path.abspath(root)
    above, top = os.path.split(root)
    paths_of = {}
    for path in sorted(find_audio(above, top, Counter()), key=os.fsencode):
        stem = os.path.splitext(os.path.basename(path))[0]
        match = NUMBER_PATTERN.search(stem)
        if match:
            number = match[1] or match[2] or match[3]
            paths_of.setdefault(number.lstrip("0"), []).append(path.split("/", 1)[1])
    return paths_of
