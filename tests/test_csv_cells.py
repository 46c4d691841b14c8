"""Names that a spreadsheet would run as formulas: escaped in every CSV, and read back as they were.

Columns are read here with Python's own csv module.
"""
import csv
import re

import numpy as np
import pytest
import soundfile as sf
from conftest import tone
from recordings import make_manifest

import evaluate
import predict
from core.run.checkpoint import load_checkpoint
from core.run.log import CsvLog
from data.load import load_manifest
from data.scan import write_bad_files
from data.splits import split_hash, write_split
from report.run_files import read_columns, read_rows
from tests.faults.harness import exit_code, program, without_pictures
from util import CsvWriter, csv_rows, escape_cell, unescape_cell

STARTS = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"  # the characters that OWASP names for "CSV injection"
HOSTILE = ["=1+1", "+SUM(A1)", "-2+3", "@cmd", "-name", "'=quoted", "''-twice", "'Apapane", "'",
           "=", "-", "\uff1d1", "plain", "-inf-", "--1", "+-1", "1-2", "-1_0", "\u22121"]
NUMBERS = ["-0.5", "+3", "-1e-05", "-.5", "-7.", "1.5", "-inf", "nan", "-nan"]


def is_number(cell):
    try:
        float(cell)
    except ValueError:
        return False
    return True


