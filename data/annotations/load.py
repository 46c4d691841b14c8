"""Recordings with annotated events: the front door to all forms that people have them in.

A recording is long and holds events with a start and an end. A form is known by the header of its
tables (text.form_of) and read by forms. What is not clear is an error.
"""
import contextlib
import gc
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from util import plural, summarize

from ..audio import AUDIO_SUFFIXES
from ..files import suffix
from ..locate import simplify
from ..manifest import DataError
from .forms import FORMS, count_forms, read_form
from .recordings import Recordings, find_tables, same_name, stems_of
from .rows import Reading
from .text import form_of, is_table

MAX_PROBES = 200  # files below a folder that are looked at to know whether they are annotations
# Names of tables that are annotations, whatever is in them.
NAMES = (".selections.txt", ".selection.table.txt", ".birdnet.results.csv")


class Event(NamedTuple):
    """Something that was heard in a recording, or a stretch that was heard and found empty."""
    path: str  # of the recording, relative to the root, with /
    start: float  # seconds
    end: float  # seconds; the start for a point label, nan for the end of the recording
    labels: tuple[str, ...]  # one name or several; () if the row says that nothing is there
    low: float  # Hz, nan if not given
    high: float  # Hz, nan if not given


@dataclass
class Annotations:
    """The events of recordings, and which recordings have been annotated at all."""
    root: Path  # absolute
    name: str
    events: list[Event]  # sorted by path, start and end
    recordings: list[str]  # all that are annotated, also those with an empty table
    unlisted: list[str]  # in the folder, but in no table; never taken to be empty
    notes: list[str]  # lines worth printing
    sources: dict[str, str] = field(default_factory=dict)  # {"label": "column Species"} and so on


def explain_annotated() -> str:
    """The line that asks a person whether what is not annotated is empty or unknown."""
    return ("events are annotated in these recordings; say whether all of them: --annotated all if "
            "every event of the classes is, so that the rest of a recording contains none of them "
            "and teaches what nothing sounds like; --annotated parts if others may be in the rest, "
            "so that it is not used")


def is_annotated(data: str | os.PathLike, asked: bool = False) -> bool:
    """Whether a folder or a table holds annotations of events, not one clip per row or folder.

    asked: a person has said so (--annotated); then any table with a row per event is, too. Reads
    only the beginning of files. Raises DataError if one cannot be read.
    """
    data = Path(os.path.abspath(data))
    if os.path.isfile(data):
        form = form_of(data) if is_table(data.name) else None
        return form in FORMS and (asked or form != "table")
    if not os.path.isdir(data):
        return False
    forms = _probe_folder(data)
    if asked:
        return bool(forms & set(FORMS))
    return bool(forms - {"table", "empty", None})


