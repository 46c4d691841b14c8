"""predict.py: against evaluate.py, against a computation by hand, and stopped and continued."""
import csv
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, tone
from scipy.special import softmax

import evaluate
import predict
import train
from core.run.checkpoint import load_checkpoint, save_checkpoint
from core.scoring import restore
from data.audio import fit, read, tile_starts
from tests.faults.harness import exit_code, without_pictures

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
ON_CPU = ["--device", "cpu", "--amp", "off"]


def run(ckpt, out, *inputs, code=0):
    """Predict in this process; it must end with this exit code."""
    assert exit_code(predict.main, "--ckpt", ckpt, "--out", out, *ON_CPU, *inputs) == code


def command(ckpt, out, *inputs):
    """The same as a command line."""
    words = [sys.executable, ROOT / "predict.py", "--ckpt", ckpt, "--out", out, *ON_CPU, *inputs]
    return [str(word) for word in words]


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def names(table):
    """The file name in each row of a table."""
    return [os.path.basename(row["path"]) for row in table]


def files_in(out):
    """{relative path: bytes} of all files of a folder but its lock."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def part_versions(out):
    """{path: what changes when the part of a recording is written}."""
    status = {path: path.stat() for path in (out / "parts").glob("*.jsonl")}
    return {path: (s.st_ino, s.st_mtime_ns) for path, s in status.items()}


def n_written(before, out):
    """How many parts were written since `before = part_versions(out)`."""
    return len(part_versions(out).items() - before.items())


@pytest.fixture(scope="module")
def ckpt(tones, tmp_path_factory):
    """A tiny model that has learnt something: windows of 0.9 s at 22,050 Hz.

    Without a cache, evaluation rounds nothing.
    """
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--weights", "none", "--dim", "32", "--depth", "1", "--heads", "2", "--seconds", "0.9",
             "--cache", "off", "--lr-backbone", "2e-3", "--lr-head", "4e-3", "--epochs", "6",
             "--batch-size", "4", "--effective-batch", "4", "--monitor", "val_loss", *ON_CPU]
    with pytest.MonkeyPatch.context() as patch, without_pictures(patch):
        patch.setenv("HOME", str(folder))
        assert train.main(["--data", str(tones), *flags, "--run-dir", str(folder / "run")]) == 0
    return folder / "run" / "best.pt"


def changed(ckpt, path, **parts):
    """A copy of a checkpoint with other parts -> its path."""
    save_checkpoint(path, {**load_checkpoint(ckpt), **parts})
    return path


@pytest.fixture(scope="module")
def uncalibrated(ckpt):
    """The same model with scores as it gives them and thresholds of 0.5."""
    return changed(ckpt, ckpt.with_name("uncalibrated.pt"), calibration=None)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two class folders with eleven recordings that differ in all that a recording may differ in.

    Shorter and longer than a window, of other rates, of two channels, of an odd number of samples,
    silent.
    """
    folder = tmp_path_factory.mktemp("recordings")
    forms = [(0.5, 16000, 1), (2.7, 22050, 1), (3.33337, 44100, 2), (7.1, 48000, 1),
             (4.00009, 44100, 1)]  # seconds, rate, channels
    for c, (name, hz) in enumerate({"low": 310, "high": 4100}.items()):
        (folder / name).mkdir()
        for i, (seconds, rate, channels) in enumerate(forms):
            seeds = [10 * c + i + 100 * channel for channel in range(channels)]
            waves = [tone(seconds, rate, hz * (1 + 0.1 * i), seed=seed) for seed in seeds]
            sf.write(folder / name / f"{i}.wav", np.stack(waves, axis=1), rate)
    sf.write(folder / "low" / "silent.wav", np.zeros(50000), 22050)
    return folder


# --- the scores ---

