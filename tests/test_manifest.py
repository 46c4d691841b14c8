"""data/manifest.py against folders and tables made by hand; no file here needs to hold audio."""
import os
import shutil
import sys
import tracemalloc

import numpy as np
import pytest

from data.audio import AUDIO_SUFFIXES
from data.load import load_manifest
from data.manifest import DataError, Manifest


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def table(folder, text, name="clips.csv"):
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder / name


def refused(wrong, mend, *args, **kwargs):
    """The call raises a DataError of one printable line that says what is wrong and what mends it."""
    with pytest.raises(DataError) as caught:
        load_manifest(*args, **kwargs)
    message = str(caught.value)
    assert message.isprintable(), message
    assert wrong in message and mend in message, message


def label_of(manifest):
    return {path: manifest.classes[label] for path, label in zip(manifest.paths, manifest.labels)}


def groups(manifest):
    """The groups as a set of sets of paths."""
    return {frozenset(manifest.paths[row] for row in np.flatnonzero(manifest.group == g)) for g in manifest.group}


# ---- folders

def test_class_folders(tmp_path):
    touch(tmp_path, "dog/b.wav", "dog/a.FLAC", "dog/2020/may/c.mp3", "cat/x.ogg", "dog/.hidden.wav", ".git/y.wav",
          "dog/.cache/z.wav", "dog/cover.jpg", "dog/2020/note.txt", "cat/note.txt", "README", "empty/sub/note.md")
    manifest = load_manifest(tmp_path)
    assert manifest.paths == ["cat/x.ogg", "dog/2020/may/c.mp3", "dog/a.FLAC", "dog/b.wav"]
    assert manifest.classes == ["cat", "dog"]
    assert manifest.labels.tolist() == [0, 1, 1, 1] and manifest.labels.dtype == np.int32
    assert manifest.name == tmp_path.name and manifest.root == tmp_path
    assert manifest.file(1) == tmp_path / "dog/2020/may/c.mp3"
    assert manifest.split.tolist() == [-1] * 4 and manifest.split.dtype == np.int8 and manifest.fold is None
    assert manifest.start.tolist() == [0] * 4 and np.isnan(manifest.end).all()
    assert manifest.start.dtype == manifest.end.dtype == np.float32
    assert manifest.counts().tolist() == [1, 3]
    assert manifest.notes == ["folders without audio: empty",
                              "left out: 5 files that are not audio (1 without suffix, 1 .jpg, 1 .md, 2 .txt)"]


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{label}/{i}{x}.wav" for label in "ba" for i in range(5) for x in ("", "/r", ".é")))
    plain = load_manifest(tmp_path)
    scandir, listdir = os.scandir, os.listdir

    class Reversed:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return list(self.entries)[::-1]

        def __exit__(self, *_):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    monkeypatch.setattr(os, "listdir", lambda path: listdir(path)[::-1])
    other = load_manifest(tmp_path)
    assert other.paths == plain.paths == sorted(plain.paths, key=os.fsencode)
    assert (other.group == plain.group).all()


def test_odd_things_with_an_audio_suffix_are_kept(tmp_path):
    touch(tmp_path, "a/ok.wav", "b/ok.wav", "a/folder.wav/inside.wav")
    os.mkfifo(tmp_path / "a/pipe.wav")
    os.symlink("nowhere", tmp_path / "a/dangling.wav")
    os.symlink("loop.wav", tmp_path / "a/loop.wav")
    os.symlink("self", tmp_path / "a/self")  # ELOOP, without an audio suffix
    manifest = load_manifest(tmp_path)
    assert manifest.paths == ["a/dangling.wav", "a/folder.wav", "a/loop.wav", "a/ok.wav", "a/pipe.wav", "b/ok.wav"]


def test_names_that_are_not_utf8(tmp_path):
    touch(tmp_path, "b/x.wav")
    open(os.fsencode(tmp_path) + b"/loose\xff.wav", "wb").close()
    for label in (b"a\xff", b"line\nbreak"):
        os.mkdir(os.fsencode(tmp_path) + b"/" + label)
        open(os.fsencode(tmp_path) + b"/" + label + b"/\xe9\n.wav", "wb").close()
    manifest = load_manifest(tmp_path)
    assert [os.fsencode(path) for path in manifest.paths] == [b"a\xff/\xe9\n.wav", b"b/x.wav",
                                                              b"line\nbreak/\xe9\n.wav"]
    assert manifest.classes == ["a\\udcff", "b", "line\\nbreak"]  # class names can be printed and written anywhere
    assert all(manifest.file(row).exists() for row in range(3))
    assert manifest.notes == ["left out: 1 audio files outside any class folder, e.g. loose\\udcff.wav"]
    os.remove(tmp_path / "b/x.wav")
    shutil.rmtree(os.fsencode(tmp_path) + b"/a\xff")
    refused("only one class (line\\nbreak)", "give two or more", tmp_path)


