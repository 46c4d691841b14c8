"""split.csv and the hash of a split."""
import hashlib
import os

import numpy as np
import pytest
from recordings import make_manifest

from data.load import load_manifest
from data.splits import split_hash, write_split


def manifest_with_odd_names():
    paths = ["plain.wav", " blank .wav", 'quo"te,comma;.wav', "line\nfeed\r.wav", "\udce9.wav",
             "=1+1.wav", "é/ü.wav", "h"]
    manifest = make_manifest(
        ["a", "b, c"] * 4, paths=paths, group=[3, 1, 4, 1, 5, 9, 2, 6],
        split=[0, 1, 2, 0, -1, 1, 2, 0], start=[0, 0.1, 1 / 3, 1e-7, 12345.678, 0, 2, 3])
    manifest.end[:4] = [1, 1e5, 2 / 3, 0.3]
    return manifest


def test_split_csv_can_be_loaded_as_data(tmp_path):
    manifest = manifest_with_odd_names()
    manifest.split[:] = [0, 1, 2, 0, 0, 1, 2, 0]
    for path in manifest.paths:
        os.makedirs(os.path.dirname(tmp_path / path), exist_ok=True)
        (tmp_path / path).touch()
    write_split(manifest, tmp_path / "split.csv")
    loaded = load_manifest(tmp_path / "split.csv")
    assert split_hash(loaded) == split_hash(manifest)  # paths, labels, splits, starts and ends
    group = loaded.group[[loaded.paths.index(path) for path in manifest.paths]]
    same_group = manifest.group[:, None] == manifest.group
    assert np.array_equal(group[:, None] == group, same_group)  # the codes themselves may differ


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_split(manifest_with_odd_names(), tmp_path / "split.csv")
    old = (tmp_path / "split.csv").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as broken, pytest.raises(OSError, match="No space"):
            broken.setattr(os, name, full)
            write_split(make_manifest(["a", "b"]), tmp_path / "split.csv")
        assert os.listdir(tmp_path) == ["split.csv"]
        assert (tmp_path / "split.csv").read_bytes() == old


def test_split_hash():
    manifest = manifest_with_odd_names()
    expected = split_hash(manifest)
    assert len(expected) == hashlib.sha256().digest_size * 2
    assert split_hash(manifest.select([3, 1, 0, 2, 7, 6, 5, 4])) == expected
    regrouped = manifest.select(np.arange(8))
    regrouped.group[:] = 0
    assert split_hash(regrouped) == expected
    for name, value in (("split", 1), ("start", 0.5), ("end", 9.0), ("labels", 1)):
        changed = manifest.select(np.arange(8))
        getattr(changed, name)[0] = value
        assert split_hash(changed) != expected, name
    manifest.paths[0] = "plain.wav2"
    assert split_hash(manifest) != expected
