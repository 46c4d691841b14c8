"""Helpers for tests of the data layer: files, tables, manifests and views of them."""
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data.load import load_manifest
from data.manifest import DataError, Manifest


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def write_table(folder, text, name="clips.csv"):
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder / name


def write_wav(path, seed=0, frames=800, rate=16000, channels=1):
    """Write a WAV of noise whose bytes follow from the seed. -> path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (frames, channels))
    sf.write(path, noise, rate, subtype="PCM_16")
    return path


def assert_refused(problem, fix, function, *args, **kwargs):
    """The call raises a DataError of one printable line with the problem and how to fix it."""
    with pytest.raises(DataError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message.isprintable(), message
    assert problem in message and fix in message, message


def assert_not_loaded(problem, fix, *args, **kwargs):
    """`load_manifest` refuses the data with such a message."""
    assert_refused(problem, fix, load_manifest, *args, **kwargs)


def make_manifest(labels, group=None, split=None, fold=None, paths=None, start=None):
    """A manifest of these columns; by default every row is its own file and group."""
    n = len(labels)
    classes = sorted(set(labels))
    group = np.arange(n) if group is None else np.unique(group, return_inverse=True)[1]
    return Manifest(
        name="made", root=Path("/data"), classes=classes,
        paths=paths or [f"{label}/{i:03d}.wav" for i, label in enumerate(labels)],
        labels=np.array([classes.index(label) for label in labels], np.int32),
        start=np.zeros(n, np.float32) if start is None else np.array(start, np.float32),
        end=np.full(n, np.nan, np.float32), group=group.astype(np.int32),
        group_source="column group",
        split=np.full(n, -1, np.int8) if split is None else np.array(split, np.int8),
        fold=None if fold is None else np.array(fold, np.int16), notes=[])


def manifest_of_paths(folder, *paths, start=None, end=None):
    """A manifest of these paths, each its own group; the files need not exist."""
    manifest = make_manifest(["a"] * len(paths), paths=list(paths), start=start)
    manifest.root = folder
    if end is not None:
        manifest.end = np.array(end, np.float32)
    return manifest


def label_of(manifest):
    """{path: class name}."""
    return {path: manifest.classes[label] for path, label in zip(manifest.paths, manifest.labels)}


def split_of(manifest):
    """{path: index of the split}."""
    return dict(zip(manifest.paths, manifest.split.tolist()))


def groups_of(manifest):
    """The groups as a set of sets of paths."""
    return {frozenset(manifest.paths[row] for row in np.flatnonzero(manifest.group == g))
            for g in manifest.group}


def same_scan(first, second):
    """Whether two scans have found the same."""
    arrays_are_equal = all(np.array_equal(getattr(first, name), getattr(second, name))
                           for name in ("duration", "rate", "channels", "ok"))
    return (arrays_are_equal and first.reasons == second.reasons
            and first.duplicates == second.duplicates)
