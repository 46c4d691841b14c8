"""Helpers for tests of the data layer: empty audio files, tables, views of a manifest."""
import numpy as np
import pytest

from data.load import load_manifest
from data.manifest import DataError


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def write_table(folder, text, name="clips.csv"):
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder / name


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
