"""Folders of recordings become manifests; no file here needs to contain audio."""
import os
import shutil
import sys
import tracemalloc

import numpy as np
import pytest
from recordings import assert_not_loaded, groups_of, label_of, split_of, touch, write_table

from data.audio import AUDIO_SUFFIXES
from data.load import load_manifest


def test_class_folders(tmp_path):
    touch(tmp_path, "dog/b.wav", "dog/a.FLAC", "dog/2020/may/c.mp3", "cat/x.ogg",
          "dog/.hidden.wav", ".git/y.wav", "dog/.cache/z.wav", "dog/cover.jpg",
          "dog/2020/note.txt", "cat/note.txt", "README", "empty/sub/note.md")
    manifest = load_manifest(tmp_path)
    assert manifest.paths == ["cat/x.ogg", "dog/2020/may/c.mp3", "dog/a.FLAC", "dog/b.wav"]
    assert manifest.classes == ["cat", "dog"]
    assert manifest.labels.tolist() == [0, 1, 1, 1] and manifest.labels.dtype == np.int32
    assert manifest.name == tmp_path.name and manifest.root == tmp_path
    assert manifest.file(1) == tmp_path / "dog/2020/may/c.mp3"
    assert manifest.split.tolist() == [-1] * 4 and manifest.split.dtype == np.int8
    assert manifest.fold is None
    assert manifest.start.tolist() == [0] * 4 and np.isnan(manifest.end).all()
    assert manifest.start.dtype == manifest.end.dtype == np.float32
    assert manifest.counts().tolist() == [1, 3]
    assert len(manifest.notes) == 2
    assert manifest.notes[0].endswith(": empty")
    assert "5 files" in manifest.notes[1]
    assert manifest.notes[1].endswith("(1 without suffix, 1 .jpg, 1 .md, 2 .txt)")


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    names = [f"{label}/{i}{suffix}.wav"
             for label in "ba" for i in range(5) for suffix in ("", "/r", ".é")]
    touch(tmp_path, *names)
    expected = load_manifest(tmp_path)
    scandir, listdir = os.scandir, os.listdir

    class Reversed:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return iter(list(self.entries)[::-1])

        def __exit__(self, *_):
            self.entries.close()

        def __next__(self):  # os.walk takes its entries one by one
            if not hasattr(self, "reversed"):
                self.reversed = self.__enter__()
            return next(self.reversed)

    monkeypatch.setattr(os, "scandir", Reversed)
    monkeypatch.setattr(os, "listdir", lambda path: listdir(path)[::-1])
    manifest = load_manifest(tmp_path)
    assert manifest.paths == expected.paths == sorted(expected.paths, key=os.fsencode)
    assert (manifest.group == expected.group).all()


def test_anything_with_an_audio_suffix_is_listed(tmp_path):
    touch(tmp_path, "a/ok.wav", "b/ok.wav", "a/folder.wav/inside.wav")
    os.mkfifo(tmp_path / "a/pipe.wav")
    os.symlink("nowhere", tmp_path / "a/dangling.wav")
    os.symlink("loop.wav", tmp_path / "a/loop.wav")
    os.symlink("self", tmp_path / "a/self")  # ELOOP, without an audio suffix
    manifest = load_manifest(tmp_path)
    assert manifest.paths == ["a/dangling.wav", "a/folder.wav/inside.wav", "a/loop.wav", "a/ok.wav",
                              "a/pipe.wav", "b/ok.wav"]


def test_names_that_are_not_utf8(tmp_path):
    touch(tmp_path, "b/x.wav")
    open(os.fsencode(tmp_path) + b"/loose\xff.wav", "wb").close()
    for label in (b"a\xff", b"line\nbreak"):
        os.mkdir(os.fsencode(tmp_path) + b"/" + label)
        open(os.fsencode(tmp_path) + b"/" + label + b"/\xe9\n.wav", "wb").close()
    manifest = load_manifest(tmp_path)
    assert [os.fsencode(path) for path in manifest.paths] == [
        b"a\xff/\xe9\n.wav", b"b/x.wav", b"line\nbreak/\xe9\n.wav"]
    # Class names can be printed and written anywhere.
    assert manifest.classes == ["a\\udcff", "b", "line\\nbreak"]
    assert all(manifest.file(row).exists() for row in range(3))
    assert len(manifest.notes) == 1 and manifest.notes[0].endswith("e.g. loose\\udcff.wav")
    os.remove(tmp_path / "b/x.wav")
    shutil.rmtree(os.fsencode(tmp_path) + b"/a\xff")
    assert_not_loaded("only one class (line\\nbreak)", "give two or more", tmp_path)