def test_scores_of_recordings_are_those_of_evaluate(
        uncalibrated, recordings, tmp_path, monkeypatch):
    with without_pictures(monkeypatch):
        evaluate.main(["--ckpt", str(uncalibrated), "--data", str(recordings),
                       "--out", str(tmp_path / "e"), *ON_CPU])
    run(uncalibrated, tmp_path / "p", recordings, "--threshold", 0, "--top-k", 3,
        "--batch-size", 5)
    predicted = {}
    for row in rows(tmp_path / "p" / "files.csv"):
        path = os.path.relpath(row["path"], recordings)
        predicted.setdefault(path, {})[row["label"]] = float(row["score"] or "nan")
    paths = [row["path"] for row in rows(tmp_path / "e" / "predictions.csv")]
    assert predicted.keys() == set(paths) and len(paths) == 11
    assert predicted.pop("low/silent.wav").keys() == {""}  # never answered
    classes = load_checkpoint(uncalibrated)["classes"]
    expected = np.load(tmp_path / "e" / "scores.npz")["scores"].astype(float)
    expected = np.array([row for path, row in zip(paths, expected) if path in predicted])
    scores = np.array([[predicted[path][name] for name in classes] for path in paths
                       if path in predicted])
    assert expected.std(axis=0).min() > 0.01  # the recordings differ
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    n_tiles = json.loads((tmp_path / "e" / "metrics.json").read_text())["tiles"]
    n_windows = sum(int(row["windows"]) * (1 if row["label"] else 3)
                    for row in rows(tmp_path / "p" / "files.csv"))
    assert n_windows == 3 * n_tiles  # a row for each class, one for silence


class ByHand(NamedTuple):
    """A recording's windows, each read from the file and scored alone."""
    starts: np.ndarray  # (n,) seconds
    ends: np.ndarray  # (n,) seconds
    probabilities: np.ndarray  # (n, classes) uncalibrated
    features: np.ndarray  # (n, dim)


def by_hand(ckpt, path, hop):
    checkpoint = load_checkpoint(ckpt)
    model, frontend = restore(checkpoint, torch.device("cpu"))
    model.eval()
    size, rate = checkpoint["clip"]["samples"], frontend.config.sample_rate
    info = sf.info(path)
    total = round(float(np.float32(info.frames / info.samplerate)) * rate)  # as evaluation counts
    starts = tile_starts(total, size, round(hop * rate))
    ends, specs = [], []
    for start in starts:
        wave = read(path, rate, start, min(size, total - start))
        ends.append(start + len(wave))
        wave = fit(wave, size, checkpoint["clip"]["short"])
        specs.append(frontend(torch.from_numpy(wave)[None]))
    with torch.inference_mode():
        probabilities = [model(spec).double().softmax(1).numpy() for spec in specs]
        features = [model.features(spec).numpy() for spec in specs]
    return ByHand(np.array(starts) / rate, np.array(ends) / rate, np.concatenate(probabilities),
                  np.concatenate(features))


def at_temperature(probabilities, temperature):
    return softmax(np.log(probabilities) / temperature, axis=-1)


def telling_thresholds(scores):
    """Thresholds at which many windows have no class and many have two; no score is near them.

    scores: (n, classes).
    """
    choices = []
    for column in scores.T:
        values = np.linspace(*np.quantile(column, [0.1, 0.9]), 25)
        choices.append([value for value in values if abs(column - value).min() > 1e-4])

    def rarest(thresholds):
        n_classes = (scores >= thresholds).sum(axis=1)
        return min((n_classes == 0).sum(), (n_classes == 2).sum())

    return [float(value) for value in max(itertools.product(*choices), key=rarest)]


TEMPERATURE, HOP = 0.5, 0.4


class Calibrated(NamedTuple):
    """Predictions of a calibrated model with windows that overlap."""
    out: object
    by_path: dict  # path -> ByHand
    thresholds: list
    classes: list

    def labels(self, probabilities):
        """[(class, score)] of the two best classes that reach their thresholds, by hand."""
        scores = at_temperature(probabilities, TEMPERATURE)
        best = np.argsort(-scores)[:2]
        return [(self.classes[c], scores[c]) for c in best if scores[c] >= self.thresholds[c]]


