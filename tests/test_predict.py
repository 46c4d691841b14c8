"""Prediction through its command line: against evaluation, a computation by hand, and a run that is killed."""
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

import numpy as np
import pytest
import soundfile as sf
import torch
from scipy.special import softmax

import evaluate
import predict
import train
from conftest import ROOT, tone
from core.exits import ending_of, print_error
from core.run.checkpoint import load_checkpoint, save_checkpoint
from data.audio import fit, read, tile_starts
from core.scoring import restore
from tests.faults.harness import without_pictures

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(scope="module")
def ckpt(tones, tmp_path_factory):
    """A tiny model that has learnt something, of windows of 0.9 s at 22,050 Hz; evaluation rounds nothing (no cache)."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--weights none --dim 32 --depth 1 --heads 2 --seconds 0.9 --device cpu --amp off --cache off --lr-backbone 2e-3 "
             "--lr-head 4e-3 --epochs 6 --batch-size 4 --effective-batch 4 --monitor val_loss").split()
    with pytest.MonkeyPatch.context() as patch, without_pictures(patch):
        patch.setenv("HOME", str(folder))
        assert train.main(["--data", str(tones), *flags, "--run-dir", str(folder / "run")]) == 0
    return folder / "run" / "best.pt"


def changed(ckpt, path, **parts):
    """A copy of a checkpoint with other parts."""
    state = dict(load_checkpoint(ckpt))
    save_checkpoint(path, {**{name: state[name] for name in state if name not in ("format", "version")}, **parts})
    return path


@pytest.fixture(scope="module")
def plain(ckpt):
    """The same without a calibration: scores as the model gives them, thresholds of 0.5."""
    return changed(ckpt, ckpt.with_name("plain.pt"), calibration=None)


def run(ckpt, out, *inputs, code=0):
    """predict.main in this process -> (exit code as the process would have it)."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    try:
        got = predict.main(["--ckpt", str(ckpt), "--out", str(out), "--device", "cpu", "--amp", "off", *map(str, inputs)]) or 0
    except SystemExit as stop:
        got = stop.code
    except Exception as error:
        ending = ending_of(error)
        if ending is None:
            raise
        got, message = ending
        print_error(message)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    assert got == code
    return got


def command(ckpt, out, *inputs):
    return [sys.executable, str(ROOT / "predict.py"), "--ckpt", str(ckpt), "--out", str(out), "--device", "cpu", "--amp", "off",
            *map(str, inputs)]


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def everything(out):
    """The bytes of all results in a folder, by path."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
            and path.name != ".lock"}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Class folders of recordings of all sorts: shorter than a window, longer, of other rates, of two channels, of an odd
    number of samples, silent."""
    folder = tmp_path_factory.mktemp("recordings")
    for c, (name, hz) in enumerate({"low": 310, "high": 4100}.items()):
        (folder / name).mkdir()
        for i, (seconds, rate, channels) in enumerate([(0.5, 16000, 1), (2.7, 22050, 1), (3.33337, 44100, 2), (7.1, 48000, 1),
                                                       (4.00009, 44100, 1)]):
            wave = np.stack([tone(seconds, rate, hz * (1 + 0.1 * i), seed=10 * c + i + 100 * j) for j in range(channels)], axis=1)
            sf.write(folder / name / f"{i}.wav", wave, rate)
    sf.write(folder / "low" / "silent.wav", np.zeros(50000), 22050)
    return folder


# --- the scores ---

def test_a_recording_in_windows_has_the_scores_of_evaluation(plain, recordings, tmp_path, monkeypatch):
    with without_pictures(monkeypatch):
        evaluate.main(["--ckpt", str(plain), "--data", str(recordings), "--out", str(tmp_path / "e"), "--device", "cpu", "--amp",
                       "off"])
    expected = dict(zip([row["path"] for row in rows(tmp_path / "e" / "predictions.csv")],
                        np.load(tmp_path / "e" / "scores.npz")["scores"].astype(float), strict=True))
    run(plain, tmp_path / "p", recordings, "--threshold", 0, "--top-k", 3, "--batch-size", 5)
    found = {}
    for row in rows(tmp_path / "p" / "files.csv"):
        found.setdefault(os.path.relpath(row["path"], recordings), {})[row["label"]] = float(row["score"])
    assert found.keys() == expected.keys() and len(found) == 11
    classes = load_checkpoint(plain)["classes"]
    ours = np.array([[found[path][name] for name in classes] for path in expected])
    theirs = np.array(list(expected.values()))
    assert theirs.std(axis=0).min() > 0.01  # they tell the recordings apart
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert sum(int(row["windows"]) for row in rows(tmp_path / "p" / "files.csv")) == 3 * metrics["tiles"]