def formulas(path):
    """The cells of a CSV that a spreadsheet would take for a formula."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [cell for row in csv.reader(file) for cell in row
                if cell[:1] in STARTS and cell and not is_number(cell)]


def random_names(n, seed=0):
    rng = np.random.default_rng(seed)
    letters = list(STARTS + "''''ab10.e,;\" \udcff")
    return ["".join(rng.choice(letters, rng.integers(0, 7))) for _ in range(n)]


def test_any_text_survives_and_is_no_formula(tmp_path):
    texts = HOSTILE + NUMBERS + random_names(20_000)
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8",
              errors="surrogateescape") as file:
        writer = CsvWriter(file)
        writer.writerow(["a", "b"])
        writer.writerows([text, escape_cell(text)] for text in texts)
    assert formulas(tmp_path / "x.csv") == []
    with open(tmp_path / "x.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        pairs = [(row["a"], unescape_cell(row["b"])) for row in csv_rows(file)]
    assert pairs == list(zip(texts, texts, strict=True))


def test_control_a_plain_writer_leaves_formulas(tmp_path):
    with open(tmp_path / "x.csv", "w", newline="") as file:
        csv.writer(file).writerows([name] for name in HOSTILE)
    assert len(formulas(tmp_path / "x.csv")) > 5


@pytest.mark.parametrize("value", [None, -0.5, -3, np.float32(-0.5), np.int64(-2), -np.inf,
                                   *NUMBERS, "'Apapane", "plain", "", "1-2"])
def test_numbers_and_harmless_text_are_not_touched(value):
    assert escape_cell(value) is value or escape_cell(value) == value


def test_data_survive_split_csv(tmp_path):
    classes = [name for name in HOSTILE if re.sub("[-_ ]", "", name)]
    paths = [f"{name}{i}/{name}.wav" for i, name in enumerate([*HOSTILE, " =x", "\t=x"])]
    labels = [classes[i % len(classes)] for i in range(len(paths))]
    manifest = make_manifest(labels, paths=paths, split=[0] * len(paths))
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    write_split(manifest, tmp_path / "split.csv")
    assert formulas(tmp_path / "split.csv") == []
    assert split_hash(load_manifest(tmp_path / "split.csv")) == split_hash(manifest)


def test_several_labels_survive_split_csv(tmp_path):
    manifest = make_manifest(["-a", "=b", "@c", "'-d"])
    (tmp_path / "x").mkdir()
    manifest.split[:] = 0
    sets = [((0, 1), (2,)), ((1,), (0, 3)), ((3,), ()), ((2, 3), ())]
    manifest = manifest.with_label_sets(sets)
    for path in manifest.paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    write_split(manifest, tmp_path / "split.csv")
    assert formulas(tmp_path / "split.csv") == []
    assert split_hash(load_manifest(tmp_path / "split.csv")) == split_hash(manifest)


def test_a_label_that_begins_with_a_hyphen_can_be_given_either_way(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.wav").touch()
    (tmp_path / "t.csv").write_text("path,label\na.wav,-name\nb.wav,'-name\nc.wav,name2\n"
                                    "d.wav,'Apapane\n")
    manifest = load_manifest(tmp_path / "t.csv")
    assert manifest.classes == ["'Apapane", "-name", "name2"]


def test_bad_files_and_events(tmp_path):
    bad = [(name, f"{name} is broken") for name in HOSTILE]
    write_bad_files(bad, tmp_path / "bad_files.csv")
    assert formulas(tmp_path / "bad_files.csv") == []
    assert [tuple(row.values()) for row in read_rows(tmp_path / "bad_files.csv")] == bad


def test_a_log_that_is_continued_keeps_its_cells(tmp_path):
    for _ in range(3):
        log = CsvLog(tmp_path / "log.csv", ["step", "loss", "detail"], last=2)
        for step in {1, 2} if log.file.tell() < 20 else ():
            log.append(step=step, loss=-0.25, detail=["=1+1", "'-x"][step - 1])
        log.file.close()
    assert [row["detail"] for row in read_rows(tmp_path / "log.csv")] == ["=1+1", "'-x"]
    assert formulas(tmp_path / "log.csv") == []
    numbers = CsvLog(tmp_path / "numbers.csv", ["step", "loss"])
    numbers.append(step=1, loss=-np.inf)
    numbers = CsvLog(tmp_path / "numbers.csv", ["step", "loss"], last=1)
    numbers.append(step=2, loss=-1e-5)
    assert read_columns(tmp_path / "numbers.csv")["loss"].tolist() == [-np.inf, -1e-5]


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """A folder with data of hostile names (data/) and a run of them (run/)."""
    folder = tmp_path_factory.mktemp("hostile")
    for c, name in enumerate(("=1+1", "-name", "'@x")):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(12):
            path = folder / "data" / name / f"{'=+-@'[i % 4]}{i}{name}.wav"
            plain = folder / "plain.wav"
            sf.write(plain, tone(1.0, hz=300 * 3**c, seed=100 * c + i), 16000)
            plain.rename(path)
    (folder / "data" / "-name" / "-broken.wav").write_bytes(b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert program(patch, folder, data="data") == 0
    return folder


def test_no_cell_of_a_run_is_a_formula(hostile_run, monkeypatch):
    monkeypatch.chdir(hostile_run / "data")
    with without_pictures(monkeypatch):
        assert exit_code(predict.main, "--ckpt", "../run/best.pt", "--out", "../predicted",
                         "--device", "cpu", "--format", "csv,raven,audacity", "--threshold", 0,
                         "--top-k", 3, "=1+1", "./-name", "'@x") == 0
    tables = sorted(hostile_run.rglob("*.csv"))
    assert {path.name for path in tables} >= {
        "predictions.csv", "per_class.csv", "split.csv", "coverage.csv", "bad_files.csv",
        "windows.csv", "files.csv", "classes.csv", "events.csv"}
    assert {path.name: formulas(path) for path in tables if formulas(path)} == {}


def test_results_are_read_back_by_name(hostile_run):
    manifest = load_checkpoint(hostile_run / "run" / "best.pt")["manifest"]
    results = hostile_run / "run" / "test"
    clips = read_rows(results / "predictions.csv")
    assert clips and {row["path"] for row in clips} <= set(manifest["paths"])
    assert {row["label"] for row in clips} == {"=1+1", "-name", "'@x"}
    classes = [row["class"] for row in read_rows(results / "per_class.csv")]
    assert classes == manifest["classes"]


def test_split_csv_of_a_run_is_its_own_data_for_evaluate(hostile_run, monkeypatch):
    monkeypatch.chdir(hostile_run)
    checkpoint = load_checkpoint(hostile_run / "run" / "best.pt")
    _, expected, *_ = evaluate.evaluation_data(checkpoint, None, None, "test")
    _, rows, split, notes = evaluate.evaluation_data(
        checkpoint, str(hostile_run / "run" / "split.csv"), str(hostile_run / "data"), "test")
    assert split == "test" and len(rows) == len(expected), notes


def test_tables_for_raven_and_audacity_have_the_names_as_they_are(hostile_run):
    """These programs show a label as it is in the file, and know no formulas."""
    tables = [path for folder in ("raven", "audacity")
              for path in (hostile_run / "predicted" / folder).rglob("*.txt")]
    text = "\n".join(path.read_text() for path in tables)
    assert "\t-name" in text and "\t'-name" not in text