@pytest.fixture(scope="module")
def calibrated(ckpt, recordings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    by_path = {str(path): by_hand(ckpt, path, HOP) for path in sorted(recordings.rglob("*.wav"))}
    everything = np.concatenate([hand.probabilities for hand in by_path.values()])
    thresholds = telling_thresholds(at_temperature(everything, TEMPERATURE))
    calibration = {"temperature": TEMPERATURE, "thresholds": thresholds}
    path = changed(ckpt, folder / "c.pt", calibration=calibration)
    run(path, folder / "p", recordings, "--hop", HOP, "--top-k", 2, "--embeddings",
        "--batch-size", 4)
    return Calibrated(folder / "p", by_path, thresholds, load_checkpoint(ckpt)["classes"])


def test_windows_agree_with_a_computation_by_hand(calibrated):
    table = rows(calibrated.out / "windows.csv")
    assert list(dict.fromkeys(row["path"] for row in table)) == list(calibrated.by_path)
    n_labels = []
    for path, hand in calibrated.by_path.items():
        expected = []
        for start, end, probabilities in zip(hand.starts, hand.ends, hand.probabilities):
            labels = [] if path.endswith("silent.wav") else calibrated.labels(probabilities)
            n_labels.append(len(labels))
            expected += [(f"{start:.3f}", f"{end:.3f}", label, score)
                         for label, score in labels or [("", None)]]
        own = [row for row in table if row["path"] == path]
        assert [(row["start"], row["end"], row["label"]) for row in own] == [
            row[:3] for row in expected]
        for row, (*_, score) in zip(own, expected):
            if score is None:
                assert row["score"] == ""
            else:
                assert float(row["score"]) == pytest.approx(score, abs=5e-5)
    assert n_labels.count(0) > 3 and n_labels.count(2) > 3


def test_a_recording_has_the_calibrated_mean_of_its_windows(calibrated):
    table = rows(calibrated.out / "files.csv")
    for path, hand in calibrated.by_path.items():
        expected = calibrated.labels(hand.probabilities.mean(axis=0))
        if path.endswith("silent.wav"):
            expected = []
        own = [row for row in table if row["path"] == path]
        assert [row["label"] for row in own] == [label for label, _ in expected] or [""]
        for row, (_, score) in zip(own, expected):
            assert float(row["score"]) == pytest.approx(score, abs=5e-5)
        for row in own:
            assert int(row["windows"]) == len(hand.starts)
            assert float(row["seconds"]) == pytest.approx(sf.info(path).duration, abs=1e-3)


def test_classes_csv_counts_windows_and_has_the_time_of_the_highest_score(calibrated):
    windows = {}
    for row in rows(calibrated.out / "windows.csv"):
        if row["label"]:
            windows.setdefault((row["path"], row["label"]), []).append((row["score"], row["start"]))
    expected = {}
    for key, scores in windows.items():
        highest = max(scores, key=lambda score: float(score[0]))
        expected[key] = len(scores), *highest
    table = rows(calibrated.out / "classes.csv")
    assert {(row["path"], row["label"]): (int(row["windows"]), row["highest"], row["at"])
            for row in table} == expected
    assert len(table) == len(expected) > 10


def test_embeddings_are_the_features_of_the_windows(calibrated, recordings):
    for path, hand in calibrated.by_path.items():
        name = os.path.relpath(path, recordings) + ".npz"
        with np.load(calibrated.out / "embeddings" / name) as file:
            assert file["embeddings"].dtype == np.float32
            np.testing.assert_allclose(file["embeddings"], hand.features, atol=2e-4)
            np.testing.assert_allclose(file["start"], hand.starts)
            np.testing.assert_allclose(file["end"], hand.ends)


def test_threshold_replaces_those_of_the_checkpoint(ckpt, recordings, tmp_path):
    calibration = {"temperature": 1.0, "thresholds": [1.0, 1.0, 1.0]}
    strict = changed(ckpt, tmp_path / "c.pt", calibration=calibration)
    run(strict, tmp_path / "a", recordings)
    run(strict, tmp_path / "b", recordings, "--threshold", 0)
    assert {row["label"] for row in rows(tmp_path / "a" / "windows.csv")} == {""}
    answered = [row for row in rows(tmp_path / "b" / "windows.csv") if "silent" not in row["path"]]
    assert "" not in {row["label"] for row in answered}


# --- silence ---

QUIETEST_STEP = 1 / 32768  # of 16 bits


@pytest.mark.parametrize("wave", [
    np.zeros(22050 * 2), np.full(22050 * 2, 0.1),
    QUIETEST_STEP * np.sign(np.sin(np.arange(22050 * 2)))], ids=["zeros", "offset", "last bit"])
def test_silence_is_never_answered(ckpt, tmp_path, capsys, wave):
    folder = tmp_path / "in"
    folder.mkdir()
    sound = tone(0.9, 22050, 300)
    both = np.concatenate([sound, wave[:len(sound)]])
    for name, samples in (("silent", wave), ("both", both), ("sound", sound)):
        sf.write(folder / f"{name}.wav", samples, 22050, subtype="FLOAT")
    run(ckpt, tmp_path / "out", folder, "--threshold", 0, "--hop", 0.9)
    table = rows(tmp_path / "out" / "windows.csv")
    labels = {name: [row["label"] for row in table if row["path"].endswith(name + ".wav")]
              for name in ("silent", "both", "sound")}
    assert set(labels["silent"]) == {""}
    assert "" not in labels["sound"] and labels["both"] == [*labels["sound"], ""]
    files = {os.path.basename(row["path"]): row for row in rows(tmp_path / "out" / "files.csv")}
    assert files["silent.wav"]["label"] == files["silent.wav"]["score"] == ""
    for column in ("label", "score"):  # the silent half changes no answer
        assert files["both.wav"][column] == files["sound.wav"][column] != ""
    counted = {os.path.basename(row["path"]) for row in rows(tmp_path / "out" / "classes.csv")}
    assert counted == {"both.wav", "sound.wav"}
    n_silent = len(labels["silent"]) + 1
    assert f"{n_silent} of {len(table)} windows are silent" in capsys.readouterr().out


def test_control_quiet_sound_is_answered(ckpt, tmp_path, capsys):
    sf.write(tmp_path / "quiet.wav", 10 ** (-80 / 20) * tone(0.9, 22050, 300), 22050,
             subtype="FLOAT")
    run(ckpt, tmp_path / "out", tmp_path / "quiet.wav", "--threshold", 0)
    assert rows(tmp_path / "out" / "files.csv")[0]["label"]
    assert "silent" not in capsys.readouterr().out


def test_evaluation_counts_silent_clips(ckpt, tmp_path, capsys):
    for name, wave in (("low", tone(0.9, 22050, 300)), ("high", np.zeros(30000))):
        (tmp_path / "data" / name).mkdir(parents=True)
        sf.write(tmp_path / "data" / name / "new.wav", wave, 22050)
    out = tmp_path / "out"
    assert exit_code(evaluate.main, "--ckpt", ckpt, "--data", tmp_path / "data", "--out", out,
                     *ON_CPU) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["n"], metrics["silent"]) == (2, 1)
    assert "2 clips, 1 silent" in capsys.readouterr().out