def by_hand(ckpt, path, hop=None):
    """(n,) starts and ends in seconds, (n, classes) probabilities and (n, dim) features of a recording's windows, each read
    from the file and scored alone."""
    state = load_checkpoint(ckpt)
    model, frontend = restore(state, torch.device("cpu"))
    model.eval()
    size, rate = state["clip"]["samples"], frontend.config.sample_rate
    info = sf.info(path)
    total = round(float(np.float32(info.frames / info.samplerate)) * rate)  # as evaluation counts
    starts = tile_starts(total, size, hop and round(hop * rate))
    waves = [read(path, rate, start, min(size, total - start)) for start in starts]
    with torch.inference_mode():
        specs = [frontend(torch.from_numpy(fit(wave, size, state["clip"]["short"]))[None]) for wave in waves]
        return (np.array(starts) / rate, np.array([start + len(wave) for start, wave in zip(starts, waves)]) / rate,
                np.concatenate([model(spec).double().softmax(1).numpy() for spec in specs]),
                np.concatenate([model.features(spec).numpy() for spec in specs]))


def some_of_each(scores):
    """Thresholds, no score within 1e-4 of them, that in some windows (n, classes) no class reaches and in others several."""
    choices = [[value for value in np.linspace(*np.quantile(column, [0.1, 0.9]), 25) if abs(column - value).min() > 1e-4]
               for column in scores.T]
    best = max(itertools.product(*choices), key=lambda t: min(((scores >= t).sum(1) == n).sum() for n in (0, 2)))
    return [float(value) for value in best]


def test_windows_and_embeddings_by_hand(ckpt, recordings, tmp_path):
    temperature, paths = 0.5, [str(path) for path in sorted(recordings.rglob("*.wav"))]
    hands = {path: by_hand(ckpt, path, 0.4) for path in paths}
    thresholds = some_of_each(softmax(np.log(np.concatenate([p for _, _, p, _ in hands.values()])) / temperature, axis=1))
    calibrated = changed(ckpt, tmp_path / "c.pt", calibration={"temperature": temperature, "thresholds": thresholds})
    classes = load_checkpoint(ckpt)["classes"]
    run(calibrated, tmp_path / "p", recordings, "--hop", 0.4, "--top-k", 2, "--embeddings", "--batch-size", 4)
    heard = {}
    for row in rows(tmp_path / "p" / "windows.csv"):
        if row["label"]:
            heard.setdefault((row["path"], row["label"]), []).append((row["score"], row["start"]))
    told = {(row["path"], row["label"]): (int(row["windows"]), row["highest"], row["at"]) for row in rows(tmp_path / "p" / "classes.csv")}
    best = {key: max(found, key=lambda one: float(one[0])) for key, found in heard.items()}
    assert told == {key: (len(found), *best[key]) for key, found in heard.items()} and len(told) > 10
    table, files, empty, several = rows(tmp_path / "p" / "windows.csv"), rows(tmp_path / "p" / "files.csv"), 0, 0
    assert list(dict.fromkeys(row["path"] for row in table)) == paths
    for path, (starts, ends, p, features) in hands.items():
        scores = softmax(np.log(p) / temperature, axis=1)
        expected = []
        for start, end, s in zip(starts, ends, scores, strict=True):
            kept = sorted([(-s[c], classes[c]) for c in np.argsort(-s)[:2] if s[c] >= thresholds[c]])
            expected += [(f"{start:.3f}", f"{end:.3f}", label, minus and -minus) for minus, label in kept or [(None, "")]]
            empty, several = empty + (not kept), several + (len(kept) > 1)
        own = [row for row in table if row["path"] == path]
        assert [(row["start"], row["end"], row["label"]) for row in own] == [one[:3] for one in expected]
        for row, (*_, score) in zip(own, expected):
            assert row["score"] == "" if score is None else float(row["score"]) == pytest.approx(score, abs=5e-5)
        whole = softmax(np.log(p.mean(axis=0)) / temperature)  # calibrated as a clip is, after the mean
        mine = {row["label"]: row for row in files if row["path"] == path}
        best = [c for c in np.argsort(-whole)[:2] if whole[c] >= thresholds[c]]
        assert list(mine) == ([classes[c] for c in best] or [""])
        for c in best:
            row = mine[classes[c]]
            assert float(row["score"]) == pytest.approx(whole[c], abs=5e-5) and int(row["windows"]) == len(starts)
            assert float(row["seconds"]) == pytest.approx(sf.info(path).duration, abs=1e-3)
        with np.load(tmp_path / "p" / "embeddings" / (os.path.relpath(path, recordings) + ".npz")) as file:
            assert file["embeddings"].dtype == np.float32
            np.testing.assert_allclose(file["embeddings"], features, atol=2e-4)
            np.testing.assert_allclose(file["start"], starts)
            np.testing.assert_allclose(file["end"], ends)
    assert empty > 3 and several > 3  # both happened