def _probe_folder(folder):
    """The forms of some tables below a folder."""
    tables = sorted(Path(where, name) for where, name in _files_below(folder) if is_table(name))
    if any(path.name.lower().endswith(NAMES) for path in tables):
        return {"raven"}
    forms = {path: _form_or_none(path) for path in tables[::len(tables) // MAX_PROBES + 1]}
    unnamed = [path for path, form in forms.items() if form in ("audacity", "simple-seq")]
    if unnamed:  # such tables may be about anything, unless recordings have their names
        stems = {simplify(text) for _, name in _files_below(folder)
                 if suffix(name) in AUDIO_SUFFIXES for text in (name, os.path.splitext(name)[0])}
        forms |= {path: "table" for path in unnamed
                  if stems and stems.isdisjoint(stems_of(path.name))}
    return set(forms.values())


def _files_below(folder):
    """(folder, name) of every visible file below a folder, sorted by folder."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from ((where, name) for name in names if not name.startswith("."))


def _form_or_none(path):
    try:
        return form_of(path)
    except DataError:  # no text
        return None


def load_annotations(data: str | os.PathLike, audio_dir: str | os.PathLike | None = None,
                     label_column: str | None = None) -> Annotations:
    """Read annotated recordings. No audio file is opened.

    data: a folder with recordings and their tables, or one table of one or many recordings.
    audio_dir: the folder that contains the recordings, at any depth; by default `data` or the
        table's folder. label_column: the column of labels, if it is not clear or not wanted.

    Raises DataError, in one line, for what cannot be read or may be read in two ways.
    """
    data = Path(os.path.abspath(data))
    is_folder = os.path.isdir(data)
    reading = Reading(label_column, [], {})
    if is_folder:
        forms = _forms_in(data, reading.notes)
    elif not os.path.isfile(data) or not is_table(data.name):
        raise DataError(f"--data {data} is no folder and no .csv, .tsv or .txt table; give the "
                        "recordings' folder or their table")
    else:
        form = form_of(data)
        if form not in FORMS:
            raise DataError(f"{data} is empty or in no form of annotations that is known; give a "
                            "table with the columns file,start,end,label")
        forms = {form: [data]}
    if label_column is not None and set(forms) == {"audacity"}:
        raise DataError(f"--label-column {label_column}: the label tracks in {data} have no names "
                        "of columns; leave it out")
    folder = data if is_folder else data.parent
    recordings = Recordings(_audio_root(folder, audio_dir, is_folder))
    reading.notes.append("annotations: " + count_forms(
        [form for form, paths in forms.items() for _ in paths]))

    result = Annotations(recordings.root, data.name if is_folder else data.stem, [], [], [],
                         reading.notes, reading.sources)
    with _without_collector():
        _collect(result, forms, reading, recordings, folder)
    result.notes += recordings.describe()
    if "label" in result.sources:
        result.notes.insert(0, f"labels are from {result.sources['label']}")
    result.unlisted = sorted(recordings.paths - set(result.recordings))
    if result.unlisted:
        result.notes.append(f"{plural(len(result.unlisted), 'recording')} without annotations, not "
                            f"used: {summarize(result.unlisted, 3)}")
    return result


@contextlib.contextmanager
def _without_collector():
    """Python's garbage collector off: it would search all rows many times and find nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _audio_root(folder, audio_dir, is_folder):
    """The folder to search for recordings."""
    if audio_dir is not None:
        if not os.path.isdir(audio_dir):
            raise DataError(f"--audio-dir {audio_dir}: no such folder; give the one that contains "
                            "the recordings")
        return Path(os.path.abspath(audio_dir))
    beside = folder.parent / "audio"
    if not is_folder and beside.is_dir() and not Recordings(folder).paths:
        return beside
    return folder


def _forms_in(folder, notes):
    """{form: paths of the tables} below a folder. Raises DataError if there are none."""
    forms = defaultdict(list)
    try:
        for name in find_tables(folder):
            forms[_form_or_none(folder / name)].append(folder / name)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; make it readable") from None
    others = forms.pop(None, [])
    empty = forms.pop("empty", [])
    tables = forms.pop("table", [])
    if empty and "audacity" in forms:  # Audacity saves a label track without labels so
        forms["audacity"] = sorted(forms["audacity"] + empty)
    else:
        others += empty
    if not forms and len(tables) > 1:
        raise DataError(f"{folder} has several tables, {summarize(map(str, tables), 3)}; give one "
                        "of them as --data, and the folder as --audio-dir")
    if not forms and tables:
        return {"table": tables}
    if not forms:
        raise DataError(f"{folder} has no table of annotations; put tables such as "
                        "a.Table.1.selections.txt beside the recordings, or give a table as --data")
    others += tables
    if others:
        names = summarize((os.path.relpath(path, folder) for path in sorted(others)), 3)
        notes.append(f"not read, since empty or in another form: {names}")
    return dict(forms)


def _collect(result, forms, reading, recordings, folder):
    """Read all tables and fill in the events and the recordings of the result."""
    events, n_doubled = {}, 0
    table_of, missing = {}, Counter()
    annotated = set()
    for form, paths in forms.items():
        for rows in read_form(form, paths, reading):
            found = _find_recordings(rows, recordings, folder, missing)
            for path in {*found, *_find_listed(rows, recordings, folder, missing)} - {None}:
                annotated.add(path)
                kind = form, rows.is_birdnet
                other = table_of.setdefault(path, (kind, rows.table.path))
                is_copy = (rows.by_name and other[1] != rows.table.path
                           and other[1].name == rows.table.path.name)
                if other[0] != kind or is_copy:
                    raise DataError(f"{path} is annotated in {other[1]} and in {rows.table.path}; "
                                    "move one of them away")
            if not rows.table.rows:
                continue
            low, high = (band or [math.nan] * len(found) for band in (rows.low, rows.high))
            for row in zip(found, rows.start, rows.end, rows.names, low, high):
                if row[0] is None:
                    continue
                key = row
                if row[2] != row[2] or row[4] != row[4] or row[5] != row[5]:  # nan
                    key = tuple(-1.0 if value != value else value for value in row)
                n_doubled += key in events
                events[key] = row
    _refuse_missing(missing, recordings, len(annotated), result.notes)
    if n_doubled:
        result.notes.append(f"left out: {plural(n_doubled, 'repeated row')}")
    result.events = [Event(*events[key]) for key in sorted(events)]
    result.recordings = sorted(annotated)


def _find_recordings(rows, recordings, folder, missing):
    """The path of each row's recording, None for a missing one; of an empty table its own."""
    table = rows.table
    beside = os.path.relpath(table.path.parent, recordings.root)
    own = _own_recording(rows, recordings, folder)
    if rows.recording is None or not table.rows:
        if own is None and (rows.recording is None or table.rows):
            missing[f"{table.path.name}, a table named after no recording"] += 1
        return [own] * max(1, len(table.rows))
    paths = {text: own if own is not None and same_name(text, own)
             else recordings.find(text, beside) for text in dict.fromkeys(rows.recording)}
    if len(paths) == 1 and list(paths.values()) == [None] and own is not None:
        paths = dict.fromkeys(paths, own)  # the recording was renamed, its table too
        recordings.changed[next(iter(paths))] = own
    for text, path in paths.items():
        if own is not None and path != own:
            raise DataError(f"{table.path} is named after {own}, but its rows name {text}; rename "
                            "the table or fix the rows")
        if path is None:
            missing[f"{text} of {table.path.name}"] += 1
    return [paths[text] for text in rows.recording]


def _own_recording(rows, recordings, folder):
    """The recording that a table is named after; None if its rows name others."""
    if not rows.by_name or (rows.recording is not None and len(set(rows.recording)) > 1):
        return None
    relative = os.path.relpath(rows.table.path, recordings.root)
    if relative.startswith(".."):
        relative = os.path.relpath(rows.table.path, folder)
    try:
        return recordings.of_table(relative)
    except DataError:
        if rows.recording:
            return None  # a column says which it is
        raise


def _find_listed(rows, recordings, folder, missing):
    beside = os.path.relpath(rows.table.path.parent, recordings.root)
    paths = {text: recordings.find(text, beside) for text in rows.listed}
    missing.update(f"{text} of {rows.table.path.name}" for text, path in paths.items()
                   if path is None)
    return paths.values()


def _refuse_missing(missing, recordings, n_found, notes):
    """Raise DataError if half of the recordings are missing, else note the missing ones."""
    if not missing and n_found:
        return
    names = summarize(missing, 3)
    if len(missing) >= n_found:
        raise DataError(f"no recording in {recordings.root} for {names} ({n_found} others are "
                        "there); give --audio-dir, a folder that contains the recordings at any "
                        "depth, or fix the names or the column of the recordings")
    notes.append(f"missing: {plural(len(missing), 'recording')}, {names}")
