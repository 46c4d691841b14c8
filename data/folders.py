"""Class folders -> a manifest: plain, under train/ val/ test/, or laid out like Speech Commands."""
import os
from pathlib import Path
from sys import intern

from util import plural

from .audio import AUDIO_SUFFIXES
from .build import build_manifest
from .files import IgnoredFiles, count_suffixes, find_audio, suffix
from .manifest import SPLITS, DataError, Manifest

# Names of splits in folders and tables -> index into SPLITS.
SPLIT_WORDS = {
    "train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1,
    "test": 2, "testing": 2, "eval": 2, "evaluation": 2,
}
# Speech Commands lists the paths of two splits; all other files are for training.
SPLIT_LISTS = {"validation_list.txt": 1, "testing_list.txt": 2}
NOISE_FOLDER = "_background_noise_"  # of Speech Commands: long recordings to mix in, not a class


def load_folder(folder: Path) -> Manifest:
    """Read a folder of class folders. Raises DataError."""
    names, tops, loose, paths, ignored = _list_folder(folder)
    notes = []
    if NOISE_FOLDER in tops:
        tops.remove(NOISE_FOLDER)
        n_all = len(paths)
        paths = [path for path in paths if not path.startswith(NOISE_FOLDER + "/")]
        n_noise = plural(n_all - len(paths), "recording")
        notes.append(f"left out: {n_noise} in {NOISE_FOLDER}, which is not a class; to mix them "
                     f"in: --noise-p 0.5 --noise-dir {folder / NOISE_FOLDER}")
    used = {path.split("/", 1)[0] for path in paths}
    paths, split, class_level, loose_in_splits = _find_splits(folder, names, used, paths, notes)
    loose += loose_in_splits
    _refuse_without_clips(folder, paths, loose, ignored)

    if loose:
        notes.append(f"left out: {plural(len(loose), 'audio file')} outside any class folder, e.g. "
                     f"{loose[0]}")
    if len(used) < len(tops):
        empty = [top for top in tops if top not in used]
        notes.append(f"folders without audio: {', '.join(empty)}")
    notes += ignored.describe(paths)
    notes += [f"{name} is not read; give it as --data to use it"
              for name in names if suffix(name) == ".csv"]
    labels = [intern(path.split("/", 2)[class_level]) for path in paths]  # a string per class
    return build_manifest(folder.name, folder, paths, labels, notes, split=split)


def _list_folder(folder):
    """-> (all names, folders, audio files beside them, audio paths in them, other suffixes)."""
    ignored = IgnoredFiles()
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        is_folder = {name: os.path.isdir(folder / name) for name in names}
        tops = [name for name in names if is_folder[name]]
        paths = [path for top in tops for path in find_audio(folder, top, ignored)]
    except OSError as error:
        raise DataError(f"--data {error.filename}: {error.strerror}; make it readable or remove "
                        "it") from None
    files = [name for name in names if not is_folder[name]]
    loose = [name for name in files if suffix(name) in AUDIO_SUFFIXES]
    ignored.update(suffix(name) for name in files if suffix(name) not in AUDIO_SUFFIXES)
    return names, tops, loose, paths, ignored


def _find_splits(folder, names, used, paths, notes):
    """Find the splits that the folder gives, as train/ val/ test/ or as lists of files.

    used: the folders that contain audio.
    -> (paths in class folders, split of each or None, level of the class folders, loose paths).
    """
    split_of = {top: SPLIT_WORDS[top.lower()] for top in sorted(used) if top.lower() in SPLIT_WORDS}
    all_are_splits = len(split_of) == len(used)
    if all_are_splits and SPLITS.index("train") in split_of.values():
        notes.append(f"splits are given by the folders {', '.join(split_of)}")
        loose = sorted(path for path in paths if path.count("/") == 1)
        paths = [path for path in paths if path.count("/") > 1]
        return paths, [split_of[path.split("/", 1)[0]] for path in paths], 1, loose
    if all(name in names for name in SPLIT_LISTS):
        notes.append(f"splits are given by {' and '.join(SPLIT_LISTS)}")
        listed = {}
        for name, split in SPLIT_LISTS.items():
            listed.update(dict.fromkeys(_read_words(folder / name), split))
        return paths, [listed.get(path, 0) for path in paths], 0, []
    if split_of:
        notes.append(f"folders {', '.join(split_of)} are read as classes, like the folders beside "
                     "them")
    return paths, None, 0, []


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
        return path.read_bytes().decode("utf-8", "surrogateescape").split()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; make it readable") from None