def test_a_number_replaces_all_thresholds(ckpt, recordings, tmp_path):
    strict = changed(ckpt, tmp_path / "c.pt", calibration={"temperature": 1.0, "thresholds": [1.0, 1.0, 1.0]})
    run(strict, tmp_path / "a", recordings)
    run(strict, tmp_path / "b", recordings, "--threshold", 0)
    assert {row["label"] for row in rows(tmp_path / "a" / "windows.csv")} == {""}
    assert "" not in {row["label"] for row in rows(tmp_path / "b" / "windows.csv")}


# --- the formats ---

RAVEN = ["Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)", "Label", "Score"]


def test_all_formats_say_the_same(plain, recordings, tmp_path):
    out = tmp_path / "p"
    run(plain, out, recordings, "--format", "csv,jsonl,raven,audacity", "--threshold", 0.4, "--top-k", 2)
    said = [(row["path"], float(row["start"]), float(row["end"]), row["label"], row["score"])
            for row in rows(out / "windows.csv")]
    with open(out / "windows.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [(line["path"], line["start"], line["end"], label["label"], f"{label['score']:.6f}") for line in lines
            for label in line["labels"] or [{"label": "", "score": 0}]] == [
                (*row[:4], row[4] or "0.000000") for row in said]
    assert any(row[3] == "" for row in said)
    for path in sorted({row[0] for row in said}):
        own = [row[1:] for row in said if row[0] == path and row[3]]
        name = os.path.relpath(path, recordings)
        with open(out / "raven" / f"{name}.Table.1.selections.txt", newline="", encoding="utf-8") as file:
            head, *table = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        assert head == RAVEN and [int(row[0]) for row in table] == list(range(1, len(own) + 1))
        for row, (start, end, label, score) in zip(table, own, strict=True):
            assert row[1:3] == ["Spectrogram 1", "1"] and row[7:] == [label, score]
            assert [float(value) for value in row[3:7]] == [pytest.approx(start, abs=6e-4), pytest.approx(end, abs=6e-4), 0,
                                                            min(11025, sf.info(path).samplerate / 2)]
        track = (out / "audacity" / f"{name}.txt").read_text()
        assert all(re.fullmatch(r"\d+\.\d{6}\t\d+\.\d{6}\t[a-z]+", line) for line in track.splitlines())
        assert [(float(line.split("\t")[0]), line.split("\t")[2]) for line in track.splitlines()] == [
            (pytest.approx(start, abs=6e-4), label) for start, _, label, _ in own]


def test_names_and_labels_are_text(ckpt, tmp_path):
    """Names that are not UTF-8, with tabs, line breaks and quotes, of the same stem; a class that looks like more columns."""
    strange = changed(ckpt, tmp_path / "s.pt", classes=['a\tb\n3\t"x', "=1+1, 2", "käfer"])
    names = [os.fsdecode(b"caf\xe9.wav"), "two\nlines.wav", 'tab\t"quoted", x.wav', "same.wav", "same.flac", "deep/same.wav"]
    for i, name in enumerate(names):
        (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / "r" / ("x" + os.path.splitext(name)[1]), tone(1, hz=300 + 900 * i), 16000)
        os.rename(tmp_path / "r" / ("x" + os.path.splitext(name)[1]), tmp_path / "r" / name)
    out = tmp_path / "p"
    run(strange, out, tmp_path / "r", "--format", "csv,jsonl,raven,audacity", "--threshold", 0, "--top-k", 3, "--embeddings")
    paths = {str(tmp_path / "r" / name) for name in names}
    assert {row["path"] for row in rows(out / "windows.csv")} == {row["path"] for row in rows(out / "files.csv")} == paths
    assert {json.loads(line)["path"] for line in (out / "windows.jsonl").read_text(encoding="utf-8").splitlines()} == paths
    for folder, columns in (("raven", 9), ("audacity", 3), ("embeddings", None)):
        files = [path for path in (out / folder).rglob("*") if path.is_file()]
        assert len(files) == len(names)
        for path in files:
            str(path).encode()  # a name of UTF-8
            assert str(path).isprintable()
            if columns:
                assert {line.count("\t") + 1 for line in path.read_text(encoding="utf-8").splitlines()} == {columns}


