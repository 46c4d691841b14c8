"""Class folders -> a manifest: plain, under train/ val/ test/, or laid out like Speech Commands."""
import os
from collections import Counter
from pathlib import Path
from sys import intern

from util import plural, read_regular, summarize

from .audio import AUDIO_SUFFIXES
from .build import build_manifest
from .files import SYSTEM_FOLDERS, IgnoredFiles, count_suffixes, find_audio, suffix
from .folder_layout import find_layout, refuse_selection_tables
from .folder_words import NOISE_FOLDERS, is_unlabelled, splits_of
from .manifest import DataError, Manifest

# Speech Commands lists the paths of two splits; all other files are for training.
SPLIT_LISTS = {"validation_list.txt": 1, "testing_list.txt": 2}


def load_folder(folder: Path) -> Manifest:
    """Read a folder of class folders. Raises DataError if it is not clear which those are."""
    names, tops, loose, paths, ignored = _list_folder(folder)
    if ignored[".txt"]:
        refuse_selection_tables(folder, tops)
    notes = []
    paths = _leave_out_noise(folder, paths, notes)
    paths = _leave_out_unlabelled(paths, notes)
    used = {path.split("/", 1)[0] for path in paths}
    if all(name in names for name in SPLIT_LISTS):
        layout = find_layout(folder, paths, has_splits=True)
        layout.split, layout.sources["split"] = _listed_splits(folder, paths)
    else:
        layout = find_layout(folder, paths)
    notes += layout.notes
    loose += layout.loose
    _refuse_without_clips(folder, layout.paths, loose, ignored)

    if loose:
        notes.append(f"left out: {plural(len(loose), 'audio file')} outside any class folder, e.g. "
                     f"{loose[0]}")
    if len(used) < len(tops):
        empty = [top for top in tops if top not in used and top not in NOISE_FOLDERS
                 and not is_unlabelled(top)]
        if empty:
            notes.append(f"folders without audio: {summarize(empty, 20)}")
    notes += ignored.describe(paths)
    notes += [f"{name} is not read; give it as --data to use it"
              for name in names if suffix(name) == ".csv"]
    # interned: one string per class
    labels = [intern(path.split("/")[layout.class_level]) for path in layout.paths]
    manifest = build_manifest(
        folder.name, folder, layout.paths, labels, notes, split=layout.split, fold=layout.fold,
        group=layout.group, group_source=layout.sources.get("group"))
    manifest.sources = layout.sources
    return manifest


def _leave_out_noise(folder, paths, notes):
    """Leave out _background_noise_, directly in the folder or in a split's folder."""
    places = Counter(map(_noise_folder, paths))
    del places[None]
    if not places:
        return paths
    others = [path for path in paths if _noise_folder(path) is None]
    for place, n in sorted(places.items()):
        notes.append(f"left out: {plural(n, 'recording')} in {place}, which is not a class; to mix "
                     f"them in: --noise-p 0.5 --noise-dir {folder / place}")
    return others


def _noise_folder(path):
    """The folder of noise that contains a recording, or None."""
    folders = path.split("/", 2)[:-1]
    if folders[0] in NOISE_FOLDERS:
        return folders[0]
    if len(folders) > 1 and folders[1] in NOISE_FOLDERS and splits_of(folders[:1]):
        return "/".join(folders)
    return None


def _leave_out_unlabelled(paths, notes):
    """Leave out a folder such as unlabeled/ beside folders of splits."""
    tops = {path.split("/", 1)[0] for path in paths}
    without = {top for top in tops if is_unlabelled(top)}
    if not without or not splits_of(tops):
        return paths
    labelled = [path for path in paths if path.split("/", 1)[0] not in without]
    notes.append(f"left out: {plural(len(paths) - len(labelled), 'recording')} in "
                 f"{', '.join(sorted(without))}, which have no labels")
    return labelled


def _listed_splits(folder, paths):
    """-> (split of each path by the lists of Speech Commands, where it comes from)."""
    listed = {}
    for name, split in SPLIT_LISTS.items():
        listed.update(dict.fromkeys(_read_words(folder / name), split))
    return [listed.get(path, 0) for path in paths], f"lists {' and '.join(SPLIT_LISTS)}"


def _list_folder(folder):
    """-> (all names, folders, audio files beside them, audio paths in them, other suffixes)."""
    ignored = IgnoredFiles()
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        is_folder = {name: os.path.isdir(folder / name) for name in names}
        tops = [name for name in names if is_folder[name] and name.lower() not in SYSTEM_FOLDERS]
        paths = [path for top in tops for path in find_audio(folder, top, ignored)]
    except OSError as error:
        raise DataError(f"--data {error.filename}: {error.strerror}; make it readable or remove "
                        "it") from None
    files = [name for name in names if not is_folder[name]]
    loose = [name for name in files if suffix(name) in AUDIO_SUFFIXES]
    ignored.update(suffix(name) for name in files if suffix(name) not in AUDIO_SUFFIXES)
    return names, tops, loose, paths, ignored


def _refuse_without_clips(folder, paths, loose, ignored):
    if paths:
        return
    if loose:
        raise DataError(
            f"--data {folder}: audio lies outside any class folder ({loose[0]}); put it in one "
            f"folder per class, such as {folder}/dog/a.wav, or give a CSV with the columns "
            "path,label")
    raise DataError(
        f"--data {folder} contains no audio (other files: {count_suffixes(ignored) or 'none'}); "
        "give a folder with one folder per class and files in "
        f"{' '.join(sorted(AUDIO_SUFFIXES))}")


def _read_words(path):
    try:
        return read_regular(path).decode("utf-8", "surrogateescape").split()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; make it readable") from None
