"""Whole runs with negatives and with annotated recordings: train, evaluate, predict, export."""
import csv
import json
import shutil

import numpy as np
import onnxruntime
import pytest
import soundfile as sf
from conftest import tone
from harness import TINY, exit_code, outcome, program, stop_at

import evaluate
import export
import predict
from core.run.checkpoint import load_checkpoint
from data.manifest import Manifest
from report import verdict
from report.compare import compare
from report.run_files import read_run

RATE = 16000
AT = TINY.index("--logit-adjust")  # needs a softmax loss
FLAGS = TINY[:AT] + TINY[AT + 2:]


def write_noise(path, seconds, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE))
    sf.write(path, noise, RATE)


@pytest.fixture(scope="module")
def data(tones, tmp_path_factory):
    """The tones and eight recordings of noise, of 9 s each."""
    folder = tmp_path_factory.mktemp("with_noise")
    shutil.copytree(tones, folder / "data")
    for i in range(8):
        write_noise(folder / "data" / "noise" / f"n{i}.wav", 9.0, i)
    return folder / "data"


def run_program(patch, folder, data, *flags, prepare=None):
    return program(patch, folder, "--data", data, *FLAGS, *flags, prepare=prepare)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run with negatives."""
    folder = tmp_path_factory.mktemp("negatives")
    with pytest.MonkeyPatch.context() as patch:
        assert run_program(patch, folder, data) == 0
    return folder / "run"


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_negatives_are_no_class_and_false_alarms_are_counted(run):
    checkpoint = load_checkpoint(run / "best.pt")
    assert checkpoint["classes"] == ["high", "low", "mid"]
    assert checkpoint["loss"]["name"] == "focal-bce"
    manifest = Manifest.from_dict(checkpoint["manifest"])
    test = manifest.rows("test")
    figures = json.loads((run / "test" / "metrics.json").read_text())["false_alarms"]
    hours = manifest.duration[test[manifest.is_negative[test]]].sum() / 3600
    assert figures["hours"] == pytest.approx(float(hours)) and figures["hours"] > 0
    assert {row["label"] for row in read(run / "test" / "predictions.csv")} == {
        "high", "low", "mid", ""}
    assert {row["class"] for row in read(run / "test" / "per_class.csv")} == {"high", "low", "mid"}
    labels = {row["label"] for row in read(run / "split.csv")}
    assert labels == {"high", "low", "mid", ""}


def test_evaluate_gives_the_same_figures_as_the_run(run, tmp_path):
    assert exit_code(evaluate.main, "--ckpt", run / "best.pt", "--out", tmp_path / "out") == 0
    first, second = (json.loads((folder / "metrics.json").read_text())
                     for folder in (run / "test", tmp_path / "out"))
    assert first["false_alarms"] == second["false_alarms"]
    assert first["accuracy"] == second["accuracy"] and first["map"] == second["map"]


def test_evaluate_adds_negatives(run, tmp_path):
    for i in range(3):
        write_noise(tmp_path / "season" / f"{i}.wav", 30.0, 100 + i)
    assert exit_code(evaluate.main, "--ckpt", run / "best.pt", "--negatives", tmp_path / "season",
                     "--out", tmp_path / "out") == 0
    before, after = (json.loads((folder / "metrics.json").read_text())
                     for folder in (run / "test", tmp_path / "out"))
    added = after["false_alarms"]["hours"] - before["false_alarms"]["hours"]
    assert added * 3600 == pytest.approx(90, abs=3)  # less than half a window is left over
    assert after["false_alarms"]["recordings"] == before["false_alarms"]["recordings"] + 3
    assert after["accuracy"] == before["accuracy"] and after["n"] == before["n"]


def test_window_without_any_class_is_reported_as_such(run, data, tmp_path):
    """predict.py reports in the negatives just what evaluate.py calls false alarms."""
    manifest = Manifest.from_dict(load_checkpoint(run / "best.pt")["manifest"])
    test = manifest.rows("test")
    paths = sorted({manifest.paths[row] for row in test[manifest.is_negative[test]]})
    assert exit_code(predict.main, *(data / path for path in paths), "--ckpt", run / "best.pt",
                     "--out", tmp_path / "out", "--amp", "off") == 0
    rows = read(tmp_path / "out" / "windows.csv")
    assert {row["label"] for row in rows} <= {"high", "low", "mid", ""}
    full = {}  # the last window of a recording is moved back in predict.py
    for row in rows:
        if float(row["end"]) <= 8.2:
            full[row["path"].rsplit("/", 1)[-1], round(float(row["start"]), 2)] = row["label"]
    alarms = {(row["path"].rsplit("/", 1)[-1], round(float(row["start"]), 2)): row["class"]
              for row in read(run / "test" / "false_alarms.csv") if float(row["end"]) <= 8.2}
    assert {key: label for key, label in full.items() if label} == alarms
    assert len(full) == 9 * len(paths)


def test_exported_onnx_gives_the_same_scores_on_negatives(run, data, tmp_path):
    assert exit_code(export.main, "--ckpt", run / "best.pt", "--to", "onnx",
                     tmp_path / "a.onnx") == 0
    arrays = dict(np.load(run / "test" / "scores.npz"))
    manifest = Manifest.from_dict(load_checkpoint(run / "best.pt")["manifest"])
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx",
                                           providers=["CPUExecutionProvider"])
    name, length = session.get_inputs()[0].name, session.get_inputs()[0].shape[1]
    rate = load_checkpoint(run / "best.pt")["frontend"]["sample_rate"]
    from data.audio import read as read_audio
    n_compared = 0
    for row, label, scores in zip(arrays["rows"], arrays["labels"], arrays["scores"], strict=True):
        if label >= 0:
            continue
        begin = round(float(manifest.start[row]) * rate)
        wave = read_audio(manifest.file(row), rate, begin, length)
        probabilities = session.run(None, {name: wave[None]})[0][0]
        temperature = load_checkpoint(run / "best.pt")["calibration"]["temperature"]
        logit = np.log(scores.astype(np.float64)) - np.log1p(-scores.astype(np.float64))
        np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logit / temperature)),
                                   atol=2e-3)
        n_compared += 1
    assert n_compared > 10 and probabilities.sum() != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("step", [3, 9])
def test_resumed_run_with_negatives_is_the_same_run(run, data, tmp_path, monkeypatch, step):
    assert run_program(monkeypatch, tmp_path, data, prepare=stop_at(step)) == 143
    assert program(monkeypatch, tmp_path, "--resume") == 0
    assert outcome(tmp_path / "run") == outcome(run)


def test_softmax_loss_learns_negatives_too(data, tmp_path, monkeypatch):
    assert run_program(monkeypatch, tmp_path, data, "--loss", "focal", "--epochs", "1",
                       "--freeze-epochs", "0", "--warmup-epochs", "0") == 0
    arrays = dict(np.load(tmp_path / "run" / "test" / "scores.npz"))
    np.testing.assert_allclose(arrays["scores"].sum(axis=1), 1, atol=1e-5)
    metrics = json.loads((tmp_path / "run" / "test" / "metrics.json").read_text())
    assert metrics["false_alarms"]["hours"] > 0


def test_one_class_and_negatives_are_trained_to_say_yes_or_no(data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    for name in ("low", "mid"):
        shutil.rmtree(tmp_path / "data" / name)
    assert run_program(monkeypatch, tmp_path, tmp_path / "data", "--monitor", "val_map") == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")
    assert checkpoint["classes"] == ["high"]
    metrics = json.loads((tmp_path / "run" / "test" / "metrics.json").read_text())
    assert 0 <= metrics["map"] <= 1 and metrics["false_alarms"]["hours"] > 0


# --- annotated recordings ---

@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """Eight recordings of 12 s: noise with tones at known times, and their Audacity labels."""
    folder = tmp_path_factory.mktemp("annotated") / "data"
    hertz = {"low": 300, "mid": 1200, "high": 4000}
    events = {}
    for i in range(8):
        rng = np.random.default_rng(i)
        wave = rng.normal(0, 0.02, 12 * RATE)
        own = []
        for k, name in enumerate(("low", "mid", "high")[i % 3:] + ("low", "mid", "high")[:i % 3]):
            start = 0.5 + 4 * k + float(rng.integers(0, 2000)) / 1000
            n = round(0.8 * RATE)
            first = round(start * RATE)
            wave[first:first + n] += tone(0.8, hz=hertz[name], seed=i)[:n]
            own.append((start, start + 0.8, name))
        folder.mkdir(exist_ok=True)
        path = folder / f"SITE{i % 2}_2024050{1 + i % 3}_05300{i}.wav"
        sf.write(path, wave, RATE)
        lines = [f"{start:.3f}\t{end:.3f}\t{name}" for start, end, name in own]
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        events[path.name] = own
    return folder, events


def test_training_and_testing_on_annotated_recordings(annotated, tmp_path, monkeypatch):
    folder, events = annotated
    assert run_program(monkeypatch, tmp_path, folder, "--annotated", "all", "--epochs", "1",
                       "--freeze-epochs", "0", "--warmup-epochs", "0") == 0
    checkpoint = tmp_path / "run" / "best.pt"
    assert load_checkpoint(checkpoint)["classes"] == ["high", "low", "mid"]
    out = tmp_path / "out"
    assert exit_code(evaluate.main, "--ckpt", checkpoint, "--annotations", folder,
                     "--out", out) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    total = metrics["events"]["micro"]
    assert total["found"] + total["missed"] == sum(map(len, events.values())) == 24
    recordings = read(out / "recordings.csv")
    assert {row["path"]: int(row["events"]) for row in recordings} == {
        name: len(own) for name, own in events.items()}
    for name in ("found", "missed", "false"):
        assert sum(int(row[name]) for row in recordings) == total[name]
    places = read(out / "places.csv")
    assert {row["site"] for row in places} == {"SITE0", "SITE1"}
    assert {row["day"] for row in places} == {"2024-05-01", "2024-05-02", "2024-05-03"}
    assert sum(int(row["recordings"]) for row in places) == 8
    windows = read(out / "predictions.csv")
    assert len(windows) == 8 * 14  # 12 s in windows of 0.9 s, the last one moved back


def test_annotations_for_a_checkpoint_of_clips_need_a_word_on_the_rest(run, annotated, capsys):
    folder, _ = annotated
    assert exit_code(evaluate.main, "--ckpt", run / "best.pt", "--annotations", folder) == 2
    assert "--annotated" in capsys.readouterr().err


def test_checkpoint_of_clips_is_tested_on_annotated_recordings(run, annotated, tmp_path):
    folder, _ = annotated
    assert exit_code(evaluate.main, "--ckpt", run / "best.pt", "--annotations", folder,
                     "--annotated", "all", "--out", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    total = metrics["events"]["micro"]
    assert total["found"] + total["missed"] == 24
    active = {(row["path"], float(row["start"])): row["prediction"]
              for row in read(tmp_path / "out" / "predictions.csv")}
    assert any(active.values()) or total["found"] == total["false"] == 0
    assert metrics["false_alarms"]["recordings"] <= 8


def test_comparison_has_the_false_alarms_of_both_runs(run, capsys):
    figures = json.loads((run / "test" / "metrics.json").read_text())["false_alarms"]
    lines = compare(run, run, run.parent / "compare.png")
    [line] = [line for line in lines if "false alarms" in line]
    assert line.count(f"{figures['per_hour']:.1f} ({figures['windows_with_alarm']} in") == 2


def test_report_on_other_data_names_clips_that_the_model_was_trained_on(run, data, tmp_path):
    shutil.copytree(data, tmp_path / "copy")
    for path in sorted((tmp_path / "copy").glob("*/*.wav")):
        path.rename(path.with_name(f"renamed_{path.name}"))
    out = tmp_path / "out"
    assert exit_code(evaluate.main, "--ckpt", run / "best.pt", "--data", tmp_path / "copy",
                     "--out", out) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["split"] == "all" and metrics["leaks"]
    found = verdict.findings(read_run(run, out))
    assert any(metrics["leaks"][0].removeprefix("LEAK: ") in finding.details
               for finding in found.found)
    assert not any("leakage" in text for text in found.absent)
