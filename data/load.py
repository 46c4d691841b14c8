"""Labelled recordings -> a manifest, whatever form they come in."""
import os
from collections.abc import Collection
from pathlib import Path

from util import plural

from .annotations import explain_annotated, is_annotated, load_annotations, manifest_of_events
from .build import check_classes
from .csv_table import TABLE_SUFFIXES
from .files import suffix
from .folders import load_folder
from .manifest import DataError, Manifest
from .negatives import add_negatives, load_negatives
from .tables import load_table

# Tables of known data sets, relative to the folder: ESC-50, UrbanSound8K, BirdCLEF.
TABLES = ("meta/esc50.csv", "metadata/UrbanSound8K.csv", "train_metadata.csv")


def load_manifest(data: str | os.PathLike, audio_dir: str | os.PathLike | None = None,
                  known_classes: Collection[str] = (), real_classes: Collection[str] = (),
                  negatives: str | os.PathLike | None = None, annotated: str | None = None,
                  label_column: str | None = None) -> Manifest:
    """Read labelled recordings from a folder or a CSV. No audio file is opened.

    data: a folder with one folder per class, the same under train/ val/ test/, a folder laid out
        like ESC-50, UrbanSound8K, Speech Commands or BirdCLEF, or a CSV, also of Xeno-Canto.
    audio_dir: the folder that contains all files of a CSV. By default this is the CSV's own
        folder, or an audio/ folder beside the CSV.
    known_classes: classes that secondary labels may name even if no clip has them as a label.
    real_classes: folders or labels that are classes although they are called noise or the like.
    negatives: a folder or a CSV of further recordings that contain none of the classes.
    annotated: "all" or "parts" if the data are recordings with annotated events; the manifest then
        has a row per event, see data/annotations/windows.py.
    label_column: the column of the annotations that has the labels.

    A label cell of a CSV may name several classes, as a;b or a|b. A column secondary_labels (or
    also, unknown, ignore) names classes that may or may not be in the clip.

    A clip without a label is a negative: it contains none of the classes.

    Raises DataError for anything that leaves a clip without a file, and for less than two classes,
    or one without a negative.
    """
    data = Path(os.path.abspath(data))
    if is_annotated(data, asked=annotated is not None):
        if annotated is None:
            raise DataError(f"--data {data}: {explain_annotated()}")
        annotations = load_annotations(data, audio_dir, label_column)
        manifest = manifest_of_events(annotations, annotated, known_classes, real_classes)
    elif annotated is not None:
        raise DataError(f"--annotated {annotated}: {data} has no annotations of events; leave the "
                        "flag out, or give a folder with their tables or a table with start and "
                        "end")
    else:
        manifest = _load(data, audio_dir, known_classes, real_classes)
    if negatives is not None:
        others = load_negatives(negatives)
        manifest = add_negatives(manifest, others)
        manifest.notes.append(f"negatives: {plural(len(others), 'recording')} in {others.root}")
    if not (annotated and known_classes):  # a few recordings need not have every class
        check_classes(manifest)
    return manifest


def _load(data, audio_dir, known_classes, real_classes):
    if os.path.isdir(data):
        for table in TABLES:
            if os.path.isfile(data / table):
                return load_table(data / table, audio_dir, known_classes, real_classes)
        if audio_dir is not None:
            raise DataError(f"--audio-dir is for a CSV, but --data {data} is a folder: leave "
                            "--audio-dir out")
        return load_folder(data, {*known_classes, *real_classes})
    if not os.path.exists(data):
        problem = "does not exist"
    elif not os.path.isfile(data) or suffix(data.name) not in TABLE_SUFFIXES:
        problem = "is not a .csv, .tsv or .txt table"
    else:
        return load_table(data, audio_dir, known_classes, real_classes)
    raise DataError(f"--data {data} {problem}; give a folder with one folder per class, or a CSV")
