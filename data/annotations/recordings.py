"""Find the recordings that tables of annotations belong to, by their own names or by a column."""
import os
import re
from collections import Counter
from pathlib import Path

from util import plural, summarize

from ..audio import AUDIO_SUFFIXES
from ..csv_table import as_text
from ..files import SYSTEM_FOLDERS, find_audio, suffix
from ..locate import Names, simplify, with_slashes
from ..manifest import DataError, native_path
from ..stream import safe_name

# What programs and people put between the name of a recording and the suffix of its table.
ENDING = re.compile(
    r"[ ._-]+(table[ ._-]?\d*|selections?|birdnet|results?|labels?|label[ _-]?tracks?|"
    r"annotations?|annots?|events?|audacity|raven|detections?)$")


class Recordings:
    """The recordings below a folder, to be found by the names that tables have for them."""

    def __init__(self, root: Path):
        """Raises DataError if the folder cannot be read."""
        self.root = root
        try:
            paths = find_audio(root.parent, root.name, Counter())
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}; make it readable, or give another"
                            " --audio-dir") from None
        self.paths = {path.split("/", 1)[1] for path in paths}
        self.names = Names(sorted(self.paths))
        self.changed = {}  # text of a table -> path that is not the same
        self._known = {}  # (text, folder) -> path
        self._parents = {}  # path -> {folder in a table's text: text}

    def find(self, text: str, beside: str) -> str | None:
        """The path of a recording as a table has it; None if there is none.

        beside: the table's folder, relative to the root. Raises DataError if it may be several.
        """
        key = text, beside
        if key not in self._known:
            self._known[key] = self._search(text, beside)
        return self._known[key]

    def _search(self, text, beside):
        prefix = str(self.root).rstrip("/") + "/"
        for variant in dict.fromkeys([native_path(text), with_slashes(native_path(text)),
                                      with_slashes(native_path(as_text(text)))]):
            for base in (beside, ""):
                path = os.path.normpath(os.path.join(base, variant)).removeprefix(prefix)
                if path in self.paths:
                    return path
        place = os.path.normpath(with_slashes(native_path(text)))
        path = self._unique(place, text)
        if path is not None:
            self.changed[text] = path
            self._refuse_two_folders(path, place, text)
        return path

    def _unique(self, place, text):
        matches = self.names.matches(place)
        if len(matches) > 1:
            raise DataError(f"{text} may be {summarize(matches, 3)} in {self.root}; name its folder"
                            ", or give an --audio-dir that contains just one")
        return matches[0] if matches else None

    def _refuse_two_folders(self, path, place, text):
        """site1/a.wav and site2/a.wav are not one recording, if only one of them is there."""
        folder = os.path.basename(os.path.dirname(place))
        if not folder:
            return
        others = self._parents.setdefault(path, {})
        others.setdefault(simplify(folder), text)
        if len(others) > 1:
            raise DataError(f"{' and '.join(sorted(others.values()))} would both be {path} in "
                            f"{self.root}; give an --audio-dir that has both, or fix the paths")

    def of_table(self, table: str) -> str | None:
        """The recording that a table belongs to by its name, as a.Table.1.selections.txt to a.wav.

        table: its path relative to the root. Raises DataError if it may be several.
        """
        folder, name = os.path.split(table)
        for stem in stems_of(name):
            places = [path for path in self.names.by_name[stem] + self.names.by_stem[stem]
                      if os.path.dirname(path) == folder]
            places = places or self.names.matches(os.path.join(folder, stem))
            if len(set(places)) > 1:
                raise DataError(f"{table} may belong to {summarize(sorted(set(places)), 3)} in "
                                f"{self.root}; name it after one of them, with its suffix")
            if places:
                return places[0]
        return self._by_safe_name(stems_of(name))

    def _by_safe_name(self, stems):
        """The recording that predict.py gave another name, without signs that systems forbid."""
        if not any(re.search(r"-[0-9a-f]{12}$", stem) for stem in stems):
            return None
        places = [path for path in sorted(self.paths)
                  if simplify(safe_name(os.path.basename(path))) in stems]
        return places[0] if len(places) == 1 else None

    def describe(self) -> list[str]:
        """Lines on recordings that are not where a table says."""
        if not self.changed:
            return []
        text, path = next(iter(self.changed.items()))
        return [f"{plural(len(self.changed), 'recording')} found by name, e.g. {text} as {path}"]


def same_name(text: str, path: str) -> bool:
    """Whether a table's text for a recording and a path have the same file name."""
    return simplify(os.path.basename(with_slashes(text))) == simplify(os.path.basename(path))


def stems_of(name: str) -> list[str]:
    """Names of a recording that a table may belong to, the longest first, in lower case."""
    stem = os.path.splitext(simplify(name))[0]
    stems = [stem]
    while True:
        if suffix(stem) in AUDIO_SUFFIXES:
            stem = os.path.splitext(stem)[0]
        elif ENDING.search(stem):
            stem = stem[:ENDING.search(stem).start()]
        else:
            return [stem for stem in stems if stem]
        stems.append(stem)


def find_tables(folder: Path) -> list[str]:
    """Paths of .txt, .csv and .tsv files below a folder, relative to it, sorted.

    Raises OSError if a folder cannot be read.
    """
    def fail(error):
        raise error

    tables = []
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders
                      if not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS]
        place = os.path.relpath(where, folder)
        tables += [os.path.normpath(os.path.join(place, name)) for name in names
                   if suffix(name) in (".txt", ".csv", ".tsv") and not name.startswith(".")]
    return sorted(tables)
