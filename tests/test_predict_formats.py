"""The formats of predict.py agree with each other and hold names of any kind."""
import csv
import json
import os
import re
from typing import NamedTuple

import pytest
import soundfile as sf
from conftest import tone
from predict_runs import rows, run, train_tiny, with_parts, write_recordings

ALL_FORMATS = ["--format", "csv,jsonl,raven,audacity"]
RAVEN_COLUMNS = ["Selection", "View", "Channel", "Begin Time (s)", "End Time (s)",
                 "Low Freq (Hz)", "High Freq (Hz)", "Label", "Score"]
MS = 6e-4  # seconds are rounded to 0.001 in windows.csv


@pytest.fixture(scope="module")
def ckpt(tones, tmp_path_factory):
    return train_tiny(tones, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("recordings"))


class Label(NamedTuple):
    """A window and one of its classes, as in windows.csv; label and score may be empty."""
    path: str
    start: float
    end: float
    label: str
    score: str


@pytest.fixture(scope="module")
def all_formats(ckpt, recordings, tmp_path_factory):
    """(folder of the results, the Labels of its windows.csv)."""
    out = tmp_path_factory.mktemp("formats") / "p"
    uncalibrated = with_parts(ckpt, out.with_name("uncalibrated.pt"), calibration=None)
    run(uncalibrated, out, recordings, *ALL_FORMATS, "--threshold", 0.4, "--top-k", 2)
    table = [Label(row["path"], float(row["start"]), float(row["end"]), row["label"], row["score"])
             for row in rows(out / "windows.csv")]
    assert any(row.label == "" for row in table)
    assert any(row.label != "" for row in table)
    return out, table


def labels_by_path(table):
    """{path: Labels of its windows that have one}."""
    return {path: [row for row in table if row.path == path and row.label]
            for path in sorted({row.path for row in table})}


def test_jsonl_agrees_with_csv(all_formats):
    out, table = all_formats
    labels = []
    for line in (out / "windows.jsonl").read_text(encoding="utf-8").splitlines():
        window = json.loads(line)
        span = window["path"], window["start"], window["end"]
        labels += [Label(*span, label["label"], f"{label['score']:.6f}")
                   for label in window["labels"]]
        if not window["labels"]:
            labels.append(Label(*span, "", ""))
    assert labels == table


def test_raven_tables_agree_with_csv(all_formats, recordings):
    out, table = all_formats
    for path, labels in labels_by_path(table).items():
        name = f"{os.path.relpath(path, recordings)}.Table.1.selections.txt"
        with open(out / "raven" / name, newline="", encoding="utf-8") as file:
            head, *selections = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        assert head == RAVEN_COLUMNS
        assert [int(row[0]) for row in selections] == list(range(1, len(labels) + 1))
        highest_hz = min(11025, sf.info(path).samplerate / 2)
        for row, expected in zip(selections, labels, strict=True):
            assert row[1:3] == ["Spectrogram 1", "1"]
            assert [float(value) for value in row[3:7]] == [
                pytest.approx(expected.start, abs=MS), pytest.approx(expected.end, abs=MS),
                0, highest_hz]
            assert row[7:] == [expected.label, expected.score]


def test_audacity_tracks_agree_with_csv(all_formats, recordings):
    out, table = all_formats
    for path, labels in labels_by_path(table).items():
        track = (out / "audacity" / f"{os.path.relpath(path, recordings)}.txt").read_text()
        for line, expected in zip(track.splitlines(), labels, strict=True):
            assert re.fullmatch(r"\d+\.\d{6}\t\d+\.\d{6}\t[a-z]+", line)
            start, end, label = line.split("\t")
            assert float(start) == pytest.approx(expected.start, abs=MS)
            assert float(end) == pytest.approx(expected.end, abs=MS)
            assert label == expected.label


def test_unusual_names_of_files_and_classes_break_no_format(ckpt, tmp_path):
    """Not UTF-8, with tabs, line breaks and quotes, of equal stems; a class like more columns."""
    classes = ['a\tb\n3\t"x', "=1+1, 2", "käfer"]
    unusual = with_parts(ckpt, tmp_path / "unusual.pt", classes=classes)
    names = [os.fsdecode(b"caf\xe9.wav"), "two\nlines.wav", 'tab\t"quoted", x.wav', "same.wav",
             "same.flac", "deep/same.wav"]
    (tmp_path / "r" / "deep").mkdir(parents=True)
    for i, name in enumerate(names):
        plain_name = tmp_path / ("x" + os.path.splitext(name)[1])
        sf.write(plain_name, tone(1, hz=300 + 900 * i), 16000)
        os.rename(plain_name, tmp_path / "r" / name)
    out = tmp_path / "p"
    run(unusual, out, tmp_path / "r", *ALL_FORMATS, "--threshold", 0, "--top-k", 3,
        "--embeddings")
    paths = {str(tmp_path / "r" / name) for name in names}
    lines = (out / "windows.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["path"] for line in lines} == paths
    for table in ("windows.csv", "files.csv"):
        assert {row["path"] for row in rows(out / table)} == paths
        assert {row["label"] for row in rows(out / table)} == set(classes)
    for folder, n_columns in (("raven", 9), ("audacity", 3), ("embeddings", None)):
        files = [path for path in (out / folder).rglob("*") if path.is_file()]
        assert len(files) == len(names)
        for path in files:
            str(path).encode()  # raises if the name is not UTF-8
            assert str(path).isprintable()
            if n_columns:
                lines = path.read_text(encoding="utf-8").splitlines()
                assert {line.count("\t") + 1 for line in lines} == {n_columns}
