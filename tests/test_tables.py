"""Tables of clips become manifests; no file here needs to contain audio."""
import os
import shutil

import numpy as np
import pytest
from recordings import assert_not_loaded, groups_of, label_of, touch, write_table

from data.load import load_manifest


@pytest.mark.parametrize("text", [
    "path,label\nx/a.wav,dog\nb.wav,cat\n",
    "\ufeffpath;label\r\nx/a.wav;dog\r\nb.wav;cat\r\n",
    "Label\tPATH\ndog\tx/a.wav\n\n\t\ncat\tb.wav",
    '"label", "path", ,\n"dog", "./x/../x/a.wav",,\n cat ,b.wav\n',
    "File Name,Primary-Label\nx/a.wav,dog\nb.wav,cat",
])
def test_csv_dialects(tmp_path, text):
    touch(tmp_path, "x/a.wav", "b.wav")
    manifest = load_manifest(write_table(tmp_path, text))
    assert label_of(manifest) == {"b.wav": "cat", "x/a.wav": "dog"}
    assert manifest.paths == ["b.wav", "x/a.wav"]
    assert manifest.name == "clips" and manifest.root == tmp_path


# ---- which columns are used

def test_columns_with_other_names(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    manifest = load_manifest(write_table(tmp_path, (
        "target,fname,species,Subset,recordist,folds,onset,stop,lat\n"
        "0,a.wav,wren,training,ann,1,,,50\n0,b.wav,wren,DEV,ben,2.0,0.5,2,51\n"
        "1,c.wav,owl,eval,ann,3,1,,52\n")))
    assert label_of(manifest) == {"a.wav": "wren", "b.wav": "wren", "c.wav": "owl"}  # not 0 and 1
    assert manifest.split.tolist() == [0, 1, 2]
    assert manifest.fold.tolist() == [1, 2, 3] and manifest.fold.dtype == np.int16
    assert manifest.start.tolist() == [0, 0.5, 1] and manifest.end.tolist()[1] == 2
    assert np.isnan(manifest.end).tolist() == [True, False, True]
    assert groups_of(manifest) == {frozenset({"a.wav", "c.wav"}), frozenset({"b.wav"})}
    assert manifest.group_source == "column recordist"
    assert manifest.sources == {
        "path": "column fname", "label": "column species", "split": "column Subset",
        "fold": "column folds", "group": "column recordist",
        "time": "columns onset as start, stop as end"}
    assert manifest.notes == []


def test_label_columns_of_one_value_or_of_codes_come_last(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    birds = "path,label,class,species\na.wav,3,Aves,wren\nb.wav,4,Aves,owl\n"
    assert load_manifest(write_table(tmp_path, birds)).classes == ["owl", "wren"]
    codes = "path,target\na.wav,3\nb.wav,4\n"
    assert load_manifest(write_table(tmp_path, codes)).classes == ["3", "4"]
    touch(tmp_path, "c.wav")
    birdclef_2025 = ("primary_label,class_name,filename\nwren,Aves,a.wav\nowl,Aves,c.wav\n"
                     "22961,Amphibia,b.wav\n")
    classes = load_manifest(write_table(tmp_path, birdclef_2025)).classes
    assert classes == ["22961", "owl", "wren"]


def test_empty_columns_are_not_used(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    text = "path,label,split,fold,group,end\na.wav,x,,,,\nb.wav,y,,,,\n"
    manifest = load_manifest(write_table(tmp_path, text))
    assert manifest.sources == {"path": "column path", "label": "column label"}
    assert (manifest.split == -1).all() and manifest.fold is None
    assert manifest.group_source == "each file alone"


# ---- groups

def test_group_column(tmp_path):
    touch(tmp_path, *(f"{i}.wav" for i in range(7)))
    recordings = ["r", "r", "r", "", "", "s", "r"]
    rows = [f"{i}.wav,{'xy'[i % 2]},{recording},archive" for i, recording in enumerate(recordings)]

    def load(header, rows):
        return load_manifest(write_table(tmp_path, "\n".join([header, *rows])))

    manifest = load("path,label,group,source", rows)
    assert {len(group) for group in groups_of(manifest)} == {4, 1}  # empty fields are no group
    assert manifest.group_source == "column group"
    assert load("path,label,recordist,source", rows[2:]).group_source == "column recordist"
    manifest = load("path,label,nothing,source", rows)
    assert manifest.group_source == "each file alone"
    assert any("column source" in note and "7 of 7 rows have archive" in note
               for note in manifest.notes)


def test_rows_of_one_file_share_a_group(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav", "d.wav")
    lines = ["path,label,start,end,group", "a.wav,x,0,1,g", "a.wav,y,1,2,h", "b.wav,x,0,1,h",
             "c.wav,y,0,1,k", "d.wav,x,0,1,"]
    manifest = load_manifest(write_table(tmp_path, "\n".join(lines)))
    assert groups_of(manifest) == {
        frozenset({"a.wav", "b.wav"}), frozenset({"c.wav"}), frozenset({"d.wav"})}
    assert manifest.paths == ["a.wav", "a.wav", "b.wav", "c.wav", "d.wav"]
    assert manifest.start.tolist() == [0, 1, 0, 0, 0]
    without_group = [line.rsplit(",", 1)[0] for line in lines]
    manifest = load_manifest(write_table(tmp_path, "\n".join(without_group)))
    assert manifest.group.tolist() == [0, 0, 1, 2, 3]


# ---- where the audio is

@pytest.mark.parametrize("file, text", [
    ("audio/a.wav", "a.wav"), ("train_audio/a.wav", "a.wav"), ("train_audio/dog/a.wav", "a.wav"),
    ("dog/a.wav", "a.wav"), ("audio/deep/a.wav", "deep/a.wav"), ("../audio/a.wav", "a.wav"),
    ("audio/fold3/a.wav", "a.wav"),
])
def test_audio_is_found_near_the_table(tmp_path, file, text):
    base = tmp_path / "base"
    base.mkdir()
    touch(base, file, file.replace("a.wav", "b.wav").replace("dog", "cat"))
    rows = f"path,label,fold\n{text},dog,3\n{text.replace('a.wav', 'b.wav')},cat,3\n"
    manifest = load_manifest(write_table(base, rows))
    assert [manifest.file(row).exists() for row in range(2)] == [True, True]
    is_noted = any(note.startswith("the audio is in") for note in manifest.notes)
    assert is_noted == (manifest.root != base)


def test_audio_dir(tmp_path):
    touch(tmp_path, "lists/x", "store/a.wav", "store/sub/b.wav", "lists/a.wav", "lists/sub/b.wav")
    store = tmp_path / "store"
    inside = write_table(tmp_path / "lists", "path,label\na.wav,x\nsub/b.wav,y\n")
    assert load_manifest(inside).root == tmp_path / "lists"
    assert load_manifest(inside, store).root == store
    shutil.rmtree(tmp_path / "lists/sub")
    for first in ("../store/a.wav", f"{store}/a.wav"):  # outside the CSV's folder
        second = first.replace("a.wav", "sub/b.wav")
        outside = write_table(tmp_path / "lists", f"path,label\n{first},x\n{second},y\n")
        assert_not_loaded("row 2", "--audio-dir", outside)
        assert_not_loaded("is outside", "--audio-dir", outside, store / "sub")
        assert load_manifest(outside, store).paths == ["a.wav", "sub/b.wav"]
        assert load_manifest(outside, tmp_path).paths == ["store/a.wav", "store/sub/b.wav"]
    assert_not_loaded("no such folder", "--audio-dir", inside, tmp_path / "nowhere")


def test_paths_outside_are_refused_but_links_are_not(tmp_path):
    touch(tmp_path, "out/secret.wav", "in/a.wav", "in_too/b.wav")
    os.symlink(tmp_path / "out", tmp_path / "in/link")
    os.symlink("nowhere", tmp_path / "in/dangling.wav")
    text = "path,label\na.wav,x\nlink/secret.wav,y\ndangling.wav,y\n"
    manifest = load_manifest(write_table(tmp_path / "in", text))
    assert manifest.paths == ["a.wav", "dangling.wav", "link/secret.wav"]
    for path in ("../out/secret.wav", "link/../../out/secret.wav", f"{tmp_path}/out/secret.wav",
                 "../in_too/b.wav", ".."):
        outside = write_table(tmp_path / "in", f"path,label\na.wav,x\n{path},y\n")
        assert_not_loaded(f"clips.csv row 3: {path} is outside", "give --audio-dir", outside)
    # With labels as folders these would be x/../a.wav and y/../b.wav, which are inside.
    touch(tmp_path, "in/b.wav")
    outside = write_table(tmp_path / "in", "path,label\n../a.wav,x\n../b.wav,y\n")
    assert_not_loaded("clips.csv row 2: ../a.wav is outside", "give --audio-dir", outside)


# ---- refusals

NO_LABEL = "no label column with anything in it"
NAME_A_CLASS = "make it the name of a class"
WHOLE_NUMBER = "make it a whole number"


@pytest.mark.parametrize("text, problem, fix", [
    ("", "has no rows", "needs a header"),
    ("path,label\n", "has no rows", "needs a header"),
    ("path,text\na.wav,x\nb.wav,y\n", f"{NO_LABEL} among path, text", "name one of them label"),
    ("where,label\na.wav,x\nb.wav,y\n", "no path column with anything in it among where, label",
     "name one of them path"),
    ("path,label\na.wav,\nb.wav,\n", NO_LABEL, "name one of them label"),
    ("path\na.wav\nb.wav\n", f"{NO_LABEL} among path", "name one of them label"),
    ("path,label,Label\na.wav,x,x\nb.wav,y,y\n", "column label occurs twice", "remove one"),
    ("path,label\na.wav,x\nb.wav,;\n", "row 3: label is ';'", NAME_A_CLASS),
    ("path,label\na.wav,x\nb.wav\n", "row 3 ends before its label", "an empty field"),
    ("path,label\na.wav,x\nb\nc.wav,y\n", "row 3 ends before its label", "an empty field"),
    ("path,label\na.wav,x\n\n,y\n", "row 4: path is ''", "make it the path of a file"),
    ("path,label\na.wav,x\nb.wav,y,z\n", "row 3: 3 fields under a header of 2", "put quotes"),
    ("path,label\na.wav,x\nno.wav,y\nnix.wav,y\n", "row 3: no.wav is not in", "fix the paths"),
    ("path,label\na.wav,x\nno.wav,y\nnix.wav,y\n", "(2 of 3 rows name a missing file)",
     "--audio-dir"),
    ("path,label\na.wav,x\nb.wav,x\n", "only one class (x)", "two or more"),
    ("path,label,split\na.wav,x,train\nb.wav,y,holdout\n", "row 3: split is 'holdout'",
     "train, val or test"),
    ("path,label,split\na.wav,x,train\nb.wav,y,\n", "row 3: split is ''", "remove the column"),
    ("path,label,fold\na.wav,x,1\nb.wav,y,1.5\n", "row 3: fold is '1.5'", WHOLE_NUMBER),
    ("path,label,fold\na.wav,x,1\nb.wav,y,\n", "row 3: fold is ''", WHOLE_NUMBER),
    ("path,label,fold\na.wav,x,1\nb.wav,y,-1\n", "row 3: fold is '-1'", WHOLE_NUMBER),
    ("path,label,start\na.wav,x,0\nb.wav,y,-0.1\n", "row 3: start is '-0.1'", "make it seconds"),
    ("path,label,Onset\na.wav,x,0\nb.wav,y,1:30\n", "row 3: Onset is '1:30'", "make it seconds"),
    ("path,label,start\na.wav,x,nan\nb.wav,y,0\n", "row 2: start is 'nan'", "make it seconds"),
    ("path,label,start\na.wav,x,0\nb.wav,y,inf\n", "row 3: start is 'inf'", "make it seconds"),
    ("path,label,end\na.wav,x,inf\nb.wav,y,0\n", "row 2: end is 'inf'", "make it seconds"),
    ("path,label,end\na.wav,x,nan\nb.wav,y,1\n", "row 2: end is 'nan'", "make it seconds"),
    ("path,label,start,end\na.wav,x,0,1\nb.wav,y,2,2\n", "row 3: the clip ends at 2 s",
     "fix the row"),
    ("path,label,start,end\na.wav,x,0,1\nb.wav,y,2,1e-9\n", "row 3: the clip ends at 1e-09 s",
     "fix the row"),
    ("path,label,end\na.wav,x,0\nb.wav,y,1\n", "row 2: the clip ends at 0 s", "fix the row"),
    ("path,label\na.wav,x\nb.wav,y\n./a.wav,y\n", "rows 2 and 4: one clip with two labels, x and y",
     "remove one row"),
    ("path,label,split\na.wav,x,train\nb.wav,y,test\na.wav,x,test\n", "two splits, train and test",
     "remove one row"),
    ('path,label\n"a\nb.wav",x\nb.wav,y\n', "row 2: a\\nb.wav is not in", "fix the paths"),
    ("path,label\n" + "x" * 200_000 + ",y\nb.wav,y\n", "field larger than field limit",
     "fix the file"),
])
def test_tables_that_are_refused(tmp_path, text, problem, fix):
    touch(tmp_path, "a.wav", "b.wav")
    assert_not_loaded(problem, fix, write_table(tmp_path, text))
    assert_not_loaded(str(tmp_path), fix, write_table(tmp_path, text))  # which file is meant


def test_tables_in_other_encodings(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    table = tmp_path / "clips.csv"
    table.write_bytes("path,label\na.wav,x\nb.wav,y\n".encode("utf-16"))
    assert_not_loaded("is not UTF-8", "save it as CSV in UTF-8", table)
    table.write_bytes("path,label\na.wav,Möwe\nb.wav,y\n".encode("latin-1"))
    manifest = load_manifest(table)
    assert manifest.classes == ["Möwe", "y"]
    assert any("Windows-1252, e.g. Möwe" in note for note in manifest.notes)
    latin_1_path = os.fsencode(tmp_path) + b"/\xe9.wav"
    open(latin_1_path, "wb").close()
    table.write_bytes(b"path,label\n\xe9.wav,x\nb.wav,y\n")
    assert os.fsencode(load_manifest(table).file(1)) == latin_1_path


# ---- rows

def test_repeated_rows_are_left_out_with_a_note(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    text = ("path,label,start,end\na.wav,x,0,1\nb.wav,y,,\na.wav,x,0,1\na.wav,x,1,2\n"
            "b.wav,y,,\n")
    manifest = load_manifest(write_table(tmp_path, text))
    assert list(zip(manifest.paths, manifest.start.tolist())) == [
        ("a.wav", 0), ("a.wav", 1), ("b.wav", 0)]
    assert "left out: 2 repeated rows" in manifest.notes


def test_row_order_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    touch(tmp_path, *(f"{i}.wav" for i in range(30)))
    header = "id,path,label,start,end,group,fold,split"
    rows = [f"{i},{i % 30}.wav,{'xyz'[i % 3]},{i // 30}.5,{i // 30 + 1},{i % 7},{i % 4},"
            f"{['train', 'val'][i % 2]}" for i in range(90)]
    expected = load_manifest(write_table(tmp_path, "\n".join([header, *rows]))).to_dict()
    for _ in range(5):
        rng.shuffle(rows)
        manifest = load_manifest(write_table(tmp_path, "\n".join([header, *rows])))
        assert manifest.to_dict() | {"end": 0} == expected | {"end": 0}  # end: nan is not equal


# ---- known layouts

def test_esc50(esc10):
    for data in (esc10, esc10 / "meta/esc50.csv"):
        manifest = load_manifest(data)
        assert len(manifest) == 400 and manifest.counts().tolist() == [40] * 10
        assert manifest.classes[4] == "dog" and label_of(manifest)["1-100032-A.ogg"] == "dog"
        assert manifest.root == esc10 / "audio" and manifest.name == esc10.name
        assert np.bincount(manifest.fold).tolist() == [0, 80, 80, 80, 80, 80]
        assert manifest.group_source == "column src_file"
    for group in groups_of(manifest):
        assert len({path.split("-")[1] for path in group}) == 1


def test_names_of_esc50_show_the_groups_of_its_table(esc10, tmp_path):
    manifest = load_manifest(esc10)
    labels = label_of(manifest)
    for path, label in labels.items():
        (tmp_path / label).mkdir(exist_ok=True)
        os.symlink(esc10 / "audio" / path, tmp_path / label / path)
    by_name = load_manifest(tmp_path)
    assert by_name.group_source == "file name (ESC source number)"
    assert groups_of(by_name) == {
        frozenset(f"{labels[path]}/{path}" for path in group) for group in groups_of(manifest)}


@pytest.mark.parametrize("direct", [False, True])
def test_urbansound8k(tmp_path, direct):
    touch(tmp_path, "audio/fold1/100-3-0-0.wav", "audio/fold1/100-3-0-1.wav",
          "audio/fold10/7-2-0-0.wav", "FREESOUND.txt")
    (tmp_path / "metadata").mkdir()
    table = write_table(tmp_path / "metadata", (
        "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
        "100-3-0-0.wav,100,0.0,0.317551,1,1,3,dog_bark\n"
        "100-3-0-1.wav,100,58.5,62.5,1,1,3,dog_bark\n"
        "7-2-0-0.wav,7,60.5,60.0,1,10,2,children_playing\n"), "UrbanSound8K.csv")
    manifest = load_manifest(table if direct else tmp_path)
    assert manifest.paths == ["fold1/100-3-0-0.wav", "fold1/100-3-0-1.wav", "fold10/7-2-0-0.wav"]
    assert manifest.classes == ["children_playing", "dog_bark"]
    assert manifest.labels.tolist() == [1, 1, 0]
    assert manifest.group.tolist() == [0, 0, 1] and manifest.group_source == "column fsID"
    assert manifest.fold.tolist() == [1, 1, 10]
    # Its times are positions in the source recording, not in the file.
    assert not manifest.start.any() and np.isnan(manifest.end).all()
    assert manifest.root == tmp_path / "audio" and manifest.name == tmp_path.name


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("folder, file", [
    ("train_audio", "{0}/XC{1}.ogg"), ("train_short_audio", "XC{1}.ogg")])
def test_birdclef(tmp_path, folder, file, direct):
    """Columns as in 2024 (2022 to 2025 are alike; in 2021 the file names have no folder)."""
    recordings = [
        ("asbfly", "[]", "Matt Slaymaker", 134896),
        ("asbfly", "['comior1']", "Matt Slaymaker", 164848),
        ("zitcis1", "['asbfly', 'rocpar1']", "Lars Lachmann", 845747),
        ("zitcis1", "[]", "", 845817)]
    lines = ["primary_label,secondary_labels,type,latitude,longitude,scientific_name,common_name,"
             "author,license,rating,url,filename"]
    expected = {}
    for label, others, author, number in recordings:
        expected[f"{label}/XC{number}.ogg"] = label
        lines.append(f"{label},\"{others}\",['call'],39.2,118.1,S n,C N,{author},CC BY-NC-SA 4.0,"
                     f"5.0,https://www.xeno-canto.org/{number},{file.format(label, number)}")
    touch(tmp_path, *(f"{folder}/{path}" for path in expected), "test_soundscapes/readme.txt")
    table = write_table(tmp_path, "\n".join(lines), "train_metadata.csv")
    manifest = load_manifest(table if direct else tmp_path)
    assert label_of(manifest) == expected
    assert manifest.root == tmp_path / folder and manifest.group_source == "column author"
    assert groups_of(manifest) == {
        frozenset({"asbfly/XC134896.ogg", "asbfly/XC164848.ogg"}),
        frozenset({"zitcis1/XC845747.ogg"}), frozenset({"zitcis1/XC845817.ogg"})}