def test_linked_folders_are_followed_but_not_round_and_round(tmp_path):
    touch(tmp_path, "store/x.wav", "other/deep/v.wav", "data/a/y.wav", "data/a/deep/z.wav")
    os.symlink(tmp_path / "store", tmp_path / "data/b")
    os.symlink(tmp_path / "other", tmp_path / "data/a/deep/away")
    os.symlink(tmp_path / "data", tmp_path / "data/a/deep/up")  # back to the top
    os.symlink("..", tmp_path / "data/a/deep/parent")
    assert label_of(load_manifest(tmp_path / "data")) == {
        "a/y.wav": "a", "a/deep/z.wav": "a", "a/deep/away/deep/v.wav": "a", "b/x.wav": "b"}


def test_names_are_sorted_by_their_bytes(tmp_path):
    touch(tmp_path, "b/x.wav", "a/\ue000.wav", "a/z.wav", "a/é.wav")
    open(os.fsencode(tmp_path) + b"/a/\xff.wav", "wb").close()  # the escaped byte, \udcff, comes before \ue000
    assert load_manifest(tmp_path).paths == ["a/z.wav", "a/é.wav", "a/\ue000.wav", "a/\udcff.wav", "b/x.wav"]


@pytest.mark.parametrize("val, test", [
    ("val", "test"), ("Valid", "TEST"), ("validation", "eval"), ("dev", "evaluation")])
def test_split_folders(tmp_path, val, test):
    touch(tmp_path, "train/dog/a.wav", "train/cat/b.wav", f"{val}/dog/c.wav", f"{test}/cat/deep/d.wav",
          "train/loose.wav", "docs/readme.txt")
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ["cat", "dog"]
    assert dict(zip(manifest.paths, manifest.split.tolist())) == {
        "train/dog/a.wav": 0, "train/cat/b.wav": 0, f"{val}/dog/c.wav": 1, f"{test}/cat/deep/d.wav": 2}
    assert [manifest.paths[row] for row in manifest.rows("val")] == [f"{val}/dog/c.wav"]
    assert any("1 audio files outside any class folder, e.g. train/loose.wav" in note for note in manifest.notes)
    assert any(note.startswith("splits are given by the folders") for note in manifest.notes)


def test_split_names_beside_other_folders_or_without_train_are_classes(tmp_path):
    touch(tmp_path, "mixed/train/a/x.wav", "mixed/test/a/y.wav", "mixed/bus/z.wav",
          "odd/val/a/x.wav", "odd/test/b/y.wav")
    mixed = load_manifest(tmp_path / "mixed")
    assert mixed.classes == ["bus", "test", "train"] and (mixed.split == -1).all()
    assert mixed.notes == ["folders test, train are taken as classes, like the folders beside them"]
    assert load_manifest(tmp_path / "odd").classes == ["test", "val"]


def test_folders_that_are_refused(tmp_path):
    missing = tmp_path / "missing"
    refused(f"--data {missing} is not there", "give a folder", missing)
    touch(tmp_path, "empty/a/note.txt", "flat/a.wav", "flat/b.wav", "one/dog/a.wav", "split/train/a.wav", "x.wav")
    refused("holds no audio (other files: 1 .txt)", "one folder per class", tmp_path / "empty")
    refused(" ".join(sorted(AUDIO_SUFFIXES)), "one folder per class", tmp_path / "empty")
    refused("outside any class folder (a.wav)", "put it in one folder per class", tmp_path / "flat")
    refused("outside any class folder (train/a.wav)", "put it in one folder per class", tmp_path / "split")
    table(tmp_path / "one", "path,label\n")
    refused("only one class (dog)", "clips.csv is not read; give it as --data", tmp_path / "one")
    refused("is no .csv", "give a folder", tmp_path / "x.wav")
    touch(tmp_path, "two/a/x.wav", "two/b/x.wav")
    refused("is a folder", "leave --audio-dir out", tmp_path / "two", audio_dir=tmp_path)
    refused("is not there", "give a folder", "no\0thing\n")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.wav", "b/sub/x.wav")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # chmod does not stop root
    refused("b/sub: Permission denied", "make it readable", tmp_path)


