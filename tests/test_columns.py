"""Which columns of a table are read as label, group and time."""
import numpy as np
import pytest
from recordings import assert_not_loaded, groups_of, label_of, touch, write_table

from data.load import load_manifest


def load(folder, text, *args):
    """The manifest of a table whose first column has the files."""
    for line in text.split("\n")[1:]:
        if line:
            touch(folder, line.split(",")[0])
    return load_manifest(write_table(folder, text), *args)


def refuse(folder, text, problem, fix):
    for line in text.split("\n")[1:]:
        if line:
            touch(folder, line.split(",")[0])
    assert_not_loaded(problem, fix, write_table(folder, text))


# ---- times

@pytest.mark.parametrize("header", [
    "start,end", "Start (s),End (s)", "start_seconds,end_seconds", "onset,offset",
    "onset_s,offset_s", "beginTime,endTime", "Begin Time (s),End Time (s)", "StartTime,StopTime",
    "begin_time_sec,stop_time_sec", "t_start,t_end", "tmin,tmax", "Start Time (s),End Time (s)",
    "event_onset,event_offset", "segment_start,segment_end", "Begin.Time..s.,End.Time..s.",
])
def test_names_of_time_columns(tmp_path, header):
    manifest = load(tmp_path, f"path,label,{header}\na.wav,x,1,2\na.wav,y,2,3.5\nb.wav,x,0,1\n")
    assert manifest.start.tolist() == [1, 2, 0] and manifest.end.tolist() == [2, 3.5, 1]
    for name in header.split(","):
        assert name in manifest.sources["time"]


@pytest.mark.parametrize("header, start, end", [
    ("start,duration", 2, 5), ("OFFSET,DURATION", 2, 5), ("onset,length", 2, 5),
    ("start_ms,end_ms", 0.002, 0.003), ("startMs,durationMs", 0.002, 0.005),
    ("start_minutes,end_minutes", 120, 180),
])
def test_durations_and_units(tmp_path, header, start, end):
    manifest = load(tmp_path, f"path,label,{header}\na.wav,x,2,3\nb.wav,y,2,3\n")
    assert manifest.start == pytest.approx([start] * 2)
    assert manifest.end == pytest.approx([end] * 2)


def test_a_duration_without_start_is_the_file_s(tmp_path):
    manifest = load(tmp_path, "path,label,duration\na.wav,x,2\nb.wav,y,3\n")
    assert not manifest.start.any() and np.isnan(manifest.end).all()
    assert "time" not in manifest.sources


@pytest.mark.parametrize("header, problem, fix", [
    ("start_sample,end_sample", "start_sample has times in sample", "make it seconds"),
    ("offset,x", "offset may be where a clip starts or ends", "call it start or end"),
    ("onset,x", "rows 2 and 3: two clips of a.wav without an end", "column end or duration"),
])
def test_times_that_are_not_clear(tmp_path, header, problem, fix):
    refuse(tmp_path, f"path,label,{header}\na.wav,x,1,2\na.wav,y,2,3\nb.wav,x,1,2\n", problem, fix)


@pytest.mark.parametrize("time", ["06:30:00", "1:30", "2021-05-12 06:30:00"])
def test_clock_times_are_no_positions(tmp_path, time):
    refuse(tmp_path, f"path,label,start_time\na.wav,x,{time}\nb.wav,y,{time}\n",
           f"row 2: start_time is '{time}'", "if it is a time of day, call the column")


def test_folds_may_be_called_fold(tmp_path):
    manifest = load(tmp_path, "path,label,fold\na.wav,x,fold1\nb.wav,y,Fold_02\nc.wav,y,3.0\n")
    assert manifest.fold.tolist() == [1, 2, 3]


# ---- labels

def test_genus_and_species_are_one_name(tmp_path):
    text = ("file,genus,species\na.wav,Parus,major\nb.wav,Dendrocopos,major\nc.wav,Mus,Mus musculus"
            "\nd.wav,,unknown\n")
    manifest = load(tmp_path, text)
    assert list(label_of(manifest).values()) == [
        "Parus major", "Dendrocopos major", "Mus musculus", "unknown"]
    assert manifest.sources["label"] == "column genus + species"


def test_the_class_of_a_taxonomy_is_no_label(tmp_path):
    text = ("file,class,order,family,genus,species\na.wav,Aves,P,X,Parus,major\n"
            "b.wav,Aves,P,Y,Turdus,merula\nc.wav,Mammalia,R,Z,Mus,musculus\n")
    assert load(tmp_path, text).classes == ["Mus musculus", "Parus major", "Turdus merula"]
    text = "file,class,order,family\na.wav,Aves,P,X\nb.wav,Aves,P,Y\n"
    refuse(tmp_path, text, "no label column", "name one of them label")