def test_linked_folders_are_followed_but_loops_are_not(tmp_path):
    touch(tmp_path, "store/x.wav", "other/deep/v.wav", "data/a/y.wav", "data/a/deep/z.wav")
    os.symlink(tmp_path / "store", tmp_path / "data/b")
    os.symlink(tmp_path / "other", tmp_path / "data/a/deep/away")
    os.symlink(tmp_path / "data", tmp_path / "data/a/deep/up")  # back to the top
    os.symlink("..", tmp_path / "data/a/deep/parent")
    assert label_of(load_manifest(tmp_path / "data")) == {
        "a/y.wav": "a", "a/deep/z.wav": "a", "a/deep/away/deep/v.wav": "a", "b/x.wav": "b"}


def test_names_are_sorted_by_their_bytes(tmp_path):
    touch(tmp_path, "b/x.wav", "a/\ue000.wav", "a/z.wav", "a/é.wav")
    open(os.fsencode(tmp_path) + b"/a/\xff.wav", "wb").close()
    # As characters, the escaped byte \udcff would come before \ue000.
    assert load_manifest(tmp_path).paths == [
        "a/z.wav", "a/é.wav", "a/\ue000.wav", "a/\udcff.wav", "b/x.wav"]


# ---- splits

@pytest.mark.parametrize("val, test", [
    ("val", "test"), ("Valid", "TEST"), ("validation", "eval"), ("dev", "evaluation")])
def test_split_folders(tmp_path, val, test):
    touch(tmp_path, "train/dog/a.wav", "train/cat/b.wav", f"{val}/dog/c.wav",
          f"{test}/cat/deep/d.wav", "train/loose.wav", "docs/readme.txt")
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ["cat", "dog"]
    assert split_of(manifest) == {"train/dog/a.wav": 0, "train/cat/b.wav": 0,
                                  f"{val}/dog/c.wav": 1, f"{test}/cat/deep/d.wav": 2}
    assert [manifest.paths[row] for row in manifest.rows("val")] == [f"{val}/dog/c.wav"]
    assert any("outside any class folder, e.g. train/loose.wav" in note
               for note in manifest.notes)
    assert any(note.startswith("splits are given by the folders") for note in manifest.notes)


def test_incomplete_splits_are_refused_but_names_of_splits_may_be_classes(tmp_path):
    touch(tmp_path, "mixed/train/a/x.wav", "mixed/test/a/y.wav", "mixed/bus/z.wav",
          "odd/val/a/x.wav", "odd/test/b/y.wav", "vehicles/train/a.wav", "vehicles/bus/b.wav",
          "parts/valid/a.wav", "parts/invalid/b.wav")
    assert_not_loaded("test, train look like splits, but bus", "CSV", tmp_path / "mixed")
    assert_not_loaded("test, val look like splits", "call one train", tmp_path / "odd")
    vehicles = load_manifest(tmp_path / "vehicles")
    assert vehicles.classes == ["bus", "train"] and (vehicles.split == -1).all()
    assert len(vehicles.notes) == 1 and "folders train are read as classes" in vehicles.notes[0]
    assert load_manifest(tmp_path / "parts").classes == ["invalid", "valid"]


# ---- refusals

def test_folders_that_are_refused(tmp_path):
    missing = tmp_path / "missing"
    assert_not_loaded(f"--data {missing} does not exist", "give a folder", missing)
    touch(tmp_path, "empty/a/note.txt", "flat/a.wav", "flat/b.wav", "one/dog/a.wav",
          "split/train/a.wav", "x.wav", "two/a/x.wav", "two/b/x.wav")
    assert_not_loaded("(other files: 1 .txt)", "one folder per class", tmp_path / "empty")
    assert_not_loaded(" ".join(sorted(AUDIO_SUFFIXES)), "one folder per class", tmp_path / "empty")
    fix = "put it in one folder per class"
    assert_not_loaded("outside any class folder (a.wav)", fix, tmp_path / "flat")
    assert_not_loaded("outside any class folder (train/a.wav)", fix, tmp_path / "split")
    write_table(tmp_path / "one", "path,label\n")
    assert_not_loaded("only one class (dog)", "clips.csv is not read; give it as --data",
                      tmp_path / "one")
    assert_not_loaded("is not a .csv", "give a folder", tmp_path / "x.wav")
    assert_not_loaded("is a folder", "leave --audio-dir out", tmp_path / "two", audio_dir=tmp_path)
    assert_not_loaded("does not exist", "give a folder", "no\0thing\n")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.wav", "b/sub/x.wav")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # chmod does not stop root
    assert_not_loaded("b/sub: Permission denied", "make it readable", tmp_path)


# ---- groups by file name

def touch_in_two_classes(folder, names):
    touch(folder, *(f"{'ab'[i % 2]}/{name}.wav" for i, name in enumerate(names)))


