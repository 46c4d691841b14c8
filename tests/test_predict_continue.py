"""predict.py stopped and continued, given other settings or changed recordings; its memory."""
import fcntl
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf
from conftest import ROOT, tone
from predict_runs import (
    ONE_THREAD,
    command,
    contents,
    file_names,
    rows,
    run,
    train_tiny,
    with_parts,
    write_recordings,
)

from report.predictions import LEFTOVER


@pytest.fixture(scope="module")
def ckpt(tones, tmp_path_factory):
    return train_tiny(tones, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("recordings"))


def n_predicted(printed):
    """How many recordings each run of predict.py predicted, from what it printed."""
    return [int(number) for number in re.findall(r"predicted: (\d+) recordings?", printed)]


# --- stopped and continued ---

FLAGS = ["--batch-size", "3", "--top-k", "2", "--threshold", "0.2", "--embeddings",
         "--format", "csv,jsonl,raven,audacity"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """200 recordings of one to three windows; after half of them one of 200 windows."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(200):
        wave = tone(0.6 + i % 5 * 0.4, 22050, hz=300 + 12 * i, seed=i)
        sf.write(folder / f"{i:03d}.wav", wave, 22050)
    sf.write(folder / "100a.wav", tone(180, 22050, hz=900), 22050)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(ckpt, many, tmp_path_factory):
    """The contents of the folder of a run that was not stopped."""
    out = tmp_path_factory.mktemp("uninterrupted") / "p"
    subprocess.run(command(ckpt, out, many, *FLAGS), check=True, capture_output=True,
                   env=ONE_THREAD)
    return contents(out)


def stop_after(n_parts, signum, words, out):
    """Start predict.py; send the signal when that many parts exist -> exit code."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env=ONE_THREAD)
    while len(list((out / "parts").glob("*.jsonl"))) < n_parts and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signum)
    error = process.communicate(timeout=120)[1]
    assert b"Traceback" not in error
    return process.returncode


def leftovers(names):
    return {name for name in names if LEFTOVER.fullmatch(os.path.basename(name))}


def test_stopped_by_any_signal_the_results_are_those_of_an_uninterrupted_run(
        ckpt, many, uninterrupted, tmp_path):
    out, n_before = tmp_path / "p", 0
    words = command(ckpt, out, many, *FLAGS)
    for n_parts, signum, code in ((30, signal.SIGTERM, 143), (80, signal.SIGINT, 130),
                                  (120, signal.SIGKILL, -9)):
        assert stop_after(n_parts, signum, words, out) == code
        n_done = len(list((out / "parts").glob("*.jsonl")))
        assert n_before < n_parts <= n_done < 201
        n_before, stored = n_done, contents(out)
        assert "windows.csv" not in stored
        for name in stored:
            if name.endswith(".jsonl"):
                assert stored[name] == uninterrupted[name], name
        if signum != signal.SIGKILL:
            assert not leftovers(stored)
    written = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.jsonl")}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=ONE_THREAD)
    [n_repeated] = n_predicted(done.stdout)
    # One group of eight batches at most is repeated.
    assert 201 - n_before <= n_repeated <= 201 - n_before + 8 * 3
    n_untouched = sum(path.stat().st_mtime_ns == time for path, time in written.items())
    assert n_untouched == 201 - n_repeated
    assert contents(out) == uninterrupted


def test_leftovers_of_a_killed_process_are_removed_and_other_files_are_not(ckpt, tmp_path):
    sf.write(tmp_path / "a.wav", tone(1), 16000)
    out = tmp_path / "p"
    leftover = [".settings.json.k3_x90ab", "parts/." + "0" * 32 + ".jsonl.abcdefgh"]
    (out / "parts").mkdir(parents=True)
    for name in leftover:
        (out / name).touch()
    run(ckpt, out, tmp_path / "a.wav")
    assert not any((out / name).exists() for name in leftover)
    (out / ".files.csv.abcdefgh").touch()
    (out / ".gitignore").write_text("*")
    (out / ".ipynb_checkpoints").mkdir()
    run(ckpt, out, tmp_path / "a.wav")
    assert sorted(path.name for path in out.iterdir()) == [
        ".gitignore", ".ipynb_checkpoints", ".lock", "bad_files.csv", "classes.csv", "files.csv",
        "parts", "settings.json", "windows.csv"]