# --- what cannot be read ---

def test_bad_files_are_listed_and_the_rest_goes_on(ckpt, tmp_path, capsys):
    data = tmp_path / "r"
    data.mkdir()
    for i in range(4):
        sf.write(data / f"{i}.wav", tone(2, hz=300), 16000)
    (data / "1b.wav").write_text("no audio")
    (data / "2b.wav").symlink_to("nowhere")
    sf.write(data / "3b.flac", tone(20, hz=300), 16000)  # decodes for some windows
    (data / "3b.flac").write_bytes((data / "3b.flac").read_bytes()[:-100_000])
    whole = tmp_path / "whole"
    run(ckpt, whole, *sorted(data.glob("?.wav")), "--batch-size", 2)
    run(ckpt, tmp_path / "p", data, "--batch-size", 2, "--format", "csv,audacity")
    out = capsys.readouterr().out
    bad = rows(tmp_path / "p" / "bad_files.csv")
    assert [os.path.basename(row["path"]) for row in bad] == ["1b.wav", "2b.wav", "3b.flac"] and all(row["reason"] for row in bad)
    assert "2 unreadable recordings" in out and "3b.flac: " in out
    for name in ("windows.csv", "files.csv"):
        others = [row for row in rows(tmp_path / "p" / name) if "3b.flac" not in row["path"]]
        assert 3 < len(others) < len(rows(tmp_path / "p" / name))  # the sound part of 3b is used
        assert [row["label"] for row in others] == [row["label"] for row in rows(whole / name)]
    sf.write(data / "3c.flac", tone(20, hz=300), 16000)
    os.replace(data / "3c.flac", data / "3b.flac")  # mended
    (data / "2.wav").write_text("no audio any more")
    run(ckpt, tmp_path / "p", data, "--batch-size", 2, "--format", "csv,audacity")
    assert [os.path.basename(row["path"]) for row in rows(tmp_path / "p" / "bad_files.csv")] == ["1b.wav", "2.wav", "2b.wav"]
    left = ["0.wav", "1.wav", "3.wav", "3b.flac"]
    assert [os.path.basename(row["path"]) for row in rows(tmp_path / "p" / "files.csv")] == left
    assert sorted(path.name for path in (tmp_path / "p" / "audacity").iterdir()) == [name + ".txt" for name in left]