# --- the formats ---

ALL_FORMATS = ["--format", "csv,jsonl,raven,audacity"]
RAVEN = ["Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)",
         "High Freq (Hz)", "Label", "Score"]


def window_table(out):
    """[(path, start, end, label, score as text)] of windows.csv."""
    return [(row["path"], float(row["start"]), float(row["end"]), row["label"], row["score"])
            for row in rows(out / "windows.csv")]


@pytest.fixture(scope="module")
def in_all_formats(uncalibrated, recordings, tmp_path_factory):
    out = tmp_path_factory.mktemp("formats") / "p"
    run(uncalibrated, out, recordings, *ALL_FORMATS, "--threshold", 0.4, "--top-k", 2)
    assert any(label == "" for *_, label, _ in window_table(out))
    return out


def labels_by_path(out):
    """{path: [(start, end, label, score as text)]} of the windows with a label."""
    by_path = {}
    for path, *window in window_table(out):
        own = by_path.setdefault(path, [])
        if window[2]:
            own.append(tuple(window))
    return by_path


def test_jsonl_has_the_content_of_csv(in_all_formats):
    content = []
    with open(in_all_formats / "windows.jsonl", encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            labels = [(label["label"], f"{label['score']:.6f}") for label in line["labels"]]
            content += [(line["path"], line["start"], line["end"], *label)
                        for label in labels or [("", "")]]
    assert content == window_table(in_all_formats)


def test_raven_tables_have_the_content_of_csv(in_all_formats, recordings):
    for path, expected in labels_by_path(in_all_formats).items():
        name = os.path.relpath(path, recordings) + ".Table.1.selections.txt"
        with open(in_all_formats / "raven" / name, newline="", encoding="utf-8") as file:
            head, *table = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        assert head == RAVEN
        assert [int(row[0]) for row in table] == list(range(1, len(expected) + 1))
        highest = min(11025, sf.info(path).samplerate / 2)
        for row, (start, end, label, score) in zip(table, expected, strict=True):
            assert row[1:3] == ["Spectrogram 1", "1"] and row[7:] == [label, score]
            assert float(row[3]) == pytest.approx(start, abs=6e-4)
            assert float(row[4]) == pytest.approx(end, abs=6e-4)
            assert (float(row[5]), float(row[6])) == (0, highest)


def test_audacity_tracks_have_the_content_of_csv(in_all_formats, recordings):
    for path, expected in labels_by_path(in_all_formats).items():
        name = os.path.relpath(path, recordings) + ".txt"
        track = (in_all_formats / "audacity" / name).read_text().splitlines()
        for line, (start, end, label, _) in zip(track, expected, strict=True):
            assert re.fullmatch(r"\d+\.\d{6}\t\d+\.\d{6}\t[a-z]+", line)
            fields = line.split("\t")
            assert float(fields[0]) == pytest.approx(start, abs=6e-4)
            assert float(fields[1]) == pytest.approx(end, abs=6e-4)
            assert fields[2] == label


def test_any_name_of_a_file_or_a_class_is_written_as_text(ckpt, tmp_path):
    """Names that are not UTF-8, with tabs, line breaks and quotes; classes that look like columns.

    Three of the files have the same stem.
    """
    strange = changed(ckpt, tmp_path / "s.pt", classes=['a\tb\n3\t"x', "=1+1, 2", "käfer"])
    file_names = [os.fsdecode(b"caf\xe9.wav"), "two\nlines.wav", 'tab\t"quoted", x.wav',
                  "same.wav", "same.flac", "deep/same.wav"]
    for i, name in enumerate(file_names):
        path = tmp_path / "r" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain_path = tmp_path / "r" / f"plain{path.suffix}"  # soundfile refuses some names
        sf.write(plain_path, tone(1, hz=300 + 900 * i), 16000)
        plain_path.rename(path)
    out = tmp_path / "p"
    run(strange, out, tmp_path / "r", *ALL_FORMATS, "--threshold", 0, "--top-k", 3, "--embeddings")
    paths = {str(tmp_path / "r" / name) for name in file_names}
    assert {row["path"] for row in rows(out / "windows.csv")} == paths
    assert {row["path"] for row in rows(out / "files.csv")} == paths
    lines = (out / "windows.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["path"] for line in lines} == paths
    for folder, n_columns in (("raven", 9), ("audacity", 3), ("embeddings", None)):
        files = [path for path in (out / folder).rglob("*") if path.is_file()]
        assert len(files) == len(file_names)
        for path in files:
            str(path).encode("utf-8")  # raises if the name is not UTF-8
            assert str(path).isprintable()
            if n_columns:
                lines = path.read_text(encoding="utf-8").splitlines()
                assert {line.count("\t") + 1 for line in lines} == {n_columns}


# --- unreadable files ---

def test_unreadable_files_are_listed_and_the_others_predicted(ckpt, tmp_path, capsys):
    data, out, reference = tmp_path / "r", tmp_path / "p", tmp_path / "reference"
    data.mkdir()
    for i in range(4):
        sf.write(data / f"{i}.wav", tone(2, hz=300), 16000)
    (data / "1b.wav").write_text("no audio")
    (data / "2b.wav").symlink_to("nowhere")
    truncated = data / "3b.flac"  # some of its windows can be decoded
    sf.write(truncated, tone(20, hz=300), 16000)
    truncated.write_bytes(truncated.read_bytes()[:-100_000])
    run(ckpt, reference, *sorted(data.glob("?.wav")), "--batch-size", 2)
    capsys.readouterr()
    run(ckpt, out, data, "--batch-size", 2, "--format", "csv,audacity")
    printed = capsys.readouterr().out
    bad = rows(out / "bad_files.csv")
    assert names(bad) == ["1b.wav", "2b.wav", "3b.flac"] and all(row["reason"] for row in bad)
    assert all(row["path"] in printed for row in bad)
    for table in ("windows.csv", "files.csv"):
        expected = rows(reference / table)
        others = [row for row in rows(out / table) if "3b.flac" not in row["path"]]
        assert len(rows(out / table)) > len(others) == len(expected) > 3  # its sound part is used
        assert [row["label"] for row in others] == [row["label"] for row in expected]


def test_files_that_were_repaired_or_broken_since_change_sides(ckpt, tmp_path):
    data, out = tmp_path / "r", tmp_path / "p"
    data.mkdir()
    for name in ("0.wav", "1.wav", "2.flac"):
        sf.write(data / name, tone(2, hz=300), 16000)
    whole = (data / "2.flac").read_bytes()
    (data / "2.flac").write_bytes(whole[:-10_000])
    run(ckpt, out, data, "--format", "csv,audacity")
    assert names(rows(out / "bad_files.csv")) == ["2.flac"]
    (data / "2.flac").write_bytes(whole)
    (data / "1.wav").write_text("no audio any more")
    run(ckpt, out, data, "--format", "csv,audacity")
    assert names(rows(out / "bad_files.csv")) == ["1.wav"]
    assert names(rows(out / "files.csv")) == ["0.wav", "2.flac"]
    tracks = sorted(path.name for path in (out / "audacity").iterdir())
    assert tracks == ["0.wav.txt", "2.flac.txt"]


def test_a_broken_file_is_tried_again_even_if_its_size_and_time_are_the_same(ckpt, tmp_path):
    """A disk or a network that fails for a while leaves size and time as they are."""
    data, out = tmp_path / "r", tmp_path / "p"
    data.mkdir()
    for name in ("a.flac", "b.flac"):
        sf.write(data / name, tone(20, hz=300), 16000)
    whole = (data / "a.flac").read_bytes()
    half = len(whole) // 2
    broken = whole[:half] + bytes(len(whole) - half)
    # The two files share a group, so both are predicted when one of them can be read again.
    for content, n_bad, n_predicted in ((broken, 1, 2), (broken, 1, 0), (whole, 0, 2)):
        (data / "a.flac").write_bytes(content)
        os.utime(data / "a.flac", (1e9, 1e9))
        before = part_versions(out)
        run(ckpt, out, data)
        assert n_written(before, out) == n_predicted
        assert len(rows(out / "bad_files.csv")) == n_bad
        assert ("a.flac" in names(rows(out / "bad_files.csv"))) == (n_bad == 1)


def test_nothing_to_predict_is_exit_code_2(ckpt, tmp_path):
    path = tmp_path / "a.wav"
    path.write_text("no audio")
    done = subprocess.run(command(ckpt, tmp_path / "p", path), capture_output=True, text=True,
                          env=ENV, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "bad_files.csv" in done.stderr
    assert [row["path"] for row in rows(tmp_path / "p" / "bad_files.csv")] == [str(path)]


# --- flags ---

@pytest.mark.parametrize("flags, culprit", [
    (["nowhere"], "nowhere"),
    (["empty"], "empty"),
    (["x.wav", "--hop", "2"], "--hop"),
    (["x.wav", "--hop", "0"], "--hop"),
    (["x.wav", "--hop", "nan"], "--hop"),
    (["x.wav", "--top-k", "0"], "--top-k"),
    (["x.wav", "--threshold", "1.5"], "--threshold"),
    (["x.wav", "--threshold", "nan"], "--threshold"),
    (["x.wav", "--format", "csv,xml"], "--format"),
    (["x.wav", "--batch-size", "0"], "--batch-size"),
    (["x.wav", "--workers", "0"], "--workers"),
    (["x.wav", "--device", "tpu"], "--device"),
    ([], "FILES_OR_FOLDERS"),
    (["x.wav", "--out", "x.wav"], "--out x.wav"),
    (["x.wav", "--out", "foreign"], "--out foreign"),
    (["x.wav", "--ckpt", "none.pt"], "none.pt"),
])
def test_invalid_flags_are_refused_in_one_line(flags, culprit, ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "foreign"):
        (tmp_path / folder).mkdir()
    (tmp_path / "foreign" / "thesis.doc").touch()
    sf.write("x.wav", tone(1), 16000)
    run(ckpt, "p", *flags, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert culprit in error and "--run-dir" not in error


def test_control_the_file_of_the_invalid_flags_is_predicted_without_them(
        ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sf.write("x.wav", tone(1), 16000)
    run(ckpt, "p", "x.wav")


def test_a_bare_name_is_looked_up_in_the_newest_run(ckpt, recordings, tmp_path, monkeypatch,
                                                    capsys):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "best.pt").symlink_to(ckpt)
    monkeypatch.chdir(tmp_path)
    run("best.pt", "predictions", recordings / "low" / "1.wav")
    printed = capsys.readouterr().out
    assert "runs/a/best.pt" in printed
    assert re.search(r"1 recording\b.*\b3 windows\b.*\b3 s\b.*\b\d+ times", printed)
    for name in ("files.csv", "classes.csv", "windows.csv"):
        assert name in printed and (tmp_path / "predictions" / name).is_file()


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        predict.parse(["--help"])
    text = capsys.readouterr().out
    flags = ("ckpt", "out", "threshold", "top-k", "hop", "format", "embeddings", "device", "amp",
             "batch-size", "workers")
    assert all(f"--{flag}" in text for flag in flags)
    assert not re.search(r"%\(", text)


# --- stopped and continued ---

N_MANY = 201  # enough that a slow machine sends its signals before the end


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """200 recordings of one to three windows, and one of 200 windows among them."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(N_MANY - 1):
        wave = tone(0.6 + i % 5 * 0.4, 22050, hz=300 + 20 * i, seed=i)
        sf.write(folder / f"{i:03d}.wav", wave, 22050)
    sf.write(folder / "100a.wav", tone(180, 22050, hz=900), 22050)
    return folder


FLAGS = ["--batch-size", "3", "--top-k", "2", "--threshold", "0.2", "--embeddings", *ALL_FORMATS]


@pytest.fixture(scope="module")
def uninterrupted(ckpt, many, tmp_path_factory):
    """The files of a run that was not stopped."""
    out = tmp_path_factory.mktemp("uninterrupted") / "p"
    subprocess.run(command(ckpt, out, many, *FLAGS), check=True, capture_output=True, env=ENV)
    return files_in(out)


def stop_after(n_parts, signum, words, out):
    """Start a run, send the signal when it has `n_parts` parts -> (exit code, parts)."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENV)
    while len(part_versions(out)) < n_parts and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signum)
    error = process.communicate(timeout=120)[1]
    assert b"Traceback" not in error
    return process.returncode, len(part_versions(out))


def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(
        ckpt, many, uninterrupted, tmp_path):
    out, n_before = tmp_path / "p", 0
    stops = ((30, signal.SIGTERM, 143), (60, signal.SIGINT, 130), (90, signal.SIGKILL, -9))
    for n_parts, signum, expected_code in stops:
        code, n_done = stop_after(n_parts, signum, command(ckpt, out, many, *FLAGS), out)
        assert code == expected_code and n_before < n_parts <= n_done < N_MANY
        n_before = n_done
        files = files_in(out)
        assert "windows.csv" not in files
        parts = [name for name in files if name.endswith(".jsonl")]
        assert all(files[name] == uninterrupted[name] for name in parts)
        if signum != signal.SIGKILL:  # nothing temporary is left over
            assert not files.keys() - uninterrupted.keys()
    before = part_versions(out)
    subprocess.run(command(ckpt, out, many, *FLAGS), check=True, capture_output=True, env=ENV)
    n_repeated = n_written(before, out) - (N_MANY - len(before))
    assert 0 <= n_repeated <= 8 * 3  # at most the windows of one group
    assert files_in(out) == uninterrupted


@pytest.mark.parametrize("flag, value, name", [
    ("--top-k", 3, "top_k"),
    ("--hop", 0.5, "hop"),
    ("--threshold", 0.5, "threshold"),
    ("--embeddings", None, "embeddings"),
    ("--ckpt", "other.pt", "checkpoint"),
    ("--amp", "bf16", "amp"),
])
def test_other_settings_in_the_same_folder_are_refused(
        flag, value, name, ckpt, recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changed(ckpt, tmp_path / "other.pt", calibration=None)
    recording = recordings / "low" / "1.wav"
    run(ckpt, "p", recording, "--top-k", 2)
    before = files_in(tmp_path / "p")
    words = [flag] if value is None else [flag, value]
    capsys.readouterr()
    run(ckpt, "p", recording, "--top-k", 2, *words, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: --out p: ") and error.count("\n") == 1
    assert name in error
    assert files_in(tmp_path / "p") == before


def test_settings_that_change_no_score_are_accepted_in_the_same_folder(ckpt, recordings, tmp_path):
    out = tmp_path / "p"
    run(ckpt, out, recordings, "--top-k", 2)
    before = part_versions(out)
    run(ckpt, out, recordings, "--top-k", 2, "--batch-size", 3, "--format", "audacity")
    assert len(list((out / "audacity").rglob("*.txt"))) == 11
    assert n_written(before, out) == 0


def test_only_changed_recordings_are_predicted_again_with_their_groups(ckpt, tmp_path):
    data, out = tmp_path / "r", tmp_path / "p"
    data.mkdir()
    for i in range(60):
        sf.write(data / f"{i:02d}.wav", tone(0.9, 22050, hz=300 + 20 * i), 22050)
    run(ckpt, out, data, "--threshold", 0, "--batch-size", 1)
    old_rows = {row["path"]: row for row in rows(out / "windows.csv")}
    for name in ("07.wav", "60.wav"):
        sf.write(data / name, tone(0.9, 22050, hz=4000), 22050)
    (data / "59.wav").unlink()
    part = min((out / "parts").iterdir())
    part.write_bytes(part.read_bytes()[:-5])  # as after a power cut
    before = part_versions(out)
    run(ckpt, out, data, "--threshold", 0, "--batch-size", 1)
    new_rows = rows(out / "windows.csv")
    assert names(new_rows) == [f"{i:02d}.wav" for i in range(61) if i != 59]
    different = [row for row in new_rows if old_rows.get(row["path"], row) != row]
    assert names(different) == ["07.wav"]
    # The last group, of 4, and the groups of 8 that 07.wav and the cut part are in.
    assert n_written(before, out) in (12, 20)


def test_only_leftovers_of_a_killed_run_are_removed_from_the_folder(ckpt, tmp_path):
    sf.write(tmp_path / "a.wav", tone(1), 16000)
    out = tmp_path / "p"
    leftovers = [".settings.json.k3_x90ab", f"parts/.{'0' * 32}.jsonl.abcdefgh"]
    (out / "parts").mkdir(parents=True)
    for name in leftovers:
        (out / name).touch()
    run(ckpt, out, tmp_path / "a.wav")
    assert not any((out / name).exists() for name in leftovers)
    (out / ".files.csv.abcdefgh").touch()
    (out / ".gitignore").write_text("*")
    (out / ".ipynb_checkpoints").mkdir()
    run(ckpt, out, tmp_path / "a.wav")
    assert sorted(path.name for path in out.iterdir()) == [
        ".gitignore", ".ipynb_checkpoints", ".lock", "bad_files.csv", "classes.csv", "files.csv",
        "parts", "settings.json", "windows.csv"]


def test_two_runs_cannot_write_to_one_folder(ckpt, recordings, tmp_path, capsys):
    out = tmp_path / "p"
    out.mkdir()
    with open(out / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(ckpt, out, recordings, code=2)
    error = capsys.readouterr().err
    assert f"--out {out}" in error and error.count("\n") == 1


# --- memory ---

PRINT_PEAKS = """
import predict, resource, sys
for minutes in ("4", "24"):
    predict.main([*sys.argv[1:], "--out", "p" + minutes, minutes + ".wav"])
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length_of_a_recording(ckpt, tmp_path):
    """24 minutes need a few MiB more than 4; 20 more decoded minutes would be 100 MiB."""
    rng = np.random.default_rng(0)
    for minutes in (4, 24):
        with sf.SoundFile(tmp_path / f"{minutes}.wav", "w", 16000, 1) as file:
            for _ in range(minutes):
                file.write(0.1 * rng.standard_normal(16000 * 60))
    words = [sys.executable, "-c", PRINT_PEAKS, "--ckpt", ckpt, *ON_CPU, "--embeddings"]
    done = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True,
                          env={**ENV, "PYTHONPATH": str(ROOT)})
    low, high = (int(kib) / 1024 for kib in re.findall(r"^peak (\d+)$", done.stdout, re.M))
    assert int(rows(tmp_path / "p24" / "files.csv")[0]["windows"]) > 1590
    assert high - low < 12
