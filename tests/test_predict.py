"""predict.py against evaluation and a computation by hand; unreadable recordings; flags."""
import itertools
import json
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import tone
from harness import without_pictures
from predict_runs import (
    ONE_THREAD,
    command,
    file_names,
    rows,
    run,
    train_tiny,
    with_parts,
    write_recordings,
)
from scipy.special import softmax

import evaluate
import predict
from core.run.checkpoint import load_checkpoint
from core.scoring import restore
from data.audio import fit, read, tile_starts


@pytest.fixture(scope="module")
def ckpt(tones, tmp_path_factory):
    return train_tiny(tones, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def uncalibrated(ckpt):
    """A checkpoint without calibration: temperature 1, thresholds of 0.5."""
    return with_parts(ckpt, ckpt.with_name("uncalibrated.pt"), calibration=None)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("recordings"))


# --- scores ---

def test_scores_of_recordings_are_those_of_evaluation(uncalibrated, recordings, tmp_path,
                                                      monkeypatch):
    with without_pictures(monkeypatch) as patch:
        patch.setattr(evaluate, "write_report", lambda *_: "")
        evaluate.main(["--ckpt", str(uncalibrated), "--data", str(recordings),
                       "--out", str(tmp_path / "e"), "--device", "cpu", "--amp", "off"])
    paths = [row["path"] for row in rows(tmp_path / "e" / "predictions.csv")]
    evaluated = np.load(tmp_path / "e" / "scores.npz")["scores"].astype(float)
    run(uncalibrated, tmp_path / "p", recordings, "--threshold", 0, "--top-k", 3,
        "--batch-size", 5)
    files = rows(tmp_path / "p" / "files.csv")
    by_path = {}
    for row in files:
        path = os.path.relpath(row["path"], recordings)
        by_path.setdefault(path, {})[row["label"]] = float(row["score"])
    assert by_path.keys() == set(paths)
    assert len(paths) == 11
    classes = load_checkpoint(uncalibrated)["classes"]
    predicted = np.array([[by_path[path][name] for name in classes] for path in paths])
    assert evaluated.std(axis=0).min() > 0.01  # the scores tell the recordings apart
    np.testing.assert_allclose(predicted, evaluated, atol=1e-6)
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert sum(int(row["windows"]) for row in files) == 3 * metrics["tiles"]


class Expected(NamedTuple):
    """The windows of one recording, each read from the file and scored alone."""
    starts: np.ndarray  # (n,) seconds
    ends: np.ndarray  # (n,) seconds
    probabilities: np.ndarray  # (n, classes), not calibrated
    features: np.ndarray  # (n, dim)


def score_by_hand(ckpt, path, hop):
    """hop: seconds -> Expected."""
    checkpoint = load_checkpoint(ckpt)
    model, frontend = restore(checkpoint, torch.device("cpu"))
    model.eval()
    size, short = checkpoint["clip"]["samples"], checkpoint["clip"]["short"]
    rate, info = frontend.config.sample_rate, sf.info(path)
    # Evaluation has seconds in float32.
    total = round(float(np.float32(info.frames / info.samplerate)) * rate)
    starts = tile_starts(total, size, round(hop * rate))
    waves = [read(path, rate, start, min(size, total - start)) for start in starts]
    ends = [start + len(wave) for start, wave in zip(starts, waves)]
    with torch.inference_mode():
        specs = [frontend(torch.from_numpy(fit(wave, size, short))[None]) for wave in waves]
        probabilities = [model(spec).double().softmax(dim=1).numpy() for spec in specs]
        features = [model.features(spec).numpy() for spec in specs]
    return Expected(np.array(starts) / rate, np.array(ends) / rate,
                    np.concatenate(probabilities), np.concatenate(features))


def choose_thresholds(scores):
    """Thresholds (classes,) for scores (n, classes), with both empty and double windows.

    In some windows no class reaches its threshold, in others two do. No score is closer to one
    than 1e-4, so that rounding changes no decision.
    """
    choices = []
    for column in scores.T:
        candidates = np.linspace(*np.quantile(column, [0.1, 0.9]), 25)
        choices.append([value for value in candidates if abs(column - value).min() > 1e-4])

    def rarer_kind(thresholds):
        n_reached = (scores >= thresholds).sum(axis=1)
        return min((n_reached == 0).sum(), (n_reached == 2).sum())

    return [float(value) for value in max(itertools.product(*choices), key=rarer_kind)]


def best_two(scores, thresholds):
    """Indices of the classes among the best two that reach their threshold, best first."""
    return [c for c in np.argsort(-scores)[:2] if scores[c] >= thresholds[c]]


HOP, TEMPERATURE = 0.4, 0.5