def test_a_file_that_could_not_be_read_for_a_while_is_tried_again(ckpt, tmp_path, capsys):
    """A disk or a network that comes back leaves size and time of a file as they were."""
    for name in ("a.flac", "b.flac"):
        sf.write(tmp_path / name, tone(20, hz=300), 16000)
    sound = (tmp_path / "a.flac").read_bytes()
    broken = sound[:len(sound) // 2] + bytes(len(sound) - len(sound) // 2)
    for content, bad in ((broken, 1), (broken, 1), (sound, 0)):
        (tmp_path / "a.flac").write_bytes(content)
        os.utime(tmp_path / "a.flac", (1e9, 1e9))
        run(ckpt, tmp_path / "p", tmp_path)
        assert len(rows(tmp_path / "p" / "bad_files.csv")) == bad
        assert ("a.flac" in (tmp_path / "p" / "bad_files.csv").read_text()) == bool(bad)
    done = re.findall(r"predicted: (\d+) recordings?", capsys.readouterr().out)
    assert done == ["2", "0", "2"]  # they share a group


def test_nothing_to_predict_is_exit_code_2(ckpt, tmp_path):
    (tmp_path / "a.wav").write_text("no audio")
    done = subprocess.run(command(ckpt, tmp_path / "p", tmp_path / "a.wav"), capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "bad_files.csv" in done.stderr
    assert [row["path"] for row in rows(tmp_path / "p" / "bad_files.csv")] == [str(tmp_path / "a.wav")]


@pytest.mark.parametrize("flags, says", [
    (["nowhere"], "nowhere"), (["."], "no audio"), (["x.wav", "--hop", "2"], "at most 0.9"), (["x.wav", "--hop", "0"], "--hop"),
    (["x.wav", "--hop", "nan"], "--hop"), (["x.wav", "--top-k", "0"], "--top-k"),
    (["x.wav", "--threshold", "1.5"], "--threshold"), (["x.wav", "--threshold", "nan"], "--threshold"),
    (["x.wav", "--format", "csv,xml"], "xml"), (["x.wav", "--batch-size", "0"], "--batch-size"),
    (["x.wav", "--workers", "0"], "--workers"), (["x.wav", "--device", "tpu"], "--device"), ([], "FILES_OR_FOLDERS"),
    (["x.wav", "--out", "x.wav"], "--out"), (["x.wav", "--out", "other"], "other things"),
    (["x.wav", "--ckpt", "none.pt"], "none.pt"),
])
def test_wrong_flags(flags, says, ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").touch()
    if flags and flags[0] == "x.wav":
        sf.write("x.wav", tone(1), 16000)
    run(ckpt, "p", *flags, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error and "--run-dir" not in error


def test_a_bare_name_is_the_newest_runs(ckpt, recordings, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "best.pt").symlink_to(ckpt)
    monkeypatch.chdir(tmp_path)
    run("best.pt", "predictions", recordings / "low" / "1.wav")
    out = capsys.readouterr().out
    assert "runs/a/best.pt" in out and re.search(r"1 recording, 3 windows, 3 s of audio in .*, \d+ times real time", out)
    assert "written: predictions/files.csv, classes.csv, windows.csv" in out


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        predict.parse(["--help"])
    text = capsys.readouterr().out
    assert "--embeddings" in text and "merged" in text and not re.search(r"%\(", text)


# --- stopped, continued, begun again ---

@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """200 recordings of one to three windows, and one of 200 windows in their midst."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(200):
        sf.write(folder / f"{i:03d}.wav", tone(0.6 + i % 5 * 0.4, 22050, hz=300 + 12 * i, seed=i), 22050)
    sf.write(folder / "100a.wav", tone(180, 22050, hz=900), 22050)
    return folder


FLAGS = ["--batch-size", "3", "--top-k", "2", "--threshold", "0.2", "--embeddings", "--format", "csv,jsonl,raven,audacity"]


@pytest.fixture(scope="module")
def untouched(ckpt, many, tmp_path_factory):
    out = tmp_path_factory.mktemp("untouched") / "p"
    subprocess.run(command(ckpt, out, many, *FLAGS), check=True, capture_output=True, env=ENV)
    return everything(out)


def stopped(arguments, out, signum, parts):
    """Start a run, send the signal once so many recordings are done -> (exit code, recordings done)."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENV)
    while len(list((out / "parts").glob("*.jsonl"))) < parts and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signum)
    error = process.communicate(timeout=120)[1]
    assert b"Traceback" not in error
    return process.returncode, len(list((out / "parts").glob("*.jsonl")))


def test_stopped_in_every_way_it_ends_with_the_bytes_of_a_run_that_was_not(ckpt, many, untouched, tmp_path):
    out, before = tmp_path / "p", 0
    for parts, signum, code in ((30, signal.SIGTERM, 143), (80, signal.SIGINT, 130), (120, signal.SIGKILL, -9)):
        got, now = stopped(command(ckpt, out, many, *FLAGS), out, signum, parts)
        assert got == code and before < parts <= now < 201
        found, before = everything(out), now
        assert "windows.csv" not in found and all(untouched[name] == found[name] for name in found if name.endswith(".jsonl"))
        assert signum == signal.SIGKILL or not [name for name in found if name.endswith(".tmp")]
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.jsonl")}
    done = subprocess.run(command(ckpt, out, many, *FLAGS), check=True, capture_output=True, text=True, env=ENV)
    again = int(re.search(r"predicted: (\d+) recordings?", done.stdout)[1])
    assert 201 - before <= again <= 201 - before + 8 * 3  # at most a group's windows are done twice
    assert sum(path.stat().st_mtime_ns == time for path, time in kept.items()) == 201 - again
    found = everything(out)
    assert all(name.endswith(".tmp") for name in found.keys() - untouched.keys())
    assert {name: found[name] for name in untouched} == untouched


def test_other_settings_in_the_same_folder_are_refused(ckpt, recordings, tmp_path, capsys):
    out = tmp_path / "p"
    run(ckpt, out, recordings, "--top-k", 2)
    before = everything(out)
    other = changed(ckpt, tmp_path / "other.pt", calibration=None)
    for flags, says in [(["--top-k", 3], "top_k 2"), (["--hop", 0.5], "hop 0.9"), (["--threshold", 0.5], "threshold"),
                        (["--embeddings"], "embeddings"), (["--ckpt", other], "checkpoint"), (["--amp", "bf16"], "amp")]:
        capsys.readouterr()
        run(ckpt, out, recordings, *(["--top-k", 2] if flags[0] != "--top-k" else []), *flags, code=2)
        error = capsys.readouterr().err
        assert error.startswith("error: --out") and error.count("\n") == 1 and says in error and "another --out" in error
    assert everything(out) == before
    run(ckpt, out, recordings, "--top-k", 2, "--batch-size", 3, "--format", "audacity")  # these change no score
    assert len(list((out / "audacity").rglob("*.txt"))) == 11
    assert "predicted: 0 recordings" in capsys.readouterr().out


def test_a_recording_that_changed_is_done_again(ckpt, tmp_path, capsys):
    data, out = tmp_path / "r", tmp_path / "p"
    data.mkdir()
    for i in range(60):
        sf.write(data / f"{i:02d}.wav", tone(0.9, 22050, hz=300 + 20 * i), 22050)
    run(ckpt, out, data, "--threshold", 0, "--batch-size", 1)
    before = rows(out / "windows.csv")
    sf.write(data / "07.wav", tone(0.9, 22050, hz=4000), 22050)
    sf.write(data / "60.wav", tone(0.9, 22050, hz=4000), 22050)
    (data / "59.wav").unlink()
    parts = sorted((out / "parts").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:-5])  # a power cut
    capsys.readouterr()
    run(ckpt, out, data, "--threshold", 0, "--batch-size", 1)
    after = rows(out / "windows.csv")
    assert [os.path.basename(row["path"]) for row in after] == [f"{i:02d}.wav" for i in range(61) if i != 59]
    differ = [row["path"] for row, old in zip(after[:59], before) if row != old]
    assert [os.path.basename(path) for path in differ] == ["07.wav"]
    again = int(re.search(r"predicted: (\d+) recordings?", capsys.readouterr().out)[1])
    assert again in (12, 20)  # one or two groups of 8, and the last, of 4


def test_two_runs_do_not_write_to_one_folder(ckpt, recordings, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    with open(tmp_path / "p" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(ckpt, tmp_path / "p", recordings, code=2)
    error = capsys.readouterr().err
    assert "another run is writing there" in error and "--out" in error


# --- memory ---

PEAKS = """
import predict, resource, sys
for minutes in ("4", "24"):
    predict.main([*sys.argv[1:], "--out", "p" + minutes, minutes + ".wav"])
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_a_recording(ckpt, tmp_path):
    """24 minutes take what 4 take: a few MiB more, where all that is decoded would be 70 and 100 at the model's rate."""
    rng = np.random.default_rng(0)
    for minutes in (4, 24):
        with sf.SoundFile(tmp_path / f"{minutes}.wav", "w", 16000, 1) as file:
            for _ in range(minutes):
                file.write(0.1 * rng.standard_normal(16000 * 60))
    flags = ["--ckpt", ckpt, "--device", "cpu", "--amp", "off", "--embeddings"]
    done = subprocess.run([sys.executable, "-c", PEAKS, *flags], cwd=tmp_path, check=True, capture_output=True, text=True,
                          env={**ENV, "PYTHONPATH": str(ROOT)})
    low, high = (int(kib) / 1024 for kib in re.findall(r"^peak (\d+)$", done.stdout, re.M))
    assert int(rows(tmp_path / "p24" / "files.csv")[0]["windows"]) > 1590
    assert high - low < 12
