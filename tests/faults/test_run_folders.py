"""Two runs on one folder, and folders that cannot be written (fault 6)."""
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from checkpoints import check_one_line
from conftest import ROOT
from harness import TINY, exit_code, outcome, program, stop_at

import train
import util
from core.run.checkpoint import load_checkpoint, save_checkpoint
from core.run.folder import RunError, create_run, is_being_written, lock_run
from core.scoring import find_checkpoint


def contents(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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


# --- the files of another run ---

@pytest.mark.parametrize("given", ["beside it", "as its folder"])
def test_checkpoint_of_another_run_overwrites_nothing(given, tones, run_copy, tmp_path,
                                                      monkeypatch, capsys):
    """Beside the files of a run, or with --run-dir; a folder of its own is fine."""
    assert program(monkeypatch, tmp_path / "other", "--seed", 1, data=tones,
                   prepare=stop_at(3)) == 143
    checkpoint = tmp_path / "other" / "run" / "last.pt"
    if given == "beside it":
        shutil.copyfile(checkpoint, run_copy / "from_a_friend.pt")
        checkpoint = run_copy / "from_a_friend.pt"
    before = contents(run_copy)
    capsys.readouterr()
    flags = ["--run-dir", run_copy] if given == "as its folder" else []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert exit_code(train.main, "--resume", checkpoint, *flags) == 2
    check_one_line(capsys.readouterr().err, str(checkpoint), "another run", "--run-dir")
    after = contents(run_copy)
    after.pop(".lock", None)
    assert after == {name: value for name, value in before.items() if name != ".lock"}
    new = tmp_path / "new"
    assert program(monkeypatch, tmp_path, "--resume", checkpoint, "--run-dir", new) == 0
    assert load_checkpoint(new / "last.pt")["progress"]["epoch"] == 2


def test_earlier_checkpoint_does_not_overwrite_a_later_one(run_copy, tmp_path, monkeypatch,
                                                           capsys):
    before = contents(run_copy)
    monkeypatch.setenv("HOME", str(tmp_path))
    earlier = run_copy / "last.pt.prev"
    assert exit_code(train.main, "--resume", earlier) == 2
    check_one_line(capsys.readouterr().err, str(earlier), "step 6", "step 12", "--run-dir")
    assert contents(run_copy)["last.pt"] == before["last.pt"]
    new = tmp_path / "new"
    assert program(monkeypatch, tmp_path, "--resume", earlier, "--run-dir", new) == 0
    assert outcome(new) == outcome(run_copy)


def test_starts_in_one_second_get_folders_of_their_own(tmp_path):
    name = tmp_path / "runs" / "20260101-000000-birds"
    folders = [create_run(name, may_rename=True) for _ in range(3)]
    assert [folder.name for folder in folders] == [name.name, f"{name.name}-2", f"{name.name}-3"]


def test_control_a_name_that_a_person_gave_is_not_changed(tmp_path):
    create_run(tmp_path / "run")
    (tmp_path / "run" / "file").touch()
    with pytest.raises(RunError, match="exists already"):
        create_run(tmp_path / "run")


# --- locks ---

def test_forked_processes_do_not_hold_the_lock(tmp_path):
    """A worker outlives a run that was killed."""
    read, write = os.pipe()
    run = os.fork()
    if run == 0:
        lock_run(tmp_path)
        if os.fork() == 0:
            signal.alarm(60)
        else:
            os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    assert is_being_written(tmp_path)
    with pytest.raises(RunError):
        lock_run(tmp_path)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert not is_being_written(tmp_path)
    lock_run(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_file_system_without_locks_is_used_without(code, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(util, "_told", set())
    for name in ("a", "b"):
        create_run(tmp_path / name)
    assert capsys.readouterr().out.count("locks") == 1


def test_newest_run_that_is_being_written_is_named(run_copy, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "a"
    run.parent.mkdir()
    run_copy.rename(run)
    monkeypatch.chdir(tmp_path)
    find_checkpoint("best.pt")
    assert capsys.readouterr().out == ""
    with open(run / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        find_checkpoint("best.pt")
    assert "runs/a, is still being written" in capsys.readouterr().out


# --- recordings that have moved ---

def test_run_goes_on_with_recordings_that_have_moved(tones, finished_run, tmp_path, monkeypatch,
                                                     capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tones, here)
    assert program(monkeypatch, tmp_path, "--ema", 0, data=here, prepare=stop_at(4)) == 143
    here.rename(there)
    assert program(monkeypatch, tmp_path, "--resume") == 2
    check_one_line(capsys.readouterr().err, str(here))
    assert program(monkeypatch, tmp_path, "--resume", "--data", there) == 0
    assert outcome(tmp_path / "run") == outcome(finished_run)


@pytest.mark.parametrize("change", ["other sound", "other length", "missing"])
@pytest.mark.parametrize("has_fingerprint", [True, False])
def test_other_recordings_are_refused_on_resume(change, has_fingerprint, tones, run_copy, tmp_path,
                                                monkeypatch, capsys):
    """Also those of the same names and sizes; a run of an earlier version knows lengths only."""
    if not has_fingerprint:
        last = load_checkpoint(run_copy / "last.pt")
        save_checkpoint(run_copy / "last.pt", {**last, "fingerprint": None})
    there = tmp_path / "there"
    shutil.copytree(tones, there)
    file = there / "mid" / "mid3.wav"
    if change == "other sound":
        file.write_bytes((there / "low" / "low3.wav").read_bytes())
    elif change == "other length":
        sf.write(file, np.zeros(20_000, np.float32), 16000)
    else:
        file.unlink()
    code = program(monkeypatch, tmp_path, "--resume", "--data", there)
    if change == "other sound" and not has_fingerprint:
        assert code == 0  # not known
        return
    assert code == 2
    check_one_line(capsys.readouterr().err, str(there))
