"""Choose the columns of a table: which one has the path, the label, the group, the times ..."""
import re
from collections import Counter
from dataclasses import dataclass, field, replace

from util import summarize

from .clip_times import TimeColumn, time_columns
from .csv_table import Table
from .files import suffix
from .manifest import DataError
from .names import MISSING

# Names of columns for each role, the likeliest first, in the form of `column_name`.
COLUMNS = {
    "path": "path filepath file_path filename file_name file slice_file_name audio audio_path "
            "audio_file audio_filename audio_file_name fname wav wav_path wav_file recording_path "
            "clip_path sound_file ytid itemid",
    "label": "label labels category primary_label class_name class species common_name "
             "scientific_name ebird_code species_ebird_code target classid class_id label_id "
             "positive_labels event_label scene_label sound_class sound_event annotation tag tags "
             "taxon emotion",
    "secondary label": "secondary_labels secondary_label also unknown ignore",
    "split": "split subset set partition",
    "fold": "fold folds",
    "group": "group group_id speaker_id speaker client_id client patient_id patient subject_id "
             "subject participant_id participant person_id person individual_id individual "
             "animal_id bird_id singer_id user_id recording_id recording src_file source_file fsid "
             "original original_file session_id session identifier recordist site_id site "
             "location_id location station_id station recorder_id recorder device_id device "
             "machine_id deployment_id deployment author source",
    "folder": "folder folder_name directory dir subfolder subdir",
}
KNOWN_NAMES = {name.replace("_", ""): name for names in COLUMNS.values() for name in names.split()}
# Labels that need no second thought, even if other columns could be labels, too.
CERTAIN_LABELS = {"label", "labels", "primary_label", "positive_labels", "event_label",
                  "scene_label"}
# Labels only if there is nothing better.
LAST_LABELS = {"annotation", "tag", "tags", "taxon", "emotion"}
RANKS = {"kingdom", "phylum", "order", "family", "genus"}  # beside them, class is one as well
GENUS = ("genus", "gen")
EPITHET = ("species", "specific_epithet", "epithet", "species_epithet", "sp")
# In these columns a value that fills half of the rows is no recording, but an archive, say.
UNCERTAIN_GROUPS = {"recordist", "author", "source", "original", "recording", "session", "location",
                    "identifier"}
MIN_SOURCES = 4  # with fewer values a column "source" says which archive, not which recording
# In UrbanSound8K, times are positions in the source recording that the files were cut from.
URBANSOUND_COLUMNS = {"slice_file_name", "fsid"}


@dataclass
class Columns:
    """The columns that a table's clips are read from."""
    index: dict[str, int] = field(default_factory=dict)  # of the column of each role
    times: dict[str, TimeColumn] = field(default_factory=dict)  # start, end, duration
    used: list[str] = field(default_factory=list)  # "species as label", for people
    notes: list[str] = field(default_factory=list)


def choose_columns(table: Table) -> tuple[Table, Columns]:
    """Choose the column of each role. The table comes back with a label of genus and species.

    Raises DataError if there is no path or label, or if it is not clear which column it is.
    """
    table, made_label = _join_genus_and_species(table)
    names = _known_names(table)
    is_used = [any(row[i].strip() for row in table.rows) for i in range(len(names))]
    columns = Columns()
    for role, known_names in COLUMNS.items():
        candidates = [names.index(name) for name in known_names.split()
                      if name in names and is_used[names.index(name)]]
        if role == "path":
            candidates = _put_folders_last(table, candidates, columns)
        if role == "label":
            candidates = _sort_labels(table, candidates, made_label)
        if role == "group":
            candidates = _usable_groups(table, candidates, columns.notes)
        if role == "folder" and "folder" in columns.index:
            continue
        if candidates:
            i = candidates[0]
            columns.index[role] = i
            if names.count(names[i]) > 1:
                raise DataError(f"{table.path}: the column {table.header[i]} occurs twice; remove "
                                "one")
        elif role in ("path", "label"):
            raise DataError(f"{table.path} has no {role} column with anything in it among "
                            f"{summarize(table.header, 20)}; name one of them {role}")
    if not URBANSOUND_COLUMNS.issubset(names):
        columns.times = time_columns(table.header, is_used, table.path)
    indices = columns.index | {role: column.index for role, column in columns.times.items()}
    for role, i in indices.items():
        name = table.header[i]
        columns.used.append(name if names[i] == role else f"{name} as {role}")
    return table, columns


def _known_names(table):
    """Names of the columns as they are in COLUMNS, which may differ in an underscore."""
    return [KNOWN_NAMES.get(name.replace("_", ""), name) for name in table.names]


# ---- paths

