"""Signals to all processes of a run, workers that die, and output that goes nowhere."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from checkpoints import check_one_line
from conftest import ROOT
from harness import TINY, exit_code, program, rows, without_pictures

import train
from core.device import shared_memory
from core.run.checkpoint import load_checkpoint
from core.run.signals import StopRequest
from data import clips as clips_module

LONG = ["--epochs", "40", "--patience", "40", "--workers", "2", "--run-dir", "run"]


def environment(home):
    return {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}


def obey_hangups():
    """In the new process: as in a terminal, also if the tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(folder, *flags, **options):
    """Start train.py as the leader of a process group of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)], cwd=folder,
                            env=environment(folder), text=True, start_new_session=True,
                            preexec_fn=obey_hangups, **options)


def wait_for_steps(folder, n):
    """Wait until steps.csv has so many rows."""
    path, until = folder / "run" / "steps.csv", time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") <= n:
        assert time.monotonic() < until, "the run has not begun"
        time.sleep(0.01)


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def send_to_group(folder, signum, n_steps, *flags):
    """Start, send a signal to the group after some steps -> (exit code, output, steps saved)."""
    process = start(folder, *flags)
    wait_for_steps(folder, n_steps)
    os.killpg(process.pid, signum)
    out, error = process.communicate(timeout=60)
    assert "Traceback" not in error, error
    saved = load_checkpoint(folder / "run" / "last.pt")["progress"]["step"]
    assert saved == len(rows(folder / "run" / "steps.csv"))
    return process.returncode, out + error, saved


@pytest.mark.parametrize("signum, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)])
def test_signal_to_the_group_saves_fresh_and_resumed_runs(signum, code, tones, tmp_path):
    data = ["--data", tones, *TINY]
    ended, out, first = send_to_group(tmp_path, signum, 8, *data, *LONG)
    assert ended == code, out
    assert out.count("saving at the next step") == 1
    ended, out, second = send_to_group(tmp_path, signum, first + 7, "--resume", "--workers", 2,
                                       "--run-dir", "run")
    assert ended == code, out
    assert second > first >= 8


def test_control_workers_that_obey_signals_end_the_run_with_an_error(tones, tmp_path, monkeypatch):
    """Without worker_init_fn a signal kills the workers first."""
    def prepare(patch):
        def die(worker_id):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        patch.setattr(clips_module, "_ignore_signals", die)
        real_step, n_done = train.train_step, 0

        def train_step(*args):
            nonlocal n_done
            n_done += 1
            if n_done == 8:
                for child in children_of(os.getpid()):
                    os.kill(child, signal.SIGTERM)
            return real_step(*args)
        patch.setattr(train, "train_step", train_step)
    assert program(monkeypatch, tmp_path, *LONG[:-2], data=tones, prepare=prepare) == 1


def test_killed_worker_is_one_line_and_no_step_is_lost(tones, tmp_path):
    process = start(tmp_path, "--data", tones, *TINY, *LONG)
    wait_for_steps(tmp_path, 8)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    check_one_line(error, "--workers", "--resume --run-dir run")
    saved = load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"]
    assert saved == len(rows(tmp_path / "run" / "steps.csv")) >= 8


def test_killed_run_with_workers_can_be_continued_at_once(tones, tmp_path):
    """Its workers live on for seconds, but they do not hold its lock."""
    process = start(tmp_path, "--data", tones, *TINY, *LONG, "--save-every", 1)
    wait_for_steps(tmp_path, 8)
    workers = children_of(process.pid)
    process.kill()
    process.wait()
    assert any(os.path.exists(f"/proc/{worker}") for worker in workers)
    again = start(tmp_path, "--resume", "--run-dir", "run", "--workers", 0)
    line = again.stdout.readline()
    again.kill()
    _, error = again.communicate()
    assert line == "resuming run\n", error


def test_nohup_stays_in_force(restored_signals):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        StopRequest()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_end_of_torchrun_is_a_request_to_stop(restored_signals, monkeypatch, capsys):
    alone, launched = StopRequest(), StopRequest(has_launcher=True)
    assert not launched.requested
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launched.requested
    assert launched.exit_code == 143
    assert not alone.requested


# --- output ---

def test_run_goes_on_without_a_reader(tones, tmp_path):
    """The output goes into a pipe whose reader has ended, like head."""
    process = start(tmp_path, "--data", tones, *TINY, "--run-dir", "run")
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-", "> /dev/full"])
def test_closed_streams_change_no_exit_code(closed, finished_run, tmp_path):
    """Nor does a file that is opened later become one of them."""
    out = tmp_path / "out"
    for flags, code in ((f"--ckpt {finished_run}/best.pt --out {out}", 0), ("--ckpt nowhere.pt", 2),
                        ("--no-such-flag", 2)):
        done = subprocess.run(f"{sys.executable} {ROOT}/evaluate.py {flags} {closed}", shell=True,
                              cwd=tmp_path, env=environment(tmp_path), capture_output=True)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
    assert (out / "metrics.json").read_text().startswith("{")


# --- shared memory ---

def statvfs_with(n_bytes):
    return lambda path: os.statvfs_result((4096, 4096, 0, 0, n_bytes // 4096, 0, 0, 0, 0, 255))


@pytest.mark.parametrize("megabytes, batch, expected", [
    (24_000, 6, 8), (64, 6, 3), (64, 30, 0), (1, 6, 0), (0, 6, 0)])
def test_workers_fit_into_shared_memory(megabytes, batch, expected, monkeypatch, capsys):
    """Each has two batches ready, and the main process holds one."""
    monkeypatch.setattr(os, "statvfs", statvfs_with(megabytes * 2**20))
    monkeypatch.setattr(shared_memory, "_told", set())
    assert shared_memory.workers_that_fit(8, batch * 2**20, 1) == expected
    assert shared_memory.workers_that_fit(8, batch * 2**20, 1) == expected
    assert capsys.readouterr().out.count("--shm-size") == (expected < 8)


def test_small_shared_memory_is_told_before_training(tones, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared_memory, "_told", set())
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: (
        statvfs_with(2**20)(path) if path == "/dev/shm" else real(path)))
    with without_pictures(monkeypatch):
        assert exit_code(train.main, "--data", tones, *TINY, "--epochs", 1, "--workers", 2,
                         "--run-dir", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert re.search(r"workers: 0 instead of 2.*\n(.*\n)*epoch", out)
