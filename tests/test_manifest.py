"""The Manifest itself: selections, plain form, size."""
import numpy as np
from recordings import touch, write_table

from data.load import load_manifest
from data.manifest import Manifest


def load_four_clips(folder):
    touch(folder, "a.wav", "b.wav", "c.wav", "d.wav")
    text = ("path,label,split,fold,end\na.wav,x,train,1,1\nb.wav,y,val,2,2\nc.wav,x,test,3,\n"
            "d.wav,z,train,3,1.1\n")
    manifest = load_manifest(write_table(folder, text))
    manifest.duration = np.arange(4, dtype=np.float32)
    return manifest


def test_select(tmp_path):
    manifest = load_four_clips(tmp_path)
    for rows in ([2, 0], np.array([2, 0]), np.array([True, False, True, False]), []):
        selected = manifest.select(rows)
        order = np.arange(4)[rows]
        assert selected.paths == [manifest.paths[row] for row in order]
        assert len(selected) == len(order)
        for name in ("labels", "end", "group", "split", "fold", "duration"):
            expected = getattr(manifest, name)[order]
            assert np.array_equal(getattr(selected, name), expected, equal_nan=True)
        assert selected.classes == manifest.classes and selected.root == manifest.root
    assert manifest.select([3]).counts().tolist() == [0, 0, 1]


def test_a_selection_shares_no_state(tmp_path):
    manifest = load_four_clips(tmp_path)
    selected = manifest.select([0, 1])
    selected.split[:] = 2
    selected.notes[:] = ["new"]
    assert manifest.split.tolist() == [0, 1, 2, 0] and manifest.notes != ["new"]


def test_plain_form_and_back(tmp_path):
    manifest = load_four_clips(tmp_path)
    plain = manifest.to_dict()
    restored = Manifest.from_dict(plain)
    for name, value in vars(manifest).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, getattr(restored, name), equal_nan=True), name
            assert value.dtype == getattr(restored, name).dtype, name
        else:
            assert value == getattr(restored, name)
    assert all(isinstance(value, str | list) for name, value in plain.items()
               if name not in ("label_set", "content", "sound", "sources"))
    assert plain["sources"]["label"] == "column label"
    without_folds = load_manifest(write_table(tmp_path, "path,label\na.wav,x\nb.wav,y\n"))
    assert Manifest.from_dict(without_folds.to_dict()).fold is None


def test_memory_beyond_the_paths(tmp_path):
    touch(tmp_path, *(f"{i % 2}/{i}.wav" for i in range(200)))
    manifest = load_manifest(tmp_path)
    arrays = [value for value in vars(manifest).values() if isinstance(value, np.ndarray)]
    pointer = 8  # bytes a clip in the list of paths
    assert sum(array.nbytes for array in arrays) / len(manifest) + pointer < 200
