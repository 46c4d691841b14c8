"""data/xenocanto.py against tables as the API and warbleR give them; no file here needs to hold audio."""
import csv
import io

import numpy as np
import pytest

from data.load import load_manifest
from data.manifest import DataError

# Columns in the order of the API's answer (v2; v3 calls group grp).
API = ("id gen sp ssp group en rec cnt loc lat lng alt type sex stage method url file file-name lic q length time date uploaded "
       "also rmk").split()
RECORDINGS = [  # id, gen, sp, group, en, rec, also
    (76967, "Troglodytes", "troglodytes", "birds", "Eurasian Wren", "Ann", "['Erithacus rubecula']"),
    (134896, "Troglodytes", "troglodytes", "birds", "Eurasian Wren", "Ben", "['']"),
    (1228, "Erithacus", "rubecula", "birds", "European Robin", "Ann", "['']"),
    (567435, "Gryllus", "campestris", "grasshoppers", "", "Cy", "['']"),
    (999999, "Gryllus", "campestris", "grasshoppers", "", "Cy", "['']")]  # of the last one there is no file
LABELS = {76967: "Troglodytes troglodytes", 134896: "Troglodytes troglodytes", 1228: "Erithacus rubecula",
          567435: "Gryllus campestris"}


def api_table(folder, separator=",", **changes):
    out = io.StringIO()
    writer = csv.DictWriter(out, [changes.pop(name, name) for name in API], restval="", delimiter=separator)
    writer.writeheader()
    for number, gen, sp, group, en, rec, also in RECORDINGS:
        writer.writerow(dict(id=number, gen=gen, sp=sp, group=group, en=en, rec=rec, also=also, cnt="France", length="0:34",
                             url=f"//xeno-canto.org/{number}", file=f"https://xeno-canto.org/{number}/download",
                             time="11:21", type="song", q="A") | {"file-name": f"XC{number}-20200610 11h21.mp3"})
    (folder / "metadata.csv").write_text(out.getvalue(), encoding="utf-8")
    return folder / "metadata.csv"


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def label_of(manifest):
    return {path: manifest.classes[label] for path, label in zip(manifest.paths, manifest.labels)}


@pytest.mark.parametrize("name", ["XC{0}.mp3", "{0}.mp3", "XC{0}-20200610 11h21.mp3", "deep/er/xc_{0} - Wren - T troglodytes.ogg",
                                  "wren/Troglodytes-troglodytes-{0}.wav", "XC00{0}.flac"])
def test_recordings_are_found_by_their_number(tmp_path, name):
    files = {number: name.format(number) for number in LABELS}
    touch(tmp_path, *files.values(), "XC5.mp3", "notes-76967.txt", "song.mp3")
    manifest = load_manifest(api_table(tmp_path))
    assert label_of(manifest) == {files[number]: label for number, label in LABELS.items()}
    assert manifest.group_source == "column recordist"
    group = dict(zip(manifest.paths, manifest.group.tolist()))
    assert group[files[76967]] == group[files[1228]] and len(set(group.values())) == 3  # Ann; not the animals' group
    assert manifest.notes[0].startswith("Xeno-Canto metadata: gen sp is the label")
    assert f"left out: 1 of 5 recordings that are not in {tmp_path}, e.g. 999999" in manifest.notes


def test_species_in_the_background_are_unknown_where_clips_may_have_several(tmp_path):
    """`also` of the wren is the robin: neither a label of that clip nor a negative."""
    touch(tmp_path, *(f"XC{number}.mp3" for number in LABELS))
    manifest = load_manifest(api_table(tmp_path))
    robin = manifest.classes.index("Erithacus rubecula")
    unknown = {path: np.flatnonzero(np.isnan(row)).tolist() for path, row in zip(manifest.paths, manifest.targets(range(4)))}
    assert unknown == {f"XC{number}.mp3": [robin] * (number == 76967) for number in LABELS}


def test_in_another_folder_and_in_pieces(tmp_path):
    files = ["XC76967.mp3", "cut/XC134896_0-5.wav", "cut/XC134896_5-10.wav", "XC1228.mp3", "XC567435.mp3"]
    touch(tmp_path / "store", *files)
    (tmp_path / "lists").mkdir()
    table = api_table(tmp_path / "lists", separator="\t")
    with pytest.raises(DataError, match="none of its 5 recordings is in .*lists; give --audio-dir"):
        load_manifest(table)
    manifest = load_manifest(table, tmp_path / "store")
    assert sorted(manifest.paths) == sorted(files) and manifest.root == tmp_path / "store"
    with pytest.raises(DataError, match="/no: No such file or directory; give --audio-dir"):
        load_manifest(table, tmp_path / "no/where")


def test_a_label_of_ones_own_stays(tmp_path):
    touch(tmp_path, *(f"XC{number}.mp3" for number in LABELS))
    text = api_table(tmp_path).read_text().splitlines()
    lines = [f"{text[0]},label,split"] + [f"{line},{'ab'[i % 2]},{['train', 'test'][i % 2]}" for i, line in enumerate(text[1:])]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    manifest = load_manifest(tmp_path / "metadata.csv")
    assert label_of(manifest) == {"XC76967.mp3": "a", "XC134896.mp3": "b", "XC1228.mp3": "a", "XC567435.mp3": "b"}
    assert sorted(manifest.split.tolist()) == [0, 0, 2, 2]


def test_the_table_of_warbler(tmp_path):
    """As write.csv saves what query_xc returns."""
    touch(tmp_path, "Phaethornis-striigularis-154074.mp3", "Phaethornis-anthophilus-154161.mp3", "Phaethornis-anthophilus-9.mp3")
    header = ('"","Recording_ID","Genus","Specific_epithet","Subspecies","English_name","Recordist","Country","Locality",'
              '"Latitude","Longitude","Vocalization_type","Audio_file","License","Url","Quality","Time","Date"')
    rows = [f'"{i}","{number}","Phaethornis","{species}",NA,"A Hermit","{who}","Panama","x","7.5","-80","call",'
            f'"//www.xeno-canto.org/download.php?XC={number}","by-nc-sa","http://xeno-canto.org/{number}","A","10:20","2013-11-03"'
            for i, (number, species, who) in enumerate(
                [(154074, "striigularis", "Mo"), (154161, "anthophilus", "Mo"), (9, "anthophilus", "Al")])]
    for head in (header, header.replace("_", ".")):  # and as read.csv makes names
        (tmp_path / "xc.csv").write_text("\n".join([head, *rows]))
        manifest = load_manifest(tmp_path / "xc.csv")
        assert label_of(manifest) == {"Phaethornis-anthophilus-154161.mp3": "Phaethornis anthophilus",
                                      "Phaethornis-anthophilus-9.mp3": "Phaethornis anthophilus",
                                      "Phaethornis-striigularis-154074.mp3": "Phaethornis striigularis"}
        assert manifest.group.tolist() == [0, 1, 0] and manifest.group_source == "column recordist"


def test_other_tables_are_left_alone(tmp_path):
    touch(tmp_path, "76967.mp3", "1.wav", "2.wav")
    (tmp_path / "clips.csv").write_text("id,path,label,gen\n76967,1.wav,a,x\n1,2.wav,b,y\n")
    manifest = load_manifest(tmp_path / "clips.csv")
    assert label_of(manifest) == {"1.wav": "a", "2.wav": "b"} and not any("Xeno" in note for note in manifest.notes)
