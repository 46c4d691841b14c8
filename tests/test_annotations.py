"""Annotated recordings: selection tables, label tracks, and how recordings are found."""
import csv
import io
import math
import os
import random
import time

import pytest
from recordings import touch

from data.annotations import explain_annotated, is_annotated, load_annotations
from data.manifest import DataError
from data.stream import safe_name
from report.tracks import label_track, selection_table

RAVEN = "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)"
NAN = math.nan


def raven(*rows, columns="Species", newline="\n"):
    """A selection table of rows such as "1.5 2.5 crow", which are given tabs for blanks."""
    lines = [f"{RAVEN}\t{columns}"]
    for i, row in enumerate(rows, 1):
        start, end, *rest = row.split(" ")
        band = ["100.0", "8000.0"]
        lines.append("\t".join([str(i), "Spectrogram 1", "1", start, end, *band, *rest]))
    return newline.join(lines) + newline


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def spans(annotations):
    """[(path, start, end, labels)] of the events."""
    return [tuple(event[:4]) for event in annotations.events]


def refused(*parts, data, **options):
    """Assert that loading fails with one line that has these parts."""
    with pytest.raises(DataError) as error:
        load_annotations(data, **options)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# --- Raven

@pytest.mark.parametrize("name", ["a.Table.1.selections.txt", "a.selections.txt",
                                  "a.wav.Table.1.selections.txt", "A.Table 2.selections.txt"])
@pytest.mark.parametrize("newline, bom", [("\n", ""), ("\r\n", "\ufeff")])
def test_selection_table_beside_its_recording(tmp_path, name, newline, bom):
    touch(tmp_path, "a.wav", "b.wav")
    write(tmp_path, name, bom + raven("1.5 2.5 crow", "0.25 0.75 jay", newline=newline))
    assert is_annotated(tmp_path)
    found = load_annotations(tmp_path)
    assert found.root == tmp_path and found.name == tmp_path.name
    assert found.events == [("a.wav", 0.25, 0.75, ("jay",), 100.0, 8000.0),
                            ("a.wav", 1.5, 2.5, ("crow",), 100.0, 8000.0)]
    assert found.recordings == ["a.wav"] and found.unlisted == ["b.wav"]
    assert found.sources["label"] == "column Species"
    assert any("1 recording without annotations, not used: b.wav" in note for note in found.notes)


def test_tables_in_a_folder_of_their_own(tmp_path):
    touch(tmp_path, "audio/site1/a.wav", "audio/site2/a.wav")
    write(tmp_path, "tables/site1/a.selections.txt", raven("1 2 crow"))
    write(tmp_path, "tables/site2/a.selections.txt", raven("3 4 jay"))
    expected = [("site1/a.wav", 1, 2, ("crow",)), ("site2/a.wav", 3, 4, ("jay",))]
    found = load_annotations(tmp_path)
    assert spans(found) == [(f"audio/{path}", *rest) for path, *rest in expected]
    found = load_annotations(tmp_path / "tables", audio_dir=tmp_path / "audio")
    assert spans(found) == expected
    refused("no recording in", "--audio-dir", data=tmp_path / "tables")


def test_rows_doubled_by_view_count_once(tmp_path):
    touch(tmp_path, "a.wav")
    text = raven("1 2 crow", "1 2 crow", "3 4 ", "3 4 jay", "5 6 jay")
    lines = text.split("\n")
    for i, (selection, view) in enumerate([("1", "Waveform 1"), ("1", "Spectrogram 1"),
                                           ("2", "Waveform 1"), ("2", "Spectrogram 1"),
                                           ("3", "Waveform 1")], 1):
        lines[i] = "\t".join([selection, view, *lines[i].split("\t")[2:]])
    write(tmp_path, "a.selections.txt", "\n".join(lines))
    found = load_annotations(tmp_path)
    assert spans(found) == [("a.wav", 1, 2, ("crow",)), ("a.wav", 3, 4, ("jay",)),
                            ("a.wav", 5, 6, ("jay",))]
    assert any("2 rows that Raven doubled by View" in note for note in found.notes)