# ---- what file names show

@pytest.mark.parametrize("names, source, together", [
    (["1-100-A", "1-100-B", "2-100-A", "3-7-C-4"], "ESC source number", {3, 1}),
    (["100-3-0-0", "100-3-0-1", "7-1-0-0", "8-1-0-0"], "UrbanSound8K source number", {2, 1}),
    (["00ab12cd_nohash_0", "00ab12cd_nohash_3", "f00ab12c_nohash_0", "12_nohash_0"], "speaker", {2, 1}),
    (["XC123 - Wren", "song_xc-123_left", "XC1234", "XC99"], "XC number", {2, 1}),
    (["rec1_seg1", "rec1_seg22", "rec2_seg1", "rec3_seg1"], "segment number", {2, 1}),
    (["a-part02", "a-part03", "b-part01", "c-part01"], "segment number", {2, 1}),
    (["a_chunk4", "a.clip1", "b Segment 3", "c_clip4"], "segment number", {2, 1}),
    (["r_0-4000", "r_4000-8000", "q_0-4000", "s_0-4000"], "time range", {2, 1}),
    (["r_12.5_16.5", "r_8.5_12.5", "q_0_4", "s_0.0s_4s"], "time range", {2, 1}),
])
def test_groups_from_file_names(tmp_path, names, source, together):
    touch(tmp_path, *(f"{'ab'[i % 2]}/{name}.wav" for i, name in enumerate(names)))
    manifest = load_manifest(tmp_path)
    assert manifest.group_source == f"file name ({source})"
    assert {len(group) for group in groups(manifest)} == together
    assert manifest.group.dtype == np.int32 and set(manifest.group) == set(range(manifest.group.max() + 1))


@pytest.mark.parametrize("names", [
    ["dog_001", "dog_002", "dog_003", "dog_004"],
    ["1", "2", "3", "4"],
    ["XC1", "XC12", "XC101", "XC1012"],  # each its own
    ["S4A_20210512_060000", "S4A_20210513_060000", "S4A_20210514_060000", "S4A_20210515_060000"],
    ["a_seg1", "a_seg2", "bark", "meow"],  # half of them only
    ["r_8-4", "r_9-3", "q_5-5", "q_1-0"],  # no time ranges: they fall
])
def test_names_that_show_nothing_leave_each_file_alone(tmp_path, names):
    touch(tmp_path, *(f"{'ab'[i % 2]}/{name}.wav" for i, name in enumerate(names)))
    manifest = load_manifest(tmp_path)
    assert manifest.group_source == "each file alone"
    assert manifest.group.tolist() == [0, 1, 2, 3]


def test_nine_in_ten_names_must_match(tmp_path):
    touch(tmp_path, *(f"a/rec{i // 2}_seg{i % 2}.wav" for i in range(18)), "b/bark.wav")
    assert load_manifest(tmp_path).group_source == "file name (segment number)"
    touch(tmp_path, "b/meow.wav", "b/woof.wav")
    assert load_manifest(tmp_path).group_source == "each file alone"
    touch(tmp_path, *(f"a/rec{i // 2}_seg{i % 2}.wav" for i in range(18, 40)))
    found = load_manifest(tmp_path)
    assert found.group_source == "file name (segment number)"
    assert sorted(map(len, groups(found))) == [1] * 3 + [2] * 20  # names that show nothing do not belong together


def test_clip_numbers_under_the_class_name_are_no_recording(tmp_path):
    touch(tmp_path, *(f"{label}/{label}_clip{i}.wav" for label in ("dog", "cat") for i in range(6)))
    manifest = load_manifest(tmp_path)
    assert manifest.group_source == "each file alone" and len(set(manifest.group)) == 12
    assert any("most classes would be one group" in note and "column group" in note for note in manifest.notes)


# ---- tables

@pytest.mark.parametrize("text", [
    "path,label\nx/a.wav,dog\nb.wav,cat\n",
    "\ufeffpath;label\r\nx/a.wav;dog\r\nb.wav;cat\r\n",
    "Label\tPATH\ndog\tx/a.wav\n\n\t\ncat\tb.wav",
    '"label", "path", ,\n"dog", "./x/../x/a.wav",,\n cat ,b.wav\n',
    "File Name,Primary-Label\nx/a.wav,dog\nb.wav,cat",
])
def test_tables_in_many_dialects(tmp_path, text):
    touch(tmp_path, "x/a.wav", "b.wav")
    manifest = load_manifest(table(tmp_path, text))
    assert label_of(manifest) == {"b.wav": "cat", "x/a.wav": "dog"} and manifest.paths == ["b.wav", "x/a.wav"]
    assert manifest.name == "clips" and manifest.root == tmp_path