def test_folder_of_another_process_is_refused(ckpt, recordings, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    with open(tmp_path / "p" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(ckpt, tmp_path / "p", recordings, code=2)
    error = capsys.readouterr().err
    assert "another run is writing there" in error
    assert "--out" in error


# --- other settings, other recordings ---

@pytest.fixture(scope="module")
def with_top_k_2(ckpt, recordings, tmp_path_factory):
    out = tmp_path_factory.mktemp("settings") / "p"
    run(ckpt, out, recordings, "--top-k", 2)
    return out


@pytest.mark.parametrize("flags, name", [
    (["--top-k", 3], "top_k"),
    (["--top-k", 2, "--hop", 0.5], "hop"),
    (["--top-k", 2, "--threshold", 0.5], "threshold"),
    (["--top-k", 2, "--embeddings"], "embeddings"),
    (["--top-k", 2, "--amp", "bf16"], "amp"),
    (["--top-k", 2, "--ckpt", "other.pt"], "checkpoint"),
])
def test_folder_with_other_settings_is_refused(flags, name, ckpt, recordings, with_top_k_2,
                                               tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with_parts(ckpt, tmp_path / "other.pt", calibration=None)
    before = contents(with_top_k_2)
    run(ckpt, with_top_k_2, recordings, *flags, code=2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out {with_top_k_2}")
    assert error.count("\n") == 1
    assert name in error
    assert contents(with_top_k_2) == before


def test_flags_that_change_no_score_may_differ(ckpt, recordings, with_top_k_2, capsys):
    run(ckpt, with_top_k_2, recordings, "--top-k", 2, "--batch-size", 3, "--format", "audacity")
    assert len(list((with_top_k_2 / "audacity").rglob("*.txt"))) == 11
    assert n_predicted(capsys.readouterr().out) == [0]


def test_changed_recordings_and_damaged_parts_are_predicted_again(ckpt, tmp_path, capsys):
    data, out = tmp_path / "r", tmp_path / "p"
    data.mkdir()
    for i in range(60):
        sf.write(data / f"{i:02d}.wav", tone(0.9, 22050, hz=300 + 20 * i), 22050)
    run(ckpt, out, data, "--threshold", 0, "--batch-size", 1)
    before = rows(out / "windows.csv")
    sf.write(data / "07.wav", tone(0.9, 22050, hz=4000), 22050)
    sf.write(data / "60.wav", tone(0.9, 22050, hz=4000), 22050)
    (data / "59.wav").unlink()
    damaged = min((out / "parts").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-5])  # as after a power cut
    capsys.readouterr()
    run(ckpt, out, data, "--threshold", 0, "--batch-size", 1)
    after = rows(out / "windows.csv")
    assert file_names(out / "windows.csv") == [f"{i:02d}.wav" for i in range(61) if i != 59]
    changed = [row["path"] for row, old in zip(after[:59], before) if row != old]
    assert [os.path.basename(path) for path in changed] == ["07.wav"]
    # The last group, of 4, and one or two groups of 8.
    assert n_predicted(capsys.readouterr().out)[0] in (12, 20)


def test_unreadable_recording_is_tried_again(ckpt, tmp_path, capsys):
    """A disk or network that works again leaves size and time of a file as they were."""
    for name in ("a.flac", "b.flac"):
        sf.write(tmp_path / name, tone(20, hz=300), 16000)
    intact = (tmp_path / "a.flac").read_bytes()
    half = len(intact) // 2
    broken = intact[:half] + bytes(len(intact) - half)
    for content, n_bad in ((broken, 1), (broken, 1), (intact, 0)):
        (tmp_path / "a.flac").write_bytes(content)
        os.utime(tmp_path / "a.flac", (1e9, 1e9))
        run(ckpt, tmp_path / "p", tmp_path)
        assert len(rows(tmp_path / "p" / "bad_files.csv")) == n_bad
        assert ("a.flac" in file_names(tmp_path / "p" / "files.csv")) == (n_bad == 0)
    assert n_predicted(capsys.readouterr().out) == [1, 0, 2]  # the two share a group


# --- memory ---

PRINT_PEAKS = """
import predict, resource, sys
for minutes in ("4", "24"):
    predict.main([*sys.argv[1:], "--out", "p" + minutes, minutes + ".wav"])
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_recording(ckpt, tmp_path):
    """24 minutes need a few MiB more than 4, not the 70 to 100 MiB of their samples."""
    rng = np.random.default_rng(0)
    for minutes in (4, 24):
        with sf.SoundFile(tmp_path / f"{minutes}.wav", "w", 16000, 1) as file:
            for _ in range(minutes):
                file.write(0.1 * rng.standard_normal(16000 * 60))
    flags = ["--ckpt", ckpt, "--device", "cpu", "--amp", "off", "--embeddings"]
    done = subprocess.run([sys.executable, "-c", PRINT_PEAKS, *flags], cwd=tmp_path, check=True,
                          capture_output=True, text=True,
                          env={**ONE_THREAD, "PYTHONPATH": str(ROOT)})
    low, high = (int(kib) / 1024 for kib in re.findall(r"^peak (\d+)$", done.stdout, re.M))
    assert int(rows(tmp_path / "p24" / "files.csv")[0]["windows"]) > 1590
    assert high - low < 12