class HandScored(NamedTuple):
    """Recordings scored by hand, and the folder that predict.py wrote for them."""
    expected: dict[str, Expected]  # by path
    thresholds: list[float]
    classes: list[str]
    out: Path

    def window_scores(self, path):
        """(n, classes) calibrated."""
        return softmax(np.log(self.expected[path].probabilities) / TEMPERATURE, axis=1)


@pytest.fixture(scope="module")
def hand_scored(ckpt, recordings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_hand")
    paths = [str(path) for path in sorted(recordings.rglob("*.wav"))]
    expected = {path: score_by_hand(ckpt, path, HOP) for path in paths}
    probabilities = np.concatenate([of_file.probabilities for of_file in expected.values()])
    thresholds = choose_thresholds(softmax(np.log(probabilities) / TEMPERATURE, axis=1))
    calibrated = with_parts(ckpt, folder / "calibrated.pt", calibration={
        "temperature": TEMPERATURE, "thresholds": thresholds})
    run(calibrated, folder / "p", recordings, "--hop", HOP, "--top-k", 2, "--embeddings",
        "--batch-size", 4)
    return HandScored(expected, thresholds, load_checkpoint(ckpt)["classes"], folder / "p")


def test_windows_are_those_scored_by_hand(hand_scored):
    table = rows(hand_scored.out / "windows.csv")
    assert list(dict.fromkeys(row["path"] for row in table)) == list(hand_scored.expected)
    n_empty = n_double = 0
    for path, expected in hand_scored.expected.items():
        spans, scores = [], []
        window_scores = hand_scored.window_scores(path)
        for start, end, of_window in zip(expected.starts, expected.ends, window_scores):
            predicted = best_two(of_window, hand_scored.thresholds)
            n_empty += not predicted
            n_double += len(predicted) == 2
            span = f"{start:.3f}", f"{end:.3f}"
            if not predicted:
                spans.append((*span, ""))
                scores.append(None)
            for c in predicted:
                spans.append((*span, hand_scored.classes[c]))
                scores.append(of_window[c])
        of_file = [row for row in table if row["path"] == path]
        assert [(row["start"], row["end"], row["label"]) for row in of_file] == spans
        for row, score in zip(of_file, scores, strict=True):
            if score is None:
                assert row["score"] == ""
            else:
                assert float(row["score"]) == pytest.approx(score, abs=5e-5)
    assert n_empty > 3
    assert n_double > 3


def test_scores_of_whole_recordings_are_calibrated_after_the_mean(hand_scored):
    files = rows(hand_scored.out / "files.csv")
    for path, expected in hand_scored.expected.items():
        scores = softmax(np.log(expected.probabilities.mean(axis=0)) / TEMPERATURE)
        predicted = best_two(scores, hand_scored.thresholds)
        by_label = {row["label"]: row for row in files if row["path"] == path}
        assert list(by_label) == ([hand_scored.classes[c] for c in predicted] or [""])
        for c in predicted:
            row = by_label[hand_scored.classes[c]]
            assert float(row["score"]) == pytest.approx(scores[c], abs=5e-5)
            assert int(row["windows"]) == len(expected.starts)
            assert float(row["seconds"]) == pytest.approx(sf.info(path).duration, abs=1e-3)


def test_classes_csv_counts_the_windows_and_has_the_highest_score(hand_scored):
    windows = {}
    for row in rows(hand_scored.out / "windows.csv"):
        if row["label"]:
            windows.setdefault((row["path"], row["label"]), []).append(row)
    expected = {}
    for key, of_class in windows.items():
        highest = max(of_class, key=lambda row: float(row["score"]))
        expected[key] = len(of_class), highest["score"], highest["start"]
    table = rows(hand_scored.out / "classes.csv")
    assert {(row["path"], row["label"]): (int(row["windows"]), row["highest"], row["at"])
            for row in table} == expected
    assert len(expected) > 10


def test_embeddings_are_the_features_of_each_window(hand_scored, recordings):
    for path, expected in hand_scored.expected.items():
        name = os.path.relpath(path, recordings) + ".npz"
        with np.load(hand_scored.out / "embeddings" / name) as file:
            assert file["embeddings"].dtype == np.float32
            np.testing.assert_allclose(file["embeddings"], expected.features, atol=2e-4)
            np.testing.assert_allclose(file["start"], expected.starts)
            np.testing.assert_allclose(file["end"], expected.ends)


def test_threshold_flag_replaces_all_thresholds(ckpt, recordings, tmp_path):
    strict = with_parts(ckpt, tmp_path / "strict.pt", calibration={
        "temperature": 1.0, "thresholds": [1.0, 1.0, 1.0]})
    run(strict, tmp_path / "a", recordings)
    run(strict, tmp_path / "b", recordings, "--threshold", 0)
    assert {row["label"] for row in rows(tmp_path / "a" / "windows.csv")} == {""}
    assert "" not in {row["label"] for row in rows(tmp_path / "b" / "windows.csv")}


# --- unreadable recordings ---

def test_unreadable_recordings_are_listed_and_the_others_predicted(ckpt, tmp_path, capsys):
    data, out = tmp_path / "r", tmp_path / "p"
    data.mkdir()
    for i in range(4):
        sf.write(data / f"{i}.wav", tone(2, hz=300), 16000)
    run(ckpt, tmp_path / "good", *sorted(data.glob("?.wav")), "--batch-size", 2)
    (data / "1b.wav").write_text("no audio")
    (data / "2b.wav").symlink_to("nowhere")
    sf.write(data / "3b.flac", tone(20, hz=300), 16000)
    truncated = (data / "3b.flac").read_bytes()[:-100_000]  # its first windows can be decoded
    (data / "3b.flac").write_bytes(truncated)
    flags = ["--batch-size", 2, "--format", "csv,audacity"]
    capsys.readouterr()
    run(ckpt, out, data, *flags)
    printed = capsys.readouterr().out
    assert "3 unreadable recordings" in printed
    assert "3b.flac: " in printed
    assert file_names(out / "bad_files.csv") == ["1b.wav", "2b.wav", "3b.flac"]
    assert all(row["reason"] for row in rows(out / "bad_files.csv"))
    for table in ("windows.csv", "files.csv"):
        labels = [row["label"] for row in rows(out / table)]
        assert labels == [row["label"] for row in rows(tmp_path / "good" / table)]
        assert len(labels) > 3

    sf.write(data / "repaired.flac", tone(20, hz=300), 16000)
    os.replace(data / "repaired.flac", data / "3b.flac")
    (data / "2.wav").write_text("no audio any more")
    run(ckpt, out, data, *flags)
    assert file_names(out / "bad_files.csv") == ["1b.wav", "2.wav", "2b.wav"]
    readable = ["0.wav", "1.wav", "3.wav", "3b.flac"]
    assert file_names(out / "files.csv") == readable
    tracks = sorted(path.name for path in (out / "audacity").iterdir())
    assert tracks == [name + ".txt" for name in readable]


def test_without_a_readable_recording_the_exit_code_is_2(ckpt, tmp_path):
    (tmp_path / "a.wav").write_text("no audio")
    done = subprocess.run(command(ckpt, tmp_path / "p", tmp_path / "a.wav"), capture_output=True,
                          text=True, env=ONE_THREAD)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "bad_files.csv" in done.stderr
    assert [row["path"] for row in rows(tmp_path / "p" / "bad_files.csv")] == [
        str(tmp_path / "a.wav")]


# --- the command line ---

@pytest.mark.parametrize("flags, name", [
    (["nowhere"], "nowhere"),
    (["."], "no audio"),
    (["x.wav", "--hop", "2"], "at most 0.9"),
    (["x.wav", "--hop", "0"], "--hop"),
    (["x.wav", "--hop", "nan"], "--hop"),
    (["x.wav", "--top-k", "0"], "--top-k"),
    (["x.wav", "--threshold", "1.5"], "--threshold"),
    (["x.wav", "--threshold", "nan"], "--threshold"),
    (["x.wav", "--format", "csv,xml"], "xml"),
    (["x.wav", "--batch-size", "0"], "--batch-size"),
    (["x.wav", "--workers", "0"], "--workers"),
    (["x.wav", "--device", "tpu"], "--device"),
    ([], "FILES_OR_FOLDERS"),
    (["x.wav", "--out", "x.wav"], "--out"),
    (["x.wav", "--out", "other"], "--out"),
    (["x.wav", "--ckpt", "none.pt"], "none.pt"),
])
def test_invalid_flags_give_one_line_that_names_them(flags, name, ckpt, tmp_path, monkeypatch,
                                                     capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").touch()
    if flags and flags[0] == "x.wav":
        sf.write("x.wav", tone(1), 16000)
    run(ckpt, "p", *flags, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert name in error
    assert "--run-dir" not in error
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.doc"]


def test_bare_name_is_looked_up_in_the_newest_run(ckpt, recordings, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "best.pt").symlink_to(ckpt)
    monkeypatch.chdir(tmp_path)
    run("best.pt", "predictions", recordings / "low" / "1.wav")
    printed = capsys.readouterr().out
    assert "runs/a/best.pt" in printed
    assert re.search(r"1 recording, 3 windows, 3 s of audio in .*, \d+ times real time", printed)
    assert "written: predictions/files.csv, classes.csv, windows.csv" in printed


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        predict.parse(["--help"])
    text = capsys.readouterr().out
    flags = vars(predict.parse(["a.wav", "--ckpt", "best.pt"])).keys() - {"inputs"}
    assert {f"--{flag.replace('_', '-')}" for flag in flags} <= set(re.findall(r"--[\w-]+", text))
    assert "%(" not in text
