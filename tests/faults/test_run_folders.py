"""Two runs on one folder, and folders that cannot be written (fault 6)."""
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from checkpoints import check_one_line
from conftest import ROOT
from harness import TINY, program

import train
from core.run.checkpoint import load_checkpoint
from core.run.folder import RunError, lock_run


def contents(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_second_run_on_a_folder_is_refused_while_the_first_lives(tones, tmp_path, monkeypatch,
                                                                 capsys):
    """Also while the first one is stopped; the lock of a killed process is free again."""
    run = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--data", str(tones), *TINY, "--run-dir", "run"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(tmp_path)})
    try:
        for _ in first.stdout:
            if (run / "last.pt").exists():
                break
        first.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, first.pid, os.WSTOPPED)
        before = contents(run)
        for flags in (["--resume"], ["--resume", run / "last.pt"], ["--resume", "auto"]):
            assert program(monkeypatch, tmp_path, *flags) == 2
            check_one_line(capsys.readouterr().err, str(run))
        assert program(monkeypatch, tmp_path, data=tones) == 2
        check_one_line(capsys.readouterr().err, str(run), "--resume")
        assert contents(run) == before
    finally:
        first.kill()
        first.wait()
    assert program(monkeypatch, tmp_path, "--resume") == 0
    assert load_checkpoint(run / "last.pt")["progress"]["epoch"] == 2


def test_folder_is_locked_before_the_first_save(tones, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with open(run / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert program(monkeypatch, tmp_path, data=tones) == 2
    check_one_line(capsys.readouterr().err, str(run))
    assert os.listdir(run) == [".lock"]


def test_control_without_the_lock_two_processes_use_one_folder(tmp_path, monkeypatch):
    with open(tmp_path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=str(tmp_path)):
            lock_run(tmp_path)
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
        lock_run(tmp_path)


@pytest.mark.parametrize("place", ["below a file", "in /proc", "a file"])
def test_folder_that_cannot_be_written_is_refused_before_the_first_step(
        place, tones, finished_run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("a file")
    run = {"below a file": file / "run", "a file": file, "in /proc": "/proc/warble"}[place]
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step was made"))
    for flags in (["--data", tones, *TINY], ["--resume", finished_run / "last.pt"],
                  ["--resume"], ["--resume", "auto", "--data", tones, *TINY]):
        assert program(monkeypatch, tmp_path, *flags, "--run-dir", run) == 2
        check_one_line(capsys.readouterr().err, str(run))
    assert file.read_text() == "a file"