def _put_folders_last(table, candidates, columns):
    """Sort the candidates for the path; one that only has folders is the folder of the others."""
    def names_files(i):
        values = [row[i] for row in table.rows[:200]]
        return sum(bool(re.fullmatch(r"\.\w{2,5}", suffix(value))) for value in values)

    with_files = [i for i in candidates if names_files(i)]
    if candidates and with_files and candidates[0] not in with_files:
        columns.index["folder"] = candidates[0]
        candidates = with_files
    return candidates


# ---- labels

def _join_genus_and_species(table):
    """Add a column with the scientific name if genus and species are apart.

    -> (the table, index of the new column or None).
    """
    names = _known_names(table)
    genus = next((names.index(name) for name in GENUS if name in names), None)
    epithet = next((names.index(name) for name in EPITHET if name in names), None)
    if genus is None or epithet is None or CERTAIN_LABELS & set(names):
        return table, None
    rows = []
    for row in table.rows:
        first, second = row[genus].strip(), row[epithet].strip()
        has_genus = not first or second.lower().startswith(first.lower() + " ")
        rows.append([*row, second if has_genus else f"{first} {second}".strip()])
    header = [*table.header, f"{table.header[genus]} + {table.header[epithet]}"]
    return replace(table, header=header, rows=rows), len(names)


def _sort_labels(table, candidates, made_label):
    """Sort the candidates for the label. Raises DataError if two differ and none is certain."""
    names = _known_names(table)
    if len(RANKS & set(names)) > 1:
        is_rank = {i for i in candidates if names[i] == "class"}
        candidates = [i for i in candidates if i not in is_rank]
    if made_label is not None:
        candidates = [made_label] + [i for i in candidates if names[i] not in EPITHET]
    elif not candidates and "genus" in names:
        candidates = [names.index("genus")]
    candidates = sorted(candidates, key=lambda i: _has_few_names(table, i))  # stable
    if candidates:
        _refuse_other_label(table, candidates)
    return candidates


def _has_few_names(table, column):
    """Whether a column has fewer than two values that are not just numbers."""
    values = {row[column] for row in table.rows}
    return sum(not re.fullmatch(r"[\s\d.-]*", value) for value in values) < 2


def _refuse_other_label(table, candidates):
    """Raise DataError if another column divides the clips in another way than the chosen one."""
    names = _known_names(table)
    chosen, *others = candidates
    if names[chosen] in CERTAIN_LABELS:
        return
    for other in others:
        values = {row[other].strip() for row in table.rows} - {""}
        is_code = _has_few_names(table, other) and names[other] not in CERTAIN_LABELS
        is_minor = is_code or names[other] in LAST_LABELS
        if len(values) > 1 and not is_minor and not _are_one_to_one(table, chosen, other):
            raise DataError(f"{table.path}: both {table.header[chosen]} and {table.header[other]} "
                            "may be the label; call the right one label")


def _are_one_to_one(table, first, second):
    """Whether two columns divide the rows alike; empty fields do not count."""
    pairs = {(row[first].strip(), row[second].strip()) for row in table.rows}
    pairs = [pair for pair in pairs if all(pair)]
    return len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


# ---- groups

def _usable_groups(table, candidates, notes):
    """The group columns that divide the clips enough to make three splits.

    A column called `group` is always used.
    """
    usable = []
    names = _known_names(table)
    n = len(table.rows)
    for i in candidates:
        name, header = names[i], table.header[i]
        values = Counter(row[i].strip() for row in table.rows)
        for empty in {"", *MISSING} & set(values):  # rows without a value are groups of their own
            if name not in UNCERTAIN_GROUPS:
                del values[empty]
        if not values:
            continue
        value, most = values.most_common(1)[0]
        problem = None
        fills_half = name in UNCERTAIN_GROUPS and most > max(2, n / 2)
        if fills_half or (len(values) == 1 and n > 2):
            problem = f"{most} of {n} rows have {value or 'none'}"
        elif name == "source" and n > 2 * MIN_SOURCES and (
                len(values) < MIN_SOURCES or len(values) < 0.1 * n):
            problem = f"it has only {len(values)} values in {n} rows"
        elif name not in UNCERTAIN_GROUPS and len(values) < 3 and most > 2:
            problem = f"it has only {len(values)} values, too few for three splits"
        if problem and name != "group":
            notes.append(f"column {header} is not used as group: {problem}; call it group to use "
                         "it")
        else:
            usable.append(i)
    if len(usable) > 1:
        others = [table.header[i] for i in usable[1:]]
        notes.append(f"group: {table.header[usable[0]]}, not {summarize(others)}; call another "
                     "column group to use it")
    return usable


def group_values(values: list[str]) -> list[str]:
    """Values of a group column, "" where nothing is known."""
    return ["" if value in MISSING else value for value in values]
