"""Annotated recordings: tables of programs, and tables of many recordings."""
import io
import math
from types import SimpleNamespace

import pytest
from recordings import touch
from test_annotations import refused, spans, write

from data.annotations import is_annotated, load_annotations
from report.tracks import window_rows

AB = [("a.wav", 0, 3, ("crow",)), ("b.wav", 3, 6, ("jay",))]


# --- BirdNET

BIRDNET = "Start (s),End (s),Scientific name,Common name,Confidence,File\n"


def test_birdnet_table_of_many_recordings(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    path = write(tmp_path, "BirdNET_CombinedTable.csv", "\ufeff" + BIRDNET
                 + "0.0,3.0,Corvus corone,Crow,0.9,C:\\rec\\a.wav\n"
                 + '3.0,6.0,Pica pica,"Magpie, common",0.5,C:\\rec\\b.wav\n')
    write(tmp_path, "BirdNET_analysis_params.csv", "Segment length,Sample rate\n3,48000\n")
    assert is_annotated(path) and is_annotated(tmp_path)
    for data in (path, tmp_path):
        found = load_annotations(data)
        assert spans(found) == [("a.wav", 0, 3, ("Corvus corone",)),
                                ("b.wav", 3, 6, ("Pica pica",))]
        assert any("not of a person" in note for note in found.notes)
    common = load_annotations(path, label_column="Common name")
    assert [event.labels for event in common.events] == [("Crow",), ("Magpie, common",)]


def test_birdnet_table_for_each_recording(tmp_path):
    touch(tmp_path, "rec/a.wav", "rec/b.wav", "rec/c.wav")
    header = BIRDNET.replace(",File", "")
    write(tmp_path, "out/a.BirdNET.results.csv", header + "0.0,3.0,Corvus corone,Crow,0.9\n")
    write(tmp_path, "out/b.BirdNET.results.csv", header)
    found = load_annotations(tmp_path)
    assert spans(found) == [("rec/a.wav", 0, 3, ("Corvus corone",))]
    assert found.recordings == ["rec/a.wav", "rec/b.wav"] and found.unlisted == ["rec/c.wav"]


def test_birdnet_table_for_r(tmp_path):
    touch(tmp_path, "a.wav")
    path = write(tmp_path, "r.csv", "filepath,start,end,scientific_name,common_name,confidence\n"
                                    "/x/a.wav,0,3,Corvus corone,Crow,0.9\n")
    assert is_annotated(path)
    assert spans(load_annotations(path)) == [("a.wav", 0, 3, ("Corvus corone",))]


# --- Kaleidoscope

KALEIDOSCOPE = "INDIR,OUTDIR,FOLDER,IN FILE,CHANNEL,OFFSET,DURATION,Fmin,Fmax,AUTO ID*,MANUAL ID\n"


def test_kaleidoscope(tmp_path):
    touch(tmp_path, "s1/a.wav", "s2/a.wav", "s2/c.wav")
    path = write(tmp_path, "cluster.csv", KALEIDOSCOPE
                 + "D:\\in,,s1,a.wav,0,12.3,0.7,100,1000,MYLU,EPFU\r\n"
                 + "D:\\in,,s1,a.wav,0,20,0,100,1000,MYLU,LABO;LACI\r\n"
                 + "D:\\in,,s2,a.wav,0,1,2,100,1000,MYLU,EPFU\r\n"
                 + "D:\\in,,s2,c.wav,0,1,2,100,1000,MYLU,\r\n")
    assert is_annotated(path)
    found = load_annotations(path)
    assert spans(found) == [("s1/a.wav", 12.3, 13.0, ("EPFU",)),
                            ("s1/a.wav", 20, 20, ("LABO", "LACI")), ("s2/a.wav", 1, 3, ("EPFU",))]
    assert any("1 row without MANUAL ID" in note for note in found.notes)
    assert found.unlisted == ["s2/c.wav"]  # nobody has checked it
    automatic = load_annotations(path, label_column="AUTO ID")
    assert {event.labels for event in automatic.events} == {("MYLU",)}


def test_kaleidoscope_that_nobody_has_checked(tmp_path):
    touch(tmp_path, "s/a.wav")
    path = write(tmp_path, "id.csv", KALEIDOSCOPE + "/in,,s,a.wav,0,1,2,100,1000,MYLU,\n")
    refused("MANUAL ID is empty", "--label-column", data=path)


def test_a_kaleidoscope_table_beside_one_that_was_checked(tmp_path):
    touch(tmp_path, "s/a.wav", "s/b.wav")
    write(tmp_path, "1/id.csv", KALEIDOSCOPE + "/in,,s,a.wav,0,1,2,100,1000,MYLU,EPFU\n")
    write(tmp_path, "2/id.csv", "INDIR,FOLDER,IN FILE,OFFSET,DURATION,AUTO ID\n"
                                "/in,s,b.wav,1,2,MYLU\n")
    found = load_annotations(tmp_path)
    assert spans(found) == [("s/a.wav", 1, 3, ("EPFU",))] and found.unlisted == ["s/b.wav"]


# --- crowsetta

def test_generic_seq(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    header = ("label,onset_s,offset_s,onset_sample,offset_sample,notated_path,annot_path,sequence,"
              "annotation\n")
    path = write(tmp_path, "all.csv", header + "crow,0.0,3.0,0,48000,/x/a.wav,a.phn,0,0\n"
                                               "jay,3.0,6.0,48000,96000,/x/b.wav,b.phn,0,1\n")
    assert is_annotated(path) and spans(load_annotations(path)) == AB
    path = write(tmp_path, "a.csv", header + "crow,0.0,3.0,0,48000,None,a.phn,0,0\n")
    assert spans(load_annotations(path)) == AB[:1]
    path = write(tmp_path, "all.csv", (
        "label,onset_sample,offset_sample,notated_path,annot_path,sequence,annotation\n"
        "crow,0,48000,a.wav,a.phn,0,0\n"))
    refused("has no times in seconds", "onset_s", data=path)


@pytest.mark.parametrize("header, row", [
    ("label,onset_s,offset_s", "crow,0.0,3.0"), (",name,start_seconds,stop_seconds", "0,crow,0,3"),
    ("start,end,label", "0,3,crow"), ("onset\toffset\tspecies", "0\t3\tcrow"),
])
def test_simple_seq(tmp_path, header, row):
    touch(tmp_path, "a.wav", "b.wav")
    path = write(tmp_path, "a_annotations.csv", f"{header}\n{row}\n")
    assert is_annotated(tmp_path) and is_annotated(path)
    for data in (tmp_path, path):
        assert spans(load_annotations(data)) == AB[:1]


# --- perch

def test_perch_annotations(tmp_path):
    touch(tmp_path, "site/a.wav", "b.wav")
    header = "filename,start_time_s,end_time_s,label\n"
    path = write(tmp_path, "annotations.csv", header + "site/a.wav,0.0,3.0,crow jay\n"
                                                       "b.wav,3.0,6.0,jay\nb.wav,3.0,6.0,crow\n")
    assert is_annotated(path) and is_annotated(tmp_path)
    assert spans(load_annotations(path)) == [
        ("b.wav", 3, 6, ("crow",)), ("b.wav", 3, 6, ("jay",)),
        ("site/a.wav", 0, 3, ("crow", "jay"))]
    path = write(tmp_path, "annotations.csv", header + "b.wav,3.0,6.0,Blue Jay\n")
    refused("'Blue Jay' may be one name or several", "--label-column label", data=path)
    found = load_annotations(path, label_column="label")
    assert found.events[0].labels == ("Blue Jay",)


@pytest.mark.parametrize("header, times", [
    ("recording,start_offset_s,end_offset_s", "0.0,3.0"), ("filename,offsets", '"[0.0, 3.0]"'),
])
def test_hoplite_annotations(tmp_path, header, times):
    touch(tmp_path, "a.wav", "b.wav")
    rows = [f"{name}.wav,{times},{label},{kind},me" for name, label, kind in [
        ("a", "Blue Jay", "POSITIVE"), ("b", "crow", "NEGATIVE"), ("a", "owl", "UNCERTAIN")]]
    path = write(tmp_path, "annotations.csv",
                 "\n".join([f"{header},label,label_type,provenance", *rows]) + "\n")
    assert is_annotated(path)
    found = load_annotations(path)
    assert spans(found) == [("a.wav", 0, 3, ("Blue Jay",))]
    assert any("2 rows with a label_type that is not POSITIVE" in note for note in found.notes)
    assert found.unlisted == ["b.wav"]
    write(tmp_path, "annotations.csv", path.read_text().replace("NEGATIVE", "MAYBE"))
    refused("row 3: label_type is 'MAYBE'", data=path)


# --- one table of many recordings

TABLES = {
    "plain": "file,start,end,label\na.wav,0,3,crow\nb.wav,3,6,jay\n",
    "bom and semicolons": "\ufefffile;start;end;label\na.wav;0,0;3,0;crow\nb.wav;3,0;6,0;jay\n",
    "sep line": "sep=;\r\nfile;start;end;label\r\na.wav;0;3;crow\r\nb.wav;3;6;jay\r\n",
    "comments": ("# made by hand\n# 2024\n# v2\nfile,start,end,label\na.wav,0,3,crow\n"
                 "b.wav,3,6,jay\n"),
    "DESED": "filename\tonset\toffset\tevent_label\na.wav\t0.0\t3.0\tcrow\nb.wav\t3.0\t6.0\tjay\n",
    "duration": "file,start,duration,label\na.wav,0,3,crow\nb.wav,3,3,jay\n",
    "milliseconds": "file,start_ms,end_ms,label\na.wav,0,3000,crow\nb.wav,3000,6000,jay\n",
    "without suffix": "id,file,start_seconds,end_seconds,species\n1,a,0,3,crow\n2,b,3,6,jay\n",
    "Windows": "file,start,end,label\nC:\\rec\\a.wav,0,3,crow\nC:\\rec\\b.WAV,3,6,jay\n",
    "absolute": "file,start,end,label\n/mnt/x/a.wav,0,3,crow\n/mnt/x/b.wav,3,6,jay\n",
    "Raven columns": ("Begin File,Begin Time (s),End Time (s),Species\na.wav,0,3,crow\n"
                      "b.wav,3,6,jay\n"),
    "list cells": "file,start,end,labels\na.wav,0,3,['crow']\nb.wav,3,6,\"['jay']\"\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_one_table_of_many_recordings(tmp_path, text, encoding):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    path = write(tmp_path, "all.csv", text.lstrip("\ufeff") if encoding == "utf-16" else text,
                 encoding)
    assert not is_annotated(path) and is_annotated(path, asked=True)
    found = load_annotations(path)
    assert spans(found) == AB and found.unlisted == ["c.wav"]
    assert found.root == tmp_path and found.name == "all"


def test_birdset_soundscapes(tmp_path):
    touch(tmp_path, "soundscape_data/a.flac", "b.flac")
    path = write(tmp_path, "annotations.csv", (
        "Filename,Start Time (s),End Time (s),Low Freq (Hz),High Freq (Hz),Species eBird Code\n"
        "a.flac,0.0,3.5,1000,2000.5,amecro\nb.flac,1.0,2.0,,,blujay\n"))
    assert is_annotated(path, asked=True) and is_annotated(tmp_path, asked=True)
    for data in (path, tmp_path):
        found = load_annotations(data)
        assert found.events[1] == ("soundscape_data/a.flac", 0.0, 3.5, ("amecro",), 1000.0, 2000.5)
        assert math.isnan(found.events[0].low) and math.isnan(found.events[0].high)
        assert "Start Time (s) as start" in found.sources["time"]


def test_units(tmp_path):
    touch(tmp_path, "a.wav")
    path = write(tmp_path, "all.csv", "file,start,duration,low_freq_khz,high_freq_khz,label\n"
                                      "a.wav,0.1,0.2,1.5,2,crow\n")
    assert load_annotations(path).events == [("a.wav", 0.1, 0.3, ("crow",), 1500.0, 2000.0)]


def test_rows_that_say_that_nothing_is_there(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    path = write(tmp_path, "all.tsv", "filename\tonset\toffset\tevent_label\na.wav\t0\t3\tcrow\n"
                                      "a.wav\t3\t6\t\nb.wav\tNaN\tNaN\tNaN\nc.wav\t\t\t\n")
    found = load_annotations(path)
    assert spans(found) == [("a.wav", 0, 3, ("crow",)), ("a.wav", 3, 6, ())]
    assert found.recordings == ["a.wav", "b.wav", "c.wav"]
    path = write(tmp_path, "all.tsv", "filename\tonset\toffset\tevent_label\na.wav\t0\t3\tcrow\n"
                                      "a.wav\t3\t\tcrow\n")
    refused("row 3: offset is ''", data=path)


def test_several_labels_in_a_cell(tmp_path):
    touch(tmp_path, "a.wav")
    path = write(tmp_path, "all.csv", 'file,start,end,labels\na.wav,0,3,"crow,jay"\n'
                                      "a.wav,3,6,crow;owl\n")
    refused_or_read = load_annotations(path).events
    assert refused_or_read[1].labels == ("crow", "owl")


def test_two_columns_of_labels(tmp_path):
    touch(tmp_path, "a.wav")
    path = write(tmp_path, "all.csv", "file,start,end,category,species\na.wav,0,3,bird,crow\n"
                                      "a.wav,3,6,bird,jay\na.wav,6,9,frog,jay\n")
    refused("category", "species", "--label-column", data=path)
    found = load_annotations(path, label_column="species")
    assert [event.labels[0] for event in found.events] == ["crow", "jay", "jay"]
    assert found.sources["label"] == "column species"


def test_genus_and_epithet(tmp_path):
    touch(tmp_path, "a.wav")
    path = write(tmp_path, "all.csv", "file,start,end,genus,species\na.wav,0,3,Corvus,corone\n"
                                      "a.wav,3,6,Pica,pica\n")
    found = load_annotations(path)
    assert [event.labels for event in found.events] == [("Corvus corone",), ("Pica pica",)]


def test_windows_that_predict_has_written(tmp_path):
    touch(tmp_path, "a.wav")
    text = io.StringIO()
    write_window = window_rows(text, SimpleNamespace(path="a.wav"))
    for start, label in ((0.0, "=crow"), (1 / 3, "'Apapane"), (2.0, "a, b")):
        write_window(start, start + 1.0, [(label, "0.9")])
    write_window(4.0, 5.0, [])
    path = write(tmp_path, "windows.csv", "path,start,end,label,score\n" + text.getvalue())
    assert spans(load_annotations(path)) == [
        ("a.wav", 0, 1, ("=crow",)), ("a.wav", 0.333, 1.333, ("'Apapane",)),
        ("a.wav", 2, 3, ("a, b",)), ("a.wav", 4, 5, ())]


def test_label_column_other_than_label(tmp_path):
    touch(tmp_path, "a.wav")
    path = write(tmp_path, "all.csv", "file,start,end,label,call\na.wav,0,3,crow,caw\n")
    assert load_annotations(path).events[0].labels == ("crow",)
    assert load_annotations(path, label_column="Call").events[0].labels == ("caw",)


@pytest.mark.parametrize("text, problem", [
    ("file,label\na.wav,crow\n", "has no times of events"),
    ("file,crow,jay\na.wav,0,1\n", "has a column per class, but no times of events"),
    ("slice_file_name,fsID,start,end,class\na.wav,7,60,64,crow\n", "has no times of events"),
    ("file,start,label\na.wav,0,crow\n", "no column of the event's end"),
    ("file,start_sample,end_sample,label\na.wav,0,16000,crow\n", "has times in sample"),
    ("file,start,end,label\na.wav,3,0,crow\n", "row 2: the event ends at 0 s, before its start"),
    ("file,start,end,label\na.wav,0,86401,crow\n", "row 2: end is 86401 s, which is beyond a day"),
    ("file,start,duration,label\na.wav,86000,800,crow\n", "row 2: the event ends at 86800 s"),
    ("file,start,end,label\n,0,3,crow\na.wav,0,3,crow\n", "row 2: file is empty; name the"),
    ("file,start,end,low_freq,label\na.wav,0,3,deep,crow\n", "row 2: low_freq is 'deep'"),
    ("file,start,end,label\nx/a.wav,0,3,crow\nx/q.wav,0,3,crow\n", "x/q.wav of all.csv"),
    ("file,start,end,label\n", "has no rows"),
    ("file,start,end,label\na.wav,0,3\n", "no label column with anything in it"),
])
def test_a_table_that_is_refused(tmp_path, text, problem):
    touch(tmp_path, "a.wav")
    refused("all.csv", problem, data=write(tmp_path, "all.csv", text))


# --- a column per class

@pytest.mark.parametrize("yes, no", [("1", "0"), ("True", "False"), ("1.0", "0.0")])
def test_one_hot_table(tmp_path, yes, no):
    touch(tmp_path, "a.wav", "b.wav")
    header = "file,start_time,end_time,low_f,Crow,Blue jay,owl\n"
    rows = [["a.wav", "0.0", "1.0", "100", yes, yes, no],
            ["a.wav", "1.0", "2.0", "100", no, no, no],
            ["b.wav", "0.0", "1.0", "100", no, yes, no]]
    path = write(tmp_path, "labels.csv", header + "\n".join(map(",".join, rows)) + "\n")
    assert is_annotated(path) and is_annotated(tmp_path)
    found = load_annotations(path)
    assert spans(found) == [("a.wav", 0, 1, ("Crow", "Blue jay")), ("a.wav", 1, 2, ()),
                            ("b.wav", 0, 1, ("Blue jay",))]
    assert found.events[0].low == 100
    assert found.sources["label"] == "3 columns of 0 and 1: Crow, Blue jay, owl"
    refused("--label-column is for", data=path, label_column="owl")


@pytest.mark.parametrize("cell", ["", "nan", "0.5"])
def test_a_cell_that_is_neither_0_nor_1(tmp_path, cell):
    touch(tmp_path, "a.wav")
    path = write(tmp_path, "labels.csv", "file,start_time,end_time,crow,jay\na.wav,0,1,1,0\n"
                                         f"a.wav,1,2,{cell},0\n")
    refused(f"row 3: crow is {cell!r}; make it 0 or 1", data=path)


def test_has_bird(tmp_path):
    touch(tmp_path, "wav/64760.wav", "wav/16103.wav")
    path = write(tmp_path, "ff.csv", "itemid,datasetid,hasbird\n64760,ff1010,1\n16103,ff1010,0\n")
    assert is_annotated(path)
    found = load_annotations(path)
    assert [event[0::3] for event in found.events] == [("wav/16103.wav", ()),
                                                       ("wav/64760.wav", ("bird",))]
    assert all(event.start == 0 and math.isnan(event.end) for event in found.events)
    assert any("each row is about a whole recording" in note for note in found.notes)


def test_control_clips_with_a_split_are_no_one_hot_table(tmp_path):
    path = write(tmp_path, "clips.csv", "file,start,end,is_test,train\na.wav,0,1,0,1\n"
                                        "b.wav,0,1,1,0\n")
    assert not is_annotated(path)


def test_audio_beside_the_tables_folder(tmp_path):
    touch(tmp_path, "audio/a.wav", "audio/b.wav")
    path = write(tmp_path, "meta/all.csv", TABLES["plain"])
    assert load_annotations(path).root == tmp_path / "audio"
    assert spans(load_annotations(path, audio_dir=tmp_path)) == [
        (f"audio/{name}", *rest) for name, *rest in AB]
    refused("--audio-dir", "no such folder", data=path, audio_dir=tmp_path / "none")