@pytest.mark.parametrize("names, source, sizes", [
    (["1-100-A", "1-100-B", "2-100-A", "3-7-C-4"], "ESC source number", {3, 1}),
    (["100-3-0-0", "100-3-0-1", "7-1-0-0", "8-1-0-0"], "UrbanSound8K source number", {2, 1}),
    (["00ab12cd_nohash_0", "00ab12cd_nohash_3", "f00ab12c_nohash_0", "12_nohash_0"], "speaker",
     {2, 1}),
    (["XC123 - Wren", "song_xc-123_left", "XC1234", "XC99"], "XC number", {2, 1}),
    (["rec1_seg1", "rec1_seg22", "rec2_seg1", "rec3_seg1"], "segment number", {2, 1}),
    (["a-part02", "a-part03", "b-part01", "c-part01"], "segment number", {2, 1}),
    (["a_chunk4", "a.clip1", "b Segment 3", "c_clip4"], "segment number", {2, 1}),
    (["r_0-4000", "r_4000-8000", "q_0-4000", "s_0-4000"], "time range", {2, 1}),
    (["r_12.5_16.5", "r_8.5_12.5", "q_0_4", "s_0.0s_4s"], "time range", {2, 1}),
])
def test_groups_by_file_name(tmp_path, names, source, sizes):
    touch_in_two_classes(tmp_path, names)
    manifest = load_manifest(tmp_path)
    assert manifest.group_source == f"file name ({source})"
    assert {len(group) for group in groups_of(manifest)} == sizes
    assert manifest.group.dtype == np.int32
    assert set(manifest.group) == set(range(manifest.group.max() + 1))


@pytest.mark.parametrize("names", [
    ["dog_001", "dog_002", "dog_003", "dog_004"],
    ["1", "2", "3", "4"],
    ["XC1", "XC12", "XC101", "XC1012"],  # all different
    ["S4A_20210512_060000", "S4A_20210513_060000", "S4A_20210514_060000", "S4A_20210515_060000"],
    ["a_seg1", "a_seg2", "bark", "meow"],  # only half of them
    ["r_8-4", "r_9-3", "q_5-5", "q_1-0"],  # no time ranges: they fall
])
def test_names_that_show_no_recording_leave_each_file_alone(tmp_path, names):
    touch_in_two_classes(tmp_path, names)
    manifest = load_manifest(tmp_path)
    assert manifest.group_source == "each file alone"
    assert manifest.group.tolist() == [0, 1, 2, 3]


def test_nine_in_ten_names_must_match(tmp_path):
    touch(tmp_path, *(f"a/rec{i // 2}_seg{i % 2}.wav" for i in range(18)), "b/bark.wav")
    assert load_manifest(tmp_path).group_source == "file name (segment number)"
    touch(tmp_path, "b/meow.wav", "b/woof.wav")
    assert load_manifest(tmp_path).group_source == "each file alone"
    touch(tmp_path, *(f"a/rec{i // 2}_seg{i % 2}.wav" for i in range(18, 40)))
    manifest = load_manifest(tmp_path)
    assert manifest.group_source == "file name (segment number)"
    # Names that do not match are groups of their own.
    assert sorted(map(len, groups_of(manifest))) == [1] * 3 + [2] * 20


def test_clip_numbers_after_the_class_name_are_not_recordings(tmp_path):
    touch(tmp_path, *(f"{label}/{label}_clip{i}.wav" for label in ("dog", "cat") for i in range(6)))
    manifest = load_manifest(tmp_path)
    assert manifest.group_source == "each file alone" and len(set(manifest.group)) == 12
    assert any("one group each" in note and "column group" in note for note in manifest.notes)


# ---- known layouts

def test_speech_commands(tmp_path):
    touch(tmp_path, "yes/00ab_nohash_0.wav", "yes/00ab_nohash_1.wav", "no/12cd_nohash_0.wav",
          "no/00ab_nohash_0.wav", "yes/0e_nohash_0.wav", "_background_noise_/hum.wav",
          "_background_noise_/README.md", "LICENSE")
    without_lists = load_manifest(tmp_path)
    assert without_lists.classes == ["no", "yes"] and (without_lists.split == -1).all()
    (tmp_path / "validation_list.txt").write_text("no/12cd_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("yes/0e_nohash_0.wav\nyes/gone_nohash_0.wav\n")
    manifest = load_manifest(tmp_path)
    assert split_of(manifest) == {
        "no/00ab_nohash_0.wav": 0, "no/12cd_nohash_0.wav": 1, "yes/00ab_nohash_0.wav": 0,
        "yes/00ab_nohash_1.wav": 0, "yes/0e_nohash_0.wav": 2, "_background_noise_/hum.wav": -1}
    assert manifest.group_source == "file name (speaker)" and len(set(manifest.group)) == 4
    assert [manifest.paths[row] for row in np.flatnonzero(manifest.is_negative)] == [
        "_background_noise_/hum.wav"]
    assert any("1 recording in _background_noise_" in note for note in manifest.notes)


def test_memory_while_a_folder_is_read(tmp_path):
    n = 4000
    touch(tmp_path, *(f"{'long' * 20}{i % 2}/{i}.wav" for i in range(n)))
    tracemalloc.start()
    manifest = load_manifest(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (peak - sum(map(sys.getsizeof, manifest.paths))) / n < 120
