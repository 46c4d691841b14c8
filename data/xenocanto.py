"""A metadata table of Xeno-Canto and the recordings that it tells of -> a table of clips.

The table is what the API answers, one recording a row (https://xeno-canto.org/explore/api: id, gen, sp, rec, en, file,
file-name, group, also ...), or what `query_xc` of the R package warbleR makes of that (Recording_ID, Genus,
Specific_epithet, Recordist ...). Its `group` is birds or bats, its `file` an address on the web, and neither names a file
on this disk; so the recordings are found by their catalogue number, as the usual ways of fetching them write it.

The label is the scientific name, genus and species: all groups have one (many insects and bats have no English name), it
changes less, and `also`, the species heard in the background, is in such names. Subspecies are taken together. A table
that has a column `label` keeps that.
"""
import os
import re
from collections import Counter

from .scan import audio_below

FORMS = (("id", "gen", "sp", "rec"), ("recording_id", "genus", "specific_epithet", "recordist"))
MISREAD = {"path", "label", "id", "rec", "recording_id", "recordist", "group", "file", "file_name", "audio_file"}
NUMBER = re.compile(r"(?:^|[^A-Za-z0-9])XC[ _-]?(\d+)|^(\d+)$|-(\d+)$", re.I)  # XC76967-x.mp3, 76967.mp3, Genus-species-76967.mp3


def column_name(text):
    """A column's name in lower case, with _ for blanks, hyphens and dots."""
    return re.sub(r"[ .-]", "_", text.lower())


def join(header, numbers, rows, root):
    """The table with a path below the folder `root`, a label and a recordist in each row; None where it is not one of
    Xeno-Canto's.

    header: column names; numbers, rows: number and fields of each row. -> (header, numbers, rows, lines for the person).
    A recording that is not in `root` has no row, one that is there in several files or cuts has a row for each. Raises
    OSError for a folder that cannot be read.
    """
    names = [column_name(name) for name in header]
    form = next((form for form in FORMS if set(form[:3]) <= set(names)), None)
    if form is None:
        return None
    at = {name: i for i, name in reversed(list(enumerate(names)))}
    number, genus, species = (at[name] for name in form[:3])
    files = _by_number(root)
    kept = [i for i, name in enumerate(names) if name not in MISREAD]
    joined, joined_numbers, lost = [], [], []
    for row_number, row in zip(numbers, rows):
        paths = files.get(row[number].strip().upper().removeprefix("XC").lstrip("0"), [])
        label = row[at["label"]] if "label" in at else f"{row[genus].strip()} {row[species].strip()}".strip()
        recordist = row[at[form[3]]] if form[3] in at else ""
        joined += [[path, label, recordist, *(row[i] for i in kept)] for path in paths]
        joined_numbers += [row_number] * len(paths)
        lost += [row[number]] * (not paths)
    lines = [f"Xeno-Canto metadata: {'label' if 'label' in at else header[genus] + ' ' + header[species]} is the label; the "
             "recordings are found by their numbers"]
    if lost:
        lines.append(f"left out: {len(lost)} of {len(rows)} recordings that are not in {root}, e.g. {lost[0]}")
    return ["path", "label", "recordist", *(header[i] for i in kept)], joined_numbers, joined, lines


def _by_number(root):
    """Catalogue number -> paths below `root` of the recordings that have it in their name."""
    root, files = os.path.abspath(root), {}
    above, top = os.path.split(root)
    for path in sorted(audio_below(above, top, Counter()), key=os.fsencode):
        found = NUMBER.search(os.path.splitext(os.path.basename(path))[0])
        if found:
            files.setdefault((found[1] or found[2] or found[3]).lstrip("0"), []).append(path.split("/", 1)[1])
    return files
