"""Xeno-Canto tables as the API and warbleR write them; no file here needs to contain audio."""
import csv
import io
import re

import numpy as np
import pytest
from recordings import label_of, touch

from data.load import load_manifest
from data.manifest import DataError

# Columns in the order of the API's answer (v2; v3 calls group grp).
API_COLUMNS = [
    "id", "gen", "sp", "ssp", "group", "en", "rec", "cnt", "loc", "lat", "lng", "alt", "type",
    "sex", "stage", "method", "url", "file", "file-name", "lic", "q", "length", "time", "date",
    "uploaded", "also", "rmk"]
RECORDINGS = [  # id, gen, sp, group, en, rec, also
    (76967, "Troglodytes", "troglodytes", "birds", "Eurasian Wren", "Ann",
     "['Erithacus rubecula']"),
    (134896, "Troglodytes", "troglodytes", "birds", "Eurasian Wren", "Ben", "['']"),
    (1228, "Erithacus", "rubecula", "birds", "European Robin", "Ann", "['']"),
    (567435, "Gryllus", "campestris", "grasshoppers", "", "Cy", "['']"),
    (999999, "Gryllus", "campestris", "grasshoppers", "", "Cy", "['']"),  # its file is missing
]
LABELS = {76967: "Troglodytes troglodytes", 134896: "Troglodytes troglodytes",
          1228: "Erithacus rubecula", 567435: "Gryllus campestris"}


def write_api_table(folder, separator=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, API_COLUMNS, restval="", delimiter=separator)
    writer.writeheader()
    for number, gen, sp, group, en, rec, also in RECORDINGS:
        writer.writerow({
            "id": number, "gen": gen, "sp": sp, "group": group, "en": en, "rec": rec, "also": also,
            "cnt": "France", "length": "0:34", "url": f"//xeno-canto.org/{number}",
            "file": f"https://xeno-canto.org/{number}/download", "time": "11:21", "type": "song",
            "q": "A", "file-name": f"XC{number}-20200610 11h21.mp3"})
    (folder / "metadata.csv").write_text(out.getvalue(), encoding="utf-8")
    return folder / "metadata.csv"


@pytest.mark.parametrize("name", [
    "XC{0}.mp3", "{0}.mp3", "XC{0}-20200610 11h21.mp3",
    "deep/er/xc_{0} - Wren - T troglodytes.ogg", "wren/Troglodytes-troglodytes-{0}.wav",
    "XC00{0}.flac"])
def test_recordings_are_found_by_their_number(tmp_path, name):
    files = {number: name.format(number) for number in LABELS}
    touch(tmp_path, *files.values(), "XC5.mp3", "notes-76967.txt", "song.mp3")
    manifest = load_manifest(write_api_table(tmp_path))
    assert label_of(manifest) == {files[number]: label for number, label in LABELS.items()}
    # The groups are recordists; the table's `group` is a kind of animal.
    assert manifest.group_source == "column recordist"
    group = dict(zip(manifest.paths, manifest.group.tolist()))
    assert group[files[76967]] == group[files[1228]] and len(set(group.values())) == 3
    assert manifest.notes[0].startswith("Xeno-Canto metadata: gen sp is the label")
    assert any(note.startswith("left out: 1 of 5 ") and note.endswith("999999")
               for note in manifest.notes)


def test_species_in_the_background_are_unknown(tmp_path):
    """`also` of a wren's recording is the robin: neither a label of that clip nor a negative."""
    touch(tmp_path, *(f"XC{number}.mp3" for number in LABELS))
    manifest = load_manifest(write_api_table(tmp_path))
    robin = manifest.classes.index("Erithacus rubecula")
    unknown = {path: np.flatnonzero(np.isnan(row)).tolist()
               for path, row in zip(manifest.paths, manifest.targets(range(4)))}
    assert unknown == {"XC76967.mp3": [robin], "XC134896.mp3": [], "XC1228.mp3": [],
                       "XC567435.mp3": []}


def test_recordings_in_another_folder_and_in_pieces(tmp_path):
    files = ["XC76967.mp3", "cut/XC134896_0-5.wav", "cut/XC134896_5-10.wav", "XC1228.mp3",
             "XC567435.mp3"]
    store = tmp_path / "store"
    touch(store, *files)
    (tmp_path / "lists").mkdir()
    table = write_api_table(tmp_path / "lists", separator="\t")
    with pytest.raises(DataError, match=r"none of its 5 recordings is in .*; give --audio-dir"):
        load_manifest(table)
    manifest = load_manifest(table, store)
    assert sorted(manifest.paths) == sorted(files) and manifest.root == store
    with pytest.raises(DataError, match=r"/no: No such file or directory; give --audio-dir"):
        load_manifest(table, tmp_path / "no/where")


def test_a_label_column_is_used_instead_of_the_species(tmp_path):
    touch(tmp_path, *(f"XC{number}.mp3" for number in LABELS))
    header, *rows = write_api_table(tmp_path).read_text().splitlines()
    added = ["a,train", "b,test", "a,train", "b,test", "a,train"]
    lines = [f"{header},label,split", *(f"{row},{fields}" for row, fields in zip(rows, added))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    manifest = load_manifest(tmp_path / "metadata.csv")
    assert label_of(manifest) == {
        "XC76967.mp3": "a", "XC134896.mp3": "b", "XC1228.mp3": "a", "XC567435.mp3": "b"}
    assert sorted(manifest.split.tolist()) == [0, 0, 2, 2]


@pytest.mark.parametrize("separator", ["_", "."])
def test_tables_of_warbler(tmp_path, separator):
    """As write.csv saves what query_xc returns; read.csv changes _ in its names to a dot."""
    header = re.sub("_", separator, (
        '"","Recording_ID","Genus","Specific_epithet","Subspecies","English_name","Recordist",'
        '"Country","Locality","Latitude","Longitude","Vocalization_type","Audio_file","License",'
        '"Url","Quality","Time","Date"'))
    recordings = [(154074, "striigularis", "Mo"), (154161, "anthophilus", "Mo"),
                  (9, "anthophilus", "Al")]
    rows = []
    for i, (number, species, recordist) in enumerate(recordings):
        touch(tmp_path, f"Phaethornis-{species}-{number}.mp3")
        rows.append(
            f'"{i}","{number}","Phaethornis","{species}",NA,"A Hermit","{recordist}","Panama","x",'
            f'"7.5","-80","call","//www.xeno-canto.org/download.php?XC={number}","by-nc-sa",'
            f'"http://xeno-canto.org/{number}","A","10:20","2013-11-03"')
    (tmp_path / "xc.csv").write_text("\n".join([header, *rows]))
    manifest = load_manifest(tmp_path / "xc.csv")
    assert label_of(manifest) == {
        "Phaethornis-anthophilus-154161.mp3": "Phaethornis anthophilus",
        "Phaethornis-anthophilus-9.mp3": "Phaethornis anthophilus",
        "Phaethornis-striigularis-154074.mp3": "Phaethornis striigularis"}
    assert manifest.group.tolist() == [0, 1, 0] and manifest.group_source == "column recordist"


def test_other_tables_are_left_alone(tmp_path):
    touch(tmp_path, "76967.mp3", "1.wav", "2.wav")
    (tmp_path / "clips.csv").write_text("id,path,label,gen\n76967,1.wav,a,x\n1,2.wav,b,y\n")
    manifest = load_manifest(tmp_path / "clips.csv")
    assert label_of(manifest) == {"1.wav": "a", "2.wav": "b"}
    assert not any("Xeno" in note for note in manifest.notes)