def test_decimal_commas(tmp_path):
    touch(tmp_path, "a.wav")
    write(tmp_path, "a.selections.txt", raven("1,5 2,25 crow").replace("100.0", "100,5"))
    assert load_annotations(tmp_path).events == [("a.wav", 1.5, 2.25, ("crow",), 100.5, 8000.0)]


def test_an_empty_table_says_that_nothing_is_there(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    write(tmp_path, "a.selections.txt", raven())
    write(tmp_path, "b.selections.txt", raven("1 2 crow"))
    found = load_annotations(tmp_path)
    assert found.recordings == ["a.wav", "b.wav"] and found.unlisted == ["c.wav"]
    assert [event.path for event in found.events] == ["b.wav"]


@pytest.mark.parametrize("column", ["Species", "Annotation", "Label", "Common Name", "Sound type",
                                    "Call", "Tag 1"])
def test_the_column_of_labels_is_found_and_said(tmp_path, column):
    touch(tmp_path, "a.wav")
    columns = f"Delta Time (s)\tPeak Freq Contour (Hz)\tNotes\tBegin Clock Time\t{column}"
    row = "1 2 1.0 440.0;441.0 loud 06:00:01.2 crow"
    write(tmp_path, "a.selections.txt", raven(row, columns=columns))
    found = load_annotations(tmp_path)
    assert found.events[0].labels == ("crow",)
    assert f"labels are from column {column}" in found.notes


def test_two_columns_that_may_be_the_label(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    rows = "1 2 crow song", "3 4 crow call", "5 6 jay call"
    write(tmp_path, "a.selections.txt", raven(*rows, columns="Species\tSound type"))
    write(tmp_path, "b.selections.txt", raven("1 2 crow", columns="Species"))
    refused("a.selections.txt", "Species", "Sound type", "--label-column", data=tmp_path)
    chosen = load_annotations(tmp_path, label_column="species")
    assert [event.labels[0] for event in chosen.events] == ["crow", "crow", "jay", "crow"]
    refused("--label-column Sound type", "b.selections.txt", data=tmp_path,
            label_column="Sound type")
    (tmp_path / "b.selections.txt").unlink()
    other = load_annotations(tmp_path, label_column="Sound type")
    assert [event.labels[0] for event in other.events] == ["song", "call", "call"]
    refused("--label-column Kind", "Sound type", data=tmp_path, label_column="Kind")


def test_a_code_beside_the_name_is_no_second_label(tmp_path):
    touch(tmp_path, "a.wav")
    rows = "1 2 crow amecro Bird", "3 4 jay blujay Bird", "5 6 crow amecro Bird"
    write(tmp_path, "a.selections.txt", raven(*rows, columns="Species\tCode\tGroup of animals"))
    found = load_annotations(tmp_path)
    assert [event.labels[0] for event in found.events] == ["crow", "jay", "crow"]
    assert any("Code" in note for note in found.notes)


def test_one_table_over_many_files(tmp_path):
    touch(tmp_path, "x/a.wav", "x/b.wav")
    columns = "Begin Path\tBegin File\tFile Offset (s)\tSpecies"
    rows = [r"1.1 2.35 D:\data\x\a.wav a.wav 1.1 crow",
            r"100061.2 100062.7 D:\data\x\b.wav b.wav 1.2 jay"]
    path = write(tmp_path, "all.selections.txt", raven(*rows, columns=columns))
    for data in (tmp_path, path):
        found = load_annotations(data)
        assert spans(found) == [("x/a.wav", 1.1, 2.35, ("crow",)), ("x/b.wav", 1.2, 2.7, ("jay",))]
        assert "File Offset" in found.sources["time"]
    without = "\n".join("\t".join(field for i, field in enumerate(line.split("\t")) if i != 9)
                        for line in path.read_text().split("\n"))
    write(tmp_path, "all.selections.txt", without)
    refused("several recordings", "File Offset (s)", data=path)


def test_a_rounded_file_offset_does_not_replace_the_time(tmp_path):
    touch(tmp_path, "a.wav")
    write(tmp_path, "a.selections.txt", raven("1.123456 2.5 a.wav 1.1235 crow",
                                              columns="Begin File\tFile Offset (s)\tSpecies"))
    assert load_annotations(tmp_path).events[0][1:3] == (1.123456, 2.5)


def test_tables_of_birdnet_for_raven(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    columns = "Common Name\tSpecies Code\tConfidence\tBegin Path\tFile Offset (s)"
    rows = ["0 3 Crow\tamecro\t0.9\t/data/a.wav\t0", "3 6 Jay\t????\t0.5\t/data/a.wav\t3",
            "6 9 Robin\t????\t0.5\t/data/a.wav\t6"]
    write(tmp_path, "a.BirdNET.selection.table.txt", raven(*rows, columns=columns))
    write(tmp_path, "b.BirdNET.selection.table.txt",
          raven("0 3 nocall\tnocall\t1.0\t/data/b.wav\t0", columns=columns))
    found = load_annotations(tmp_path)
    assert spans(found) == [("a.wav", 0, 3, ("Crow",)), ("a.wav", 3, 6, ("Jay",)),
                            ("a.wav", 6, 9, ("Robin",)), ("b.wav", 0, 3, ())]


@pytest.mark.parametrize("row, problem", [
    ("1 x crow", "row 3: End Time (s) is 'x'; make it a time"),
    ("2 1 crow", "row 3: the event ends at 1 s, before its start at 2 s"),
    ("1 90000 crow", "row 3: End Time (s) is 90000 s, which is beyond a day"),
    ("-1 2 crow", "row 3: Begin Time (s) is '-1'; make it a time from 0 up"),
    ("nan 2 crow", "row 3: Begin Time (s) is 'nan'"),
    ("inf inf crow", "row 3: Begin Time (s) is inf s, which is beyond a day"),
    ("1_0 20 crow", "row 3: Begin Time (s) is '1_0'"),
    ("06:00:01 06:00:02 crow", "row 3: Begin Time (s) is '06:00:01'; make it a time from 0 up, "
     "such as 1.5; a time of day is no time in the recording"),
    ("1 2 ", "row 3: Species is empty; name what is there"),
    ("1 2 NA", "row 3: Species is 'NA', which stands for a missing value"),
    ("1 2 a\tb", "row 3: 9 fields under a header of 8"),
])
def test_a_bad_row_is_named(tmp_path, row, problem):
    touch(tmp_path, "a.wav")
    write(tmp_path, "a.selections.txt", raven("0 1 crow", row))
    refused(f"{tmp_path}/a.selections.txt {problem}", data=tmp_path)


def test_a_column_of_labels_that_occurs_twice(tmp_path):
    touch(tmp_path, "a.wav")
    write(tmp_path, "a.selections.txt", raven("1 2 crow jay", columns="Species\tSpecies"))
    refused("a.selections.txt: the column Species occurs twice", data=tmp_path)


def test_a_table_without_a_column_of_labels(tmp_path):
    touch(tmp_path, "a.wav")
    write(tmp_path, "a.selections.txt", raven("0 1 1.0", columns="Delta Time (s)"))
    refused("a.selections.txt has no column of labels", "--label-column", data=tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_encodings(tmp_path, encoding):
    touch(tmp_path, "a.wav")
    bom = "\ufeff" if encoding == "utf-16-le" else ""
    write(tmp_path, "a.selections.txt", bom + raven("1 2 Möwe"), encoding)
    found = load_annotations(tmp_path)
    assert found.events[0].labels == ("Möwe",)
    assert any("Windows-1252" in note for note in found.notes) == (encoding == "latin-1")


# --- which recording

def test_a_recording_that_was_renamed_with_its_table(tmp_path):
    touch(tmp_path, "b.wav")
    write(tmp_path, "b.selections.txt", raven("1 2 old.wav crow", columns="Begin File\tSpecies"))
    found = load_annotations(tmp_path)
    assert found.recordings == ["b.wav"]
    assert any("old.wav as b.wav" in note for note in found.notes)


def test_a_table_without_a_recording(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    for name in ("a", "b", "c"):
        write(tmp_path, f"{name}.selections.txt", raven("1 2 crow"))
    found = load_annotations(tmp_path)
    assert found.recordings == ["a.wav", "b.wav"]
    assert any("missing: 1 recording" in note and "c.selections.txt" in note
               for note in found.notes)
    (tmp_path / "b.wav").unlink()
    refused("no recording in", "c.selections.txt", "--audio-dir", data=tmp_path)


def test_a_table_that_may_belong_to_two_recordings(tmp_path):
    touch(tmp_path, "a.wav", "a.flac")
    write(tmp_path, "a.selections.txt", raven("1 2 crow"))
    refused("a.selections.txt may belong to", "a.flac", "a.wav", data=tmp_path)
    (tmp_path / "a.selections.txt").rename(tmp_path / "a.flac.selections.txt")
    assert load_annotations(tmp_path).recordings == ["a.flac"]


def test_a_name_that_lies_in_two_folders(tmp_path):
    touch(tmp_path, "x/1.wav", "y/1.wav")
    columns = "Begin File\tFile Offset (s)\tSpecies"
    write(tmp_path, "all.selections.txt", raven("1 2 1.wav 1 crow", columns=columns))
    refused("1.wav may be", "x/1.wav", "y/1.wav", data=tmp_path)


def test_a_table_named_after_one_recording_with_rows_of_another(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    write(tmp_path, "a.selections.txt", raven("1 2 b.wav crow", columns="Begin File\tSpecies"))
    refused("a.selections.txt is named after a.wav, but its rows name b.wav", data=tmp_path)


def test_a_table_beside_its_recording_needs_no_folder(tmp_path):
    touch(tmp_path, "x/1.wav", "y/1.wav", "y/1.flac")
    columns = "Begin Path\tSpecies"
    write(tmp_path, "x/1.selections.txt", raven("1 2 D:\\card\\1.wav crow", columns=columns))
    write(tmp_path, "y/1.Table.1.selections.txt", raven("3 4 1.flac jay", columns=columns))
    assert spans(load_annotations(tmp_path)) == [("x/1.wav", 1, 2, ("crow",)),
                                                 ("y/1.flac", 3, 4, ("jay",))]


def test_two_sites_are_not_taken_for_one(tmp_path):
    touch(tmp_path, "site2/1.wav")
    columns = "Begin Path\tFile Offset (s)\tSpecies"
    write(tmp_path, "all.selections.txt", raven("1 2 E:\\site1\\1.wav 1 crow",
                                                "61 62 E:\\site2\\1.wav 1 jay", columns=columns))
    refused("site1", "site2", "would both be site2/1.wav", data=tmp_path)


def test_two_tables_of_one_recording(tmp_path):
    touch(tmp_path, "a.wav")
    write(tmp_path, "a.Table.1.selections.txt", raven("1 2 crow"))
    write(tmp_path, "a.Table.2.selections.txt", raven("1 2 crow", "1 2 jay"))
    found = load_annotations(tmp_path)
    assert spans(found) == [("a.wav", 1, 2, ("crow",)), ("a.wav", 1, 2, ("jay",))]
    assert any("1 repeated row" in note for note in found.notes)
    write(tmp_path, "a.txt", "1.0\t2.0\tcrow\n")
    refused("a.wav is annotated in", "a.txt", "selections.txt", data=tmp_path)


def test_equal_tables_in_two_folders(tmp_path):
    touch(tmp_path, "site2/1.wav")
    write(tmp_path, "site1/1.selections.txt", raven("1 2 crow"))
    write(tmp_path, "site2/1.selections.txt", raven("3 4 jay"))
    refused("site2/1.wav is annotated in", "site1/1.selections.txt", data=tmp_path)


def test_a_person_and_birdnet(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    columns = "Common Name\tSpecies Code\tConfidence"
    write(tmp_path, "a.Table.1.selections.txt", raven("1 2 Crow", columns="Common Name"))
    write(tmp_path, "a.BirdNET.selection.table.txt", raven("1 2 Jay\tblujay\t0.7", columns=columns))
    refused("a.wav is annotated in", "BirdNET", data=tmp_path)


def test_forms_side_by_side(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    write(tmp_path, "a.selections.txt", raven("1 2 crow"))
    write(tmp_path, "b.txt", "1.0\t2.0\tjay\n")
    found = load_annotations(tmp_path)
    assert spans(found) == [("a.wav", 1, 2, ("crow",)), ("b.wav", 1, 2, ("jay",))]
    assert found.sources["label"] == "column Species; column 3 of the label tracks"
    write(tmp_path, "b.txt", "start\tend\tSpecies\n1.0\t2.0\tjay\n")
    assert load_annotations(tmp_path).sources["label"] == "column Species"
    write(tmp_path, "b.txt", "1.0\t2.0\tjay\n")
    assert "annotations: 1 Raven selection table, 1 Audacity label track" in found.notes


def test_other_files_are_said(tmp_path):
    touch(tmp_path, "a.wav")
    os.mkfifo(tmp_path / "pipe.csv")
    write(tmp_path, "._a.selections.txt", b"\0\1")
    write(tmp_path, "a.selections.txt", raven("1 2 crow"))
    write(tmp_path, "README.txt", "Recordings of 2024, made by hand.\n")
    write(tmp_path, "binary.txt", b"\0\1\2")
    notes = load_annotations(tmp_path).notes
    assert any("README.txt, binary.txt, pipe.csv" in note for note in notes)


# --- Audacity

def test_label_track(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    write(tmp_path, "a.txt", "1,500000\t2,250000\tcrow\r\n\\\t1200,5\t3000\r\n"
                             "4.0\t4.0\tblue jay\r\n\\\t-1.0\t-1.0\r\n")
    write(tmp_path, "b_labels.txt", "")
    assert is_annotated(tmp_path)
    found = load_annotations(tmp_path)
    expected = [("a.wav", 1.5, 2.25, ("crow",), 1200.5, 3000.0),
                ("a.wav", 4.0, 4.0, ("blue jay",), NAN, NAN)]
    assert [str(tuple(event)) for event in found.events] == [str(event) for event in expected]
    assert found.recordings == ["a.wav", "b.wav"] and found.unlisted == ["c.wav"]
    assert found.sources["label"] == "column 3 of the label tracks"
    refused("no names of columns", data=tmp_path, label_column="Species")


@pytest.mark.parametrize("line, problem", [
    ("1.0\t2.0", "label is empty"), ("1.0\tx\ty", "end is 'x'"),
    ("3.0\t2.0\tcrow", "ends at 2 s, before"), ("1.0\t2.0\tcrow\tloud", "4 fields"),
    ("\\\t1000", "two frequencies"),
])
def test_a_bad_line_of_a_label_track(tmp_path, line, problem):
    touch(tmp_path, "a.wav")
    write(tmp_path, "a.txt", "0.5\t0.75\tcrow\n1.0\t1.5\tjay\n1.0\t1.5\tcrow\n" + line + "\n")
    refused("a.txt", " 4", problem, data=tmp_path)


def test_label_tracks_of_the_whole_folder_or_elsewhere(tmp_path):
    touch(tmp_path, "audio/a.wav")
    track = write(tmp_path, "tracks/a.txt", "1.0\t2.0\tcrow\n")
    assert is_annotated(tmp_path) and is_annotated(tmp_path / "tracks") and is_annotated(track)
    found = load_annotations(track, audio_dir=tmp_path / "audio")
    assert spans(found) == [("a.wav", 1, 2, ("crow",))]
    write(tmp_path, "tracks/a.txt", "1.0\t2.0\n")  # nobody has named the event
    refused("in no form of annotations that is known", data=track)


def test_control_numbers_are_no_label_track(tmp_path):
    touch(tmp_path, "x/a.wav", "y/b.wav")
    write(tmp_path, "x/a.txt", "0.1\t220.5\t0.93\n0.2\t221.5\t0.95\n")
    write(tmp_path, "y/notes.txt", "1\t2\tnot about a recording\n")
    assert not is_annotated(tmp_path)


# --- what predict.py writes

def test_predictions_are_read_back_as_they_were_written(tmp_path):
    rng = random.Random(1)
    classes = ["crow", "Blue Jay", "Möwe", "dog, barking", "7", "it's \"loud\"", "a (b)"]
    expected = {"raven": [], "audacity": []}
    for number in range(40):
        name = f"rec {number}.wav"
        touch(tmp_path / "audio", name)
        own = {"raven": io.StringIO(), "audacity": io.StringIO()}
        writers = {"raven": selection_table(own["raven"], 20.0, 8000.0),
                   "audacity": label_track(own["audacity"])}
        start = 0.0
        for _ in range(rng.randrange(1, 30)):
            start += rng.choice([0.0, 1 / 3, 2.0, 0.1, rng.random()])
            labels = [(label, f"{rng.random():.6f}")
                      for label in rng.sample(classes, rng.randrange(3))]
            for form, write_window in writers.items():
                write_window(start, start + 4 / 3, labels)
                expected[form] += [(name, f"{start:.6f}", f"{start + 4 / 3:.6f}", label)
                                   for label, _ in labels]
        write(tmp_path, f"raven/{name}.Table.1.selections.txt", own["raven"].getvalue())
        write(tmp_path, f"audacity/{name}.txt", own["audacity"].getvalue())
    for form, rows in expected.items():
        found = load_annotations(tmp_path / form, audio_dir=tmp_path / "audio")
        wanted = {(name, float(start), float(end), (label,)) for name, start, end, label in rows}
        assert len(wanted) > 500 and spans(found) == sorted(wanted)
        assert {f"{event.start:.6f}" for event in found.events} == {row[1] for row in rows}
        assert len(found.recordings) == 40 and found.unlisted == []


def test_a_name_that_predict_changed(tmp_path):
    touch(tmp_path, "a?b.wav", "c.wav")
    name = f"{safe_name('a?b.wav')}.Table.1.selections.txt"
    assert "?" not in name
    write(tmp_path, f"raven/{name}", raven("1 2 crow"))
    assert load_annotations(tmp_path).recordings == ["a?b.wav"]


# --- the front door

def test_folders_and_tables_of_clips_are_not_annotated(tmp_path):
    touch(tmp_path, "crow/a.wav", "jay/b.wav")
    table = write(tmp_path, "clips.csv", "path,start,end,label\ncrow/a.wav,0,1,crow\n")
    assert not is_annotated(tmp_path) and not is_annotated(table)
    assert not is_annotated(tmp_path / "none") and not is_annotated(tmp_path / "crow" / "a.wav")
    assert is_annotated(table, asked=True)
    assert not is_annotated(tmp_path / "crow", asked=True)


def test_the_two_meanings_are_explained_in_one_line():
    line = explain_annotated()
    assert "\n" not in line and "--annotated all" in line and "--annotated parts" in line


def test_many_tables_load_fast(tmp_path):
    n = 220  # a tenth of a season
    for i in range(n):
        touch(tmp_path, f"{i}.wav")
        write(tmp_path, f"{i}.selections.txt",
              raven(*(f"{row}.25 {row + 1}.5 sp{row % 7}" for row in range(100))))
    began = time.process_time()
    found = load_annotations(tmp_path)
    assert len(found.events) == 100 * n
    assert time.process_time() - began < 5 / 2200 * n * 2  # twice, for a busy machine


def test_control_csv_module_agrees(tmp_path):
    """The fast reader of tables with tabs gives what the csv module gives."""
    touch(tmp_path, "a.wav")
    path = write(tmp_path, "a.selections.txt", raven("1.5 2.5 crow", "3 4 jay"))
    rows = list(csv.DictReader(path.open(), delimiter="\t"))
    found = load_annotations(tmp_path)
    assert [(float(row["Begin Time (s)"]), row["Species"]) for row in rows] == [
        (event.start, event.labels[0]) for event in found.events]