def test_columns_under_other_names(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    manifest = load_manifest(table(tmp_path, (
        "target,fname,species,Subset,recordist,folds,onset,stop,lat\n"
        "0,a.wav,wren,training,ann,1,,,50\n0,b.wav,wren,DEV,ben,2.0,0.5,2,51\n1,c.wav,owl,eval,ann,3,1,,52\n")))
    assert label_of(manifest) == {"a.wav": "wren", "b.wav": "wren", "c.wav": "owl"}  # not the codes 0 and 1
    assert manifest.split.tolist() == [0, 1, 2]
    assert manifest.fold.tolist() == [1, 2, 3] and manifest.fold.dtype == np.int16
    assert manifest.start.tolist() == [0, 0.5, 1] and manifest.end.tolist()[1] == 2
    assert np.isnan(manifest.end).tolist() == [True, False, True]
    assert groups(manifest) == {frozenset({"a.wav", "c.wav"}), frozenset({"b.wav"})}
    assert manifest.group_source == "column recordist"
    assert manifest.notes == ["columns used: fname as path, species as label, Subset as split, folds as fold, "
                              "recordist as group, onset as start, stop as end"]


def test_label_columns_of_one_value_or_of_codes_come_last(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    manifest = load_manifest(table(tmp_path, "path,label,class,species\na.wav,3,Aves,wren\nb.wav,4,Aves,owl\n"))
    assert manifest.classes == ["owl", "wren"]
    assert load_manifest(table(tmp_path, "path,target\na.wav,3\nb.wav,4\n")).classes == ["3", "4"]
    touch(tmp_path, "c.wav")  # BirdCLEF 2025
    bird = "primary_label,class_name,filename\nwren,Aves,a.wav\nowl,Aves,c.wav\n22961,Amphibia,b.wav\n"
    assert load_manifest(table(tmp_path, bird)).classes == ["22961", "owl", "wren"]


def test_empty_columns_are_not_used(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    manifest = load_manifest(table(tmp_path, "path,label,split,fold,group,end\na.wav,x,,,,\nb.wav,y,,,,\n"))
    assert manifest.notes == ["columns used: path, label"]
    assert (manifest.split == -1).all() and manifest.fold is None and manifest.group_source == "each file alone"


def test_group_column(tmp_path):
    touch(tmp_path, *(f"{i}.wav" for i in range(7)))
    rows = [f"{i}.wav,{'xy'[i % 2]},{g},archive" for i, g in enumerate(["r", "r", "r", "", "", "s", "r"])]
    manifest = load_manifest(table(tmp_path, "\n".join(["path,label,group,source", *rows])))
    assert {len(group) for group in groups(manifest)} == {4, 1}  # empty fields do not belong together
    assert manifest.group_source == "column group"
    manifest = load_manifest(table(tmp_path, "\n".join(["path,label,recordist,source", *rows[2:]])))
    assert manifest.group_source == "column recordist"
    manifest = load_manifest(table(tmp_path, "\n".join(["path,label,nothing,source", *rows])))
    assert manifest.group_source == "each file alone"
    assert "column source is not used as group: 7 of 7 rows have archive" in manifest.notes


def test_rows_of_one_file_share_a_group(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav", "d.wav")
    text = "path,label,start,end,group\na.wav,x,0,1,g\na.wav,y,1,2,h\nb.wav,x,0,1,h\nc.wav,y,0,1,k\nd.wav,x,0,1,\n"
    manifest = load_manifest(table(tmp_path, text))
    assert groups(manifest) == {frozenset({"a.wav", "b.wav"}), frozenset({"c.wav"}), frozenset({"d.wav"})}
    assert manifest.paths == ["a.wav", "a.wav", "b.wav", "c.wav", "d.wav"]
    assert manifest.start.tolist() == [0, 1, 0, 0, 0]
    manifest = load_manifest(table(tmp_path, "\n".join(line.rsplit(",", 1)[0] for line in text.split("\n"))))
    assert manifest.group.tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("files, row", [
    ("audio/a.wav", "a.wav"), ("train_audio/a.wav", "a.wav"), ("train_audio/dog/a.wav", "a.wav"),
    ("dog/a.wav", "a.wav"), ("audio/deep/a.wav", "deep/a.wav"), ("../audio/a.wav", "a.wav"),
    ("audio/fold3/a.wav", "a.wav"),
])
def test_audio_is_found_near_the_table(tmp_path, files, row):
    base = tmp_path / "base"
    base.mkdir()
    touch(base, files, files.replace("a.wav", "b.wav").replace("dog", "cat"))
    text = f"path,label,fold\n{row},dog,3\n{row.replace('a.wav', 'b.wav')},cat,3\n"
    manifest = load_manifest(table(base, text))
    assert [manifest.file(row).exists() for row in range(2)] == [True, True]
    assert any(note.startswith("the audio is in") for note in manifest.notes) == (manifest.root != base)


def test_audio_dir(tmp_path):
    touch(tmp_path, "lists/x", "store/a.wav", "store/sub/b.wav", "lists/a.wav", "lists/sub/b.wav")
    store = tmp_path / "store"
    inside = table(tmp_path / "lists", "path,label\na.wav,x\nsub/b.wav,y\n")
    assert load_manifest(inside).root == tmp_path / "lists"
    assert load_manifest(inside, store).root == store
    shutil.rmtree(tmp_path / "lists/sub")
    for path in ("../store/a.wav", f"{store}/a.wav"):  # outside the CSV's folder, mended by the flag
        outside = table(tmp_path / "lists", f"path,label\n{path},x\n{path.replace('a.wav', 'sub/b.wav')},y\n")
        refused("row 2", "--audio-dir", outside)
        refused("lies outside", "--audio-dir", outside, store / "sub")
        assert load_manifest(outside, store).paths == ["a.wav", "sub/b.wav"]
        assert load_manifest(outside, tmp_path).paths == ["store/a.wav", "store/sub/b.wav"]
    refused("no such folder", "--audio-dir", inside, tmp_path / "nowhere")


def test_paths_outside_are_refused_but_links_are_not(tmp_path):
    touch(tmp_path, "out/secret.wav", "in/a.wav", "in_too/b.wav")
    os.symlink(tmp_path / "out", tmp_path / "in/link")
    os.symlink("nowhere", tmp_path / "in/dangling.wav")
    clips = table(tmp_path / "in", "path,label\na.wav,x\nlink/secret.wav,y\ndangling.wav,y\n")
    assert load_manifest(clips).paths == ["a.wav", "dangling.wav", "link/secret.wav"]
    for path in ("../out/secret.wav", "link/../../out/secret.wav", f"{tmp_path}/out/secret.wav", "../in_too/b.wav",
                 ".."):
        refused(f"clips.csv row 3: {path} lies outside", "give --audio-dir",
                table(tmp_path / "in", f"path,label\na.wav,x\n{path},y\n"))
    touch(tmp_path, "in/b.wav")  # to be found as x/../a.wav, if the label were taken for a folder
    refused("clips.csv row 2: ../a.wav lies outside", "give --audio-dir",
            table(tmp_path / "in", "path,label\n../a.wav,x\n../b.wav,y\n"))


@pytest.mark.parametrize("text, wrong, mend", [
    ("", "has no rows", "needs a header"),
    ("path,label\n", "has no rows", "needs a header"),
    ("path,text\na.wav,x\nb.wav,y\n", "no label column with anything in it among path, text", "name one of them label"),
    ("where,label\na.wav,x\nb.wav,y\n", "no path column with anything in it among where, label",
     "name one of them path"),
    ("path,label\na.wav,\nb.wav,\n", "no label column with anything in it", "name one of them label"),
    ("path\na.wav\nb.wav\n", "no label column with anything in it among path", "name one of them label"),
    ("path,label,Label\na.wav,x,x\nb.wav,y,y\n", "column label is there twice", "take one out"),
    ("path,label\na.wav,x\nb.wav, \n", "row 3: label is ''", "make it the name of a class"),
    ("path,label\na.wav,x\nb.wav\n", "row 3: label is ''", "make it the name of a class"),
    ("path,label\na.wav,x\n\n,y\n", "row 4: path is ''", "make it the path of a file"),
    ("path,label\na.wav,x\nb.wav,y,z\n", "row 3: 3 fields under a header of 2", "put quotes"),
    ("path,label\na.wav,x\nno.wav,y\nnix.wav,y\n", "row 3: no.wav is not in", "mend the paths"),
    ("path,label\na.wav,x\nno.wav,y\nnix.wav,y\n", "(2 of 3 rows name a missing file)", "--audio-dir"),
    ("path,label\na.wav,x\nb.wav,x\n", "only one class (x)", "two or more"),
    ("path,label,split\na.wav,x,train\nb.wav,y,holdout\n", "row 3: split is 'holdout'", "train, val or test"),
    ("path,label,split\na.wav,x,train\nb.wav,y,\n", "row 3: split is ''", "take the column out"),
    ("path,label,fold\na.wav,x,1\nb.wav,y,1.5\n", "row 3: fold is '1.5'", "make it a whole number"),
    ("path,label,fold\na.wav,x,1\nb.wav,y,\n", "row 3: fold is ''", "make it a whole number"),
    ("path,label,fold\na.wav,x,1\nb.wav,y,-1\n", "row 3: fold is '-1'", "make it a whole number"),
    ("path,label,start\na.wav,x,0\nb.wav,y,-0.1\n", "row 3: start is '-0.1'", "make it seconds"),
    ("path,label,Onset\na.wav,x,0\nb.wav,y,1:30\n", "row 3: Onset is '1:30'", "make it seconds"),
    ("path,label,start\na.wav,x,nan\nb.wav,y,0\n", "row 2: start is 'nan'", "make it seconds"),
    ("path,label,start\na.wav,x,0\nb.wav,y,inf\n", "row 3: start is 'inf'", "make it seconds"),
    ("path,label,end\na.wav,x,inf\nb.wav,y,0\n", "row 2: end is 'inf'", "make it seconds"),
    ("path,label,end\na.wav,x,nan\nb.wav,y,1\n", "row 2: end is 'nan'", "make it seconds"),
    ("path,label,start,end\na.wav,x,0,1\nb.wav,y,2,2\n", "row 3: the clip ends at 2 s", "mend the row"),
    ("path,label,start,end\na.wav,x,0,1\nb.wav,y,2,1e-9\n", "row 3: the clip ends at 1e-09 s", "mend the row"),
    ("path,label,end\na.wav,x,0\nb.wav,y,1\n", "row 2: the clip ends at 0 s", "mend the row"),
    ("path,label\na.wav,x\nb.wav,y\n./a.wav,y\n", "rows 2 and 4: one clip with two labels, x and y",
     "take one row out"),
    ("path,label,split\na.wav,x,train\nb.wav,y,test\na.wav,x,test\n", "two splits, train and test", "take one row out"),
    ("path,label\na.wav,x\nb\nc.wav,y\n", "row 3: label is ''", "make it the name of a class"),
    ('path,label\n"a\nb.wav",x\nb.wav,y\n', "row 2: a\\nb.wav is not in", "mend the paths"),
    ("path,label\n" + "x" * 200_000 + ",y\nb.wav,y\n", "field larger than field limit", "mend it"),
])
def test_tables_that_are_refused(tmp_path, text, wrong, mend):
    touch(tmp_path, "a.wav", "b.wav")
    refused(wrong, mend, table(tmp_path, text))
    refused(str(tmp_path), mend, table(tmp_path, text))


def test_tables_in_other_encodings(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    clips = tmp_path / "clips.csv"
    clips.write_bytes("path,label\na.wav,x\nb.wav,y\n".encode("utf-16"))
    refused("is not UTF-8", "save it as CSV in UTF-8", clips)
    clips.write_bytes("path,label\na.wav,Möwe\nb.wav,y\n".encode("latin-1"))
    assert load_manifest(clips).classes == ["M\\udcf6we", "y"]
    odd = os.fsencode(tmp_path) + b"/\xe9.wav"
    open(odd, "wb").close()
    clips.write_bytes(b"path,label\n\xe9.wav,x\nb.wav,y\n")
    assert os.fsencode(load_manifest(clips).file(1)) == odd


def test_repeated_rows_are_dropped_with_a_note(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    text = "path,label,start,end\na.wav,x,0,1\nb.wav,y,,\na.wav,x,0,1\na.wav,x,1,2\nb.wav,y,,\n"
    manifest = load_manifest(table(tmp_path, text))
    assert list(zip(manifest.paths, manifest.start.tolist())) == [("a.wav", 0), ("a.wav", 1), ("b.wav", 0)]
    assert "left out: 2 rows that repeat another row" in manifest.notes


def test_row_order_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    touch(tmp_path, *(f"{i}.wav" for i in range(30)))
    header = "id,path,label,start,group,fold,split"
    rows = [f"{i},{i % 30}.wav,{'xyz'[i % 3]},{i // 30}.5,{i % 7},{i % 4},{['train', 'val'][i % 2]}" for i in range(90)]
    first = load_manifest(table(tmp_path, "\n".join([header, *rows])))
    for _ in range(5):
        rng.shuffle(rows)
        other = load_manifest(table(tmp_path, "\n".join([header, *rows])))
        assert other.to_dict() | {"end": 0} == first.to_dict() | {"end": 0}


# ---- known layouts

def test_esc50(esc10):
    for data in (esc10, esc10 / "meta/esc50.csv"):
        manifest = load_manifest(data)
        assert len(manifest) == 400 and manifest.counts().tolist() == [40] * 10
        assert manifest.classes[4] == "dog" and label_of(manifest)["1-100032-A.ogg"] == "dog"
        assert manifest.root == esc10 / "audio" and manifest.name == esc10.name
        assert np.bincount(manifest.fold).tolist() == [0, 80, 80, 80, 80, 80]
        assert manifest.group_source == "column src_file"
    for group in groups(manifest):
        assert len({path.split("-")[1] for path in group}) == 1
    by_name = load_manifest_of_links(esc10, manifest)
    assert by_name.group_source == "file name (ESC source number)" and groups(by_name) == {
        frozenset(f"{label_of(manifest)[path]}/{path}" for path in group) for group in groups(manifest)}


def load_manifest_of_links(esc10, manifest):
    """The same clips in class folders, made and taken away again."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        for path, label in label_of(manifest).items():
            os.makedirs(f"{folder}/{label}", exist_ok=True)
            os.symlink(esc10 / "audio" / path, f"{folder}/{label}/{path}")
        return load_manifest(folder)


@pytest.mark.parametrize("direct", [False, True])
def test_urbansound8k(tmp_path, direct):
    touch(tmp_path, "audio/fold1/100-3-0-0.wav", "audio/fold1/100-3-0-1.wav", "audio/fold10/7-2-0-0.wav",
          "FREESOUND.txt")
    (tmp_path / "metadata").mkdir()
    csv = table(tmp_path / "metadata", (
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
        "100-3-0-0.wav,100,0.0,0.317551,1,1,3,dog_bark\n100-3-0-1.wav,100,58.5,62.5,1,1,3,dog_bark\n"
        "7-2-0-0.wav,7,60.5,60.0,1,10,2,children_playing\n"), "UrbanSound8K.csv")
    manifest = load_manifest(csv if direct else tmp_path)
    assert manifest.paths == ["fold1/100-3-0-0.wav", "fold1/100-3-0-1.wav", "fold10/7-2-0-0.wav"]
    assert manifest.classes == ["children_playing", "dog_bark"] and manifest.labels.tolist() == [1, 1, 0]
    assert manifest.group.tolist() == [0, 0, 1] and manifest.group_source == "column fsID"
    assert manifest.fold.tolist() == [1, 1, 10]
    assert not manifest.start.any() and np.isnan(manifest.end).all()  # times in the source recording
    assert manifest.root == tmp_path / "audio" and manifest.name == tmp_path.name


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("folder, file", [("train_audio", "{0}/XC{1}.ogg"), ("train_short_audio", "XC{1}.ogg")])
def test_birdclef(tmp_path, folder, file, direct):
    """Columns as in the competition of 2024 (2022 to 2025 are alike; in 2021 the file names have no folder)."""
    rows = [("asbfly", "[]", "Matt Slaymaker", 134896), ("asbfly", "['comior1']", "Matt Slaymaker", 164848),
            ("zitcis1", "['asbfly', 'rocpar1']", "Lars Lachmann", 845747), ("zitcis1", "[]", "", 845817)]
    touch(tmp_path, *(f"{folder}/{label}/XC{number}.ogg" for label, _, _, number in rows), "test_soundscapes/readme.txt")
    csv = table(tmp_path, "primary_label,secondary_labels,type,latitude,longitude,scientific_name,common_name,author,license,"
                "rating,url,filename\n" + "".join(
                    f"{label},\"{others}\",['call'],39.2,118.1,S n,C N,{author},CC BY-NC-SA 4.0,5.0,"
                    f"https://www.xeno-canto.org/{number},{file.format(label, number)}\n" for label, others, author, number in rows),
                "train_metadata.csv")
    manifest = load_manifest(csv if direct else tmp_path)
    assert label_of(manifest) == {f"{label}/XC{number}.ogg": label for label, _, _, number in rows}
    assert manifest.root == tmp_path / folder and manifest.group_source == "column author"
    assert groups(manifest) == {frozenset({"asbfly/XC134896.ogg", "asbfly/XC164848.ogg"}),
                                frozenset({"zitcis1/XC845747.ogg"}), frozenset({"zitcis1/XC845817.ogg"})}


def test_speech_commands(tmp_path):
    touch(tmp_path, "yes/00ab_nohash_0.wav", "yes/00ab_nohash_1.wav", "no/12cd_nohash_0.wav", "no/00ab_nohash_0.wav",
          "yes/0e_nohash_0.wav", "_background_noise_/hum.wav", "_background_noise_/README.md", "LICENSE")
    without = load_manifest(tmp_path)  # the noise is no class without the lists, either
    assert without.classes == ["no", "yes"] and (without.split == -1).all()
    (tmp_path / "validation_list.txt").write_text("no/12cd_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("yes/0e_nohash_0.wav\nyes/gone_nohash_0.wav\n")
    manifest = load_manifest(tmp_path)
    assert dict(zip(manifest.paths, manifest.split.tolist())) == {
        "no/00ab_nohash_0.wav": 0, "no/12cd_nohash_0.wav": 1, "yes/00ab_nohash_0.wav": 0, "yes/00ab_nohash_1.wav": 0,
        "yes/0e_nohash_0.wav": 2}
    assert manifest.group_source == "file name (speaker)" and len(set(manifest.group)) == 3
    assert f"_background_noise_ is no class, left out: 1 recordings; to mix them in: --noise-p 0.5 --noise-dir {tmp_path}/" in (
        " ".join(manifest.notes))
    shutil.rmtree(tmp_path / "no")
    refused("only one class (yes)", "give two or more", tmp_path)


# ---- the manifest

def test_take_and_dict(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav", "d.wav")
    text = "path,label,split,fold,end\na.wav,x,train,1,1\nb.wav,y,val,2,2\nc.wav,x,test,3,\nd.wav,z,train,3,1.1\n"
    manifest = load_manifest(table(tmp_path, text))
    manifest.duration = np.arange(4, dtype=np.float32)
    for rows in ([2, 0], np.array([2, 0]), np.array([True, False, True, False]), []):
        picked = manifest.select(rows)
        order = np.arange(4)[rows]
        assert picked.paths == [manifest.paths[row] for row in order] and len(picked) == len(order)
        for name in ("labels", "end", "group", "split", "fold", "duration"):
            assert np.array_equal(getattr(picked, name), getattr(manifest, name)[order], equal_nan=True)
        assert picked.classes == manifest.classes and picked.root == manifest.root
    assert manifest.select([3]).counts().tolist() == [0, 0, 1]
    picked = manifest.select([0, 1])
    picked.split[:], picked.notes[:] = 2, ["new"]
    assert manifest.split.tolist() == [0, 1, 2, 0] and manifest.notes != ["new"]  # no shared state

    again = Manifest.from_dict(manifest.to_dict())
    for name, value in vars(manifest).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, getattr(again, name), equal_nan=True), name
            assert value.dtype == getattr(again, name).dtype, name
        else:
            assert value == getattr(again, name)
    assert all(isinstance(value, (str, list)) for name, value in manifest.to_dict().items() if name != "label_set")
    without = load_manifest(table(tmp_path, "path,label\na.wav,x\nb.wav,y\n"))
    assert Manifest.from_dict(without.to_dict()).fold is None


def test_memory_beyond_the_paths(tmp_path):
    touch(tmp_path, *(f"{i % 2}/{i}.wav" for i in range(200)))
    manifest = load_manifest(tmp_path)
    columns = sum(value.nbytes for value in vars(manifest).values() if isinstance(value, np.ndarray))
    assert columns / len(manifest) + 8 < 200  # 8: the list's pointer to the path


def test_memory_while_a_folder_is_read(tmp_path):
    n = 4000
    touch(tmp_path, *(f"{'long' * 20}{i % 2}/{i}.wav" for i in range(n)))
    tracemalloc.start()
    manifest = load_manifest(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (peak - sum(map(sys.getsizeof, manifest.paths))) / n < 120