@pytest.mark.parametrize("header", ["category,species", "class,common_name", "label,species"])
def test_two_columns_that_may_be_the_label(tmp_path, header):
    cells = ["0,wren", "1,owl", "1,wren"] if header[:5] == "label" else [
        "bird,wren", "bird,owl", "frog,rana"]
    text = f"file,{header}\n" + "".join(f"{i}.wav,{cell}\n" for i, cell in enumerate(cells))
    refuse(tmp_path, text, "may be the label", "call the right one label")


def test_columns_that_divide_alike_are_no_question(tmp_path):
    text = "file,category,species\na.wav,Wren,T t\nb.wav,Owl,B b\nc.wav,Wren,T t\n"
    assert load(tmp_path, text).classes == ["Owl", "Wren"]
    text = "file,label,species\na.wav,bird,T t\nb.wav,bird,B b\nc.wav,frog,R r\n"
    assert load(tmp_path, text).classes == ["bird", "frog"]  # it is called label


@pytest.mark.parametrize("cells", [
    ['"dog,rain"', "dog", "rain", "cat"], ['"dog, rain"', '"rain,cat"', '"cat,dog"', "dog"],
    ["\"['dog', 'rain']\"", "['dog']", "rain", "cat"]])
def test_lists_in_a_column_called_label(tmp_path, cells):
    text = "file,label\n" + "".join(f"{i}.wav,{cell}\n" for i, cell in enumerate(cells))
    manifest = load(tmp_path, text)
    assert manifest.classes == ["cat", "dog", "rain"] and manifest.multi_label
    assert manifest.label_text(0) == "dog; rain"


def test_commas_within_names(tmp_path):
    names = ["Speech, male", "Speech, male", "Speech", "Dog, barking"]
    rows = "".join(f'{i}.wav,"{name}"\n' for i, name in enumerate(names))
    manifest = load(tmp_path, f"file,label\n{rows}")
    assert manifest.classes == ["Dog, barking", "Speech", "Speech, male"]
    assert not manifest.multi_label
    refuse(tmp_path, f"file,labels\n{rows}4.wav,\"Dog, barking\"\n",
           "'Dog, barking' may be one name", "separate several with ;")
    manifest = load(tmp_path, 'file,labels\na.wav,"Speech, male;Dog"\nb.wav,Dog\n')
    assert manifest.classes == ["Dog", "Speech, male"]
    refuse(tmp_path, 'file,label\na.wav,"dog,cat"\nb.wav,dog\nc.wav,cat\nd.wav,"x, 1"\n'
           'e.wav,"x, 2"\nf.wav,"y, 3"\n', "looks like several labels", "separate several labels")


@pytest.mark.parametrize("header", ["secondary.labels", "Secondary Labels", "secondary-labels"])
def test_lists_of_secondary_labels(tmp_path, header):
    text = f'file,label,{header}\na.wav,x,"y,z"\nb.wav,y,\nc.wav,z,nan\n'
    manifest = load(tmp_path, text)
    assert np.isnan(manifest.targets([0])).tolist() == [[False, True, True]]


# ---- groups

@pytest.mark.parametrize("name", [
    "speaker_id", "client_id", "site", "patient", "device", "recorder", "SubjectID", "identifier",
    "Participant", "location", "station_id", "individual"])
def test_names_of_group_columns(tmp_path, name):
    rows = "".join(f"{i:02d}.wav,{'xy'[i % 2]},s{i // 3}\n" for i in range(12))
    manifest = load(tmp_path, f"path,label,{name}\n{rows}")
    assert {len(group) for group in groups_of(manifest)} == {3}
    assert manifest.sources["group"] == f"column {name}"


def test_a_source_of_few_values_is_no_group(tmp_path):
    def load_sources(n_values):
        rows = "".join(f"{i:02d}.wav,{'xy'[i % 2]},s{i % n_values}\n" for i in range(30))
        return load(tmp_path, f"path,label,source\n{rows}")

    manifest = load_sources(3)
    assert manifest.group_source == "each file alone"
    assert any("source is not used as group: it has only 3 values in 30 rows" in note
               for note in manifest.notes)
    assert load_sources(10).group_source == "column source"


def test_the_speaker_comes_before_the_recording_and_missing_ones_are_alone(tmp_path):
    speakers = ["nan", "NA", "", *(f"s{i // 3}" for i in range(3, 12))]
    rows = "".join(f"{i:02d}.wav,{'xy'[i % 2]},r{i},{speaker}\n"
                   for i, speaker in enumerate(speakers))
    manifest = load(tmp_path, f"path,label,recording_id,speaker_id\n{rows}")
    assert manifest.group_source == "column speaker_id"
    assert sorted(len(group) for group in groups_of(manifest)) == [1, 1, 1, 3, 3, 3]
    assert any("not recording_id" in note for note in manifest.notes)


def test_one_speaker_with_most_clips_is_still_a_group(tmp_path):
    rows = "".join(f"{i:02d}.wav,{'xy'[i % 2]},s{max(0, i - 8)}\n" for i in range(12))
    manifest = load(tmp_path, f"path,label,speaker_id\n{rows}")
    assert sorted(len(group) for group in groups_of(manifest)) == [1, 1, 1, 9]
