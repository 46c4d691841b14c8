"""Class folders -> a manifest: plain, under train/ val/ test/, or laid out like Speech Commands."""
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from sys import intern

from util import plural, read_regular, summarize

from .audio import AUDIO_SUFFIXES
from .build import build_manifest
from .files import SYSTEM_FOLDERS, IgnoredFiles, count_suffixes, find_audio, suffix
from .folder_layout import find_layout
from .folder_words import BIRDNET_NAME, is_unlabelled, negative_names, splits_of
from .manifest import DataError, Manifest
from .negatives import add_negatives, negative_recordings

# Speech Commands lists the paths of two splits; all other files are for training.
SPLIT_LISTS = {"validation_list.txt": 1, "testing_list.txt": 2}


def load_folder(folder: Path, real_classes: Collection[str] = ()) -> Manifest:
    """Read a folder of class folders. Raises DataError if it is not clear which those are.

    real_classes: folders that are classes although they are called noise or the like.
    """
    names, tops, loose, paths, ignored = _list_folder(folder)
    notes = []
    paths, negatives = _take_out_negatives(folder, paths, real_classes, notes)
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
        empty = [top for top in tops if top not in used and not is_unlabelled(top)
                 and not any(path.startswith(top + "/") for path in negatives)]
        if empty:
            notes.append(f"folders without audio: {summarize(empty, 20)}")
    notes += ignored.describe(paths)
    notes += [f"{name} is not read; give it as --data to use it"
              for name in names if suffix(name) == ".csv"]
    # interned: one string per class
    labels = [intern(path.split("/")[layout.class_level]) for path in layout.paths]
    manifest = build_manifest(
        folder.name, folder, layout.paths, labels, notes, split=layout.split, fold=layout.fold,
        group=layout.group, group_source=layout.sources.get("group"),
        label_names=_several_classes(labels), real_classes=real_classes)
    manifest.sources = layout.sources
    if negatives:
        split = [_split_of_negative(path, layout) for path in negatives]
        manifest = add_negatives(manifest, negative_recordings(folder, list(negatives), split))
    return manifest


def _several_classes(labels):
    """Labels of folders that name several classes, as BirdNET-Analyzer has them; else None.

    "Genus species_Common Name, Genus other_Other Name": each part is such a name.
    """
    names = {label: tuple(part.removeprefix("-") for part in label.split(", "))
             for label in set(labels) if ", " in label}
    several = {label: label.split(", ") for label, parts in names.items()
               if all(BIRDNET_NAME.fullmatch(part) for part in parts)}
    if not several:
        return None
    return [(tuple(several.get(label, [label])), ()) for label in labels]


def _take_out_negatives(folder, paths, real_classes, notes):
    """-> (paths of classes, {path of a negative: its folder}).

    Folders of negatives are directly in the data, or in the folder of a split.
    """
    tops = {path.split("/", 1)[0] for path in paths}
    splits = set(splits_of(tops))
    seconds = {path.split("/")[1] for path in paths
               if path.count("/") > 1 and path.split("/", 1)[0] in splits}
    empty_tops = negative_names(tops, real_classes)
    empty_seconds = negative_names(seconds, real_classes)
    negatives = {}
    for path in paths:
        top, *rest = path.split("/")
        if top in empty_tops:
            negatives[path] = top
        elif top in splits and len(rest) > 1 and rest[0] in empty_seconds:
            negatives[path] = f"{top}/{rest[0]}"
    for place, n in sorted(Counter(negatives.values()).items()):
        notes.append(f"negatives: {plural(n, 'recording')} in {place}, which contain none of the "
                     f"classes; if it is a class: --real-class {place.split('/')[-1]}")
    return [path for path in paths if path not in negatives], negatives


def _split_of_negative(path, layout):
    """The split of a recording in train/noise, say; -1 if its folder gives none."""
    if layout.split is None:
        return -1
    top = path.split("/", 1)[0]
    return splits_of([top, "train"]).get(top, -1)


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
