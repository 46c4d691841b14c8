"""Killed, interrupted, continued: the run is the one that was never touched (faults 1, 3, 7, 20)."""
import os
import signal
import subprocess
import sys

import pytest
from harness import TINY, both, outcome, program, record_clips, rows, scaled, stop_at

import train
from conftest import ROOT
from core.checkpoint import load_checkpoint

STEPS = 12  # two epochs of 33 clips in windows of 6
KILL = [sys.executable, ROOT / "tests" / "faults" / "kill.py"]


@pytest.fixture(scope="module")
def untouched(tones, tmp_path_factory):
    """(outcome, clips of each step) of a run that nothing happened to."""
    folder, clips = tmp_path_factory.mktemp("untouched"), []
    with pytest.MonkeyPatch.context() as patch:
        assert program(patch, folder, data=tones, prepare=both(scaled, record_clips(clips))) == 0
    found = outcome(folder / "run")
    assert len(found["steps"]) == STEPS == len(clips)
    assert len({row["scale"] for row in found["steps"]}) > 2  # the scaler is alive
    return found, clips


def stopped_and_continued(tones, folder, monkeypatch, step, workers=0, edit=None):
    """Stop at a step, change what the checkpoint says by `edit(state)`, continue -> (outcome, clips)."""
    clips = []
    code = program(monkeypatch, folder, "--workers", workers, data=tones,
                   prepare=both(scaled, record_clips(clips), stop_at(step)))
    assert code == 143
    assert load_checkpoint(folder / "run" / "last.pt")["progress"]["step"] == step

    def edited(patch):
        real = train.open_run

        def open_run(*args):
            run_dir, state, notes = real(*args)
            if edit:
                edit(state)
            return run_dir, state, notes
        patch.setattr(train, "open_run", open_run)
    code = program(monkeypatch, folder, "--resume", "--workers", workers,
                   prepare=both(scaled, record_clips(clips), edited))
    assert code == 0
    return outcome(folder / "run"), clips


def check_every_step(steps, workers, untouched, tones, tmp_path, monkeypatch):
    for step in steps:
        (tmp_path / str(step)).mkdir()
        assert stopped_and_continued(tones, tmp_path / str(step), monkeypatch, step, workers) == untouched, step


def test_resume_at_some_steps(untouched, tones, tmp_path, monkeypatch):
    """In warm-up, in the middle of an epoch, at its last step, in the second epoch."""
    check_every_step((1, 4, 6, 9), 0, untouched, tones, tmp_path, monkeypatch)


def test_resume_with_workers(untouched, tones, tmp_path, monkeypatch):
    check_every_step((5,), 2, untouched, tones, tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_step(workers, untouched, tones, tmp_path, monkeypatch):
    check_every_step(range(1, STEPS + 1), workers, untouched, tones, tmp_path, monkeypatch)


def forget_moments(state):
    for values in state["optimizer"]["state"].values():
        for value in values.values():
            value.zero_()


@pytest.mark.parametrize("edit", [
    pytest.param(lambda state: state["flags"].update(seed=1), id="random numbers"),
    pytest.param(lambda state: state["progress"].update(window=0), id="place in the epoch"),
    pytest.param(lambda state: state["scaler"].update(scale=2.0**10, _growth_tracker=0), id="scaler"),
    pytest.param(lambda state: state["schedule"].update(steps=0), id="schedule"),
    pytest.param(forget_moments, id="moments"),
    pytest.param(lambda state: state["ema"].update(state["model"]), id="averages"),
    pytest.param(lambda state: state.update(ema_updates=0.0), id="updates of the averages"),
    pytest.param(lambda state: state["progress"].update(loss_sum=0.0), id="sums of the epoch"),
])
def test_what_is_left_out_of_a_checkpoint_is_missed(edit, untouched, tones, tmp_path, monkeypatch):
    """The control: each part of the state in turn, and the comparison above must see it."""
    assert stopped_and_continued(tones, tmp_path, monkeypatch, 4, edit=edit) != untouched


def signal_in(where, signum):
    """-> prepare: the signal comes in that place, and once more when it is left."""
    def prepare(patch):
        real = getattr(train, where)

        def wrapped(*args, **kwargs):
            os.kill(os.getpid(), signum)
            out = real(*args, **kwargs)
            os.kill(os.getpid(), signum)
            return out
        patch.setattr(train, where, wrapped)
    return prepare


@pytest.mark.parametrize("where, signum, code", [
    ("train_step", signal.SIGTERM, 143), ("train_step", signal.SIGINT, 130), ("train_step", signal.SIGUSR1, 143),
    ("evaluate", signal.SIGTERM, 143), ("save_checkpoint", signal.SIGTERM, 143), ("point_metrics", signal.SIGINT, 130),
    ("write_results", signal.SIGTERM, 0)])
def test_a_signal_anywhere(where, signum, code, untouched, tones, tmp_path, monkeypatch, capsys):
    """In a step, in validation, while saving, at an epoch's end, when all is done; each time it comes twice."""
    assert program(monkeypatch, tmp_path, data=tones, prepare=both(scaled, signal_in(where, signum))) == code
    if code:
        last = capsys.readouterr().out.rstrip().splitlines()[-1]
        assert last == f"  python train.py --resume --run-dir {tmp_path / 'run'}"
        assert program(monkeypatch, tmp_path, "--resume", prepare=scaled) == 0
    assert outcome(tmp_path / "run") == untouched[0]


def test_a_program_that_does_not_listen_goes_on(tones, tmp_path, monkeypatch):
    """The control: signals are noted and nobody asks."""
    deaf = lambda patch: patch.setattr(train.StopRequest, "__call__", lambda self: False)
    assert program(monkeypatch, tmp_path, data=tones, prepare=both(signal_in("train_step", signal.SIGTERM), deaf)) == 0


def test_a_signal_before_the_first_step_leaves_nothing_behind(tones, tmp_path, monkeypatch):
    assert program(monkeypatch, tmp_path, data=tones, prepare=signal_in("parameter_groups", signal.SIGTERM)) == 143
    assert not (tmp_path / "run").exists()
    assert program(monkeypatch, tmp_path, "--resume", "auto", data=tones) == 0  # a fresh start


def test_resume_auto_starts_afresh_where_a_run_died_before_its_first_checkpoint(untouched, tones, tmp_path, monkeypatch):
    def die(*_):
        raise SystemExit(137)
    assert program(monkeypatch, tmp_path, data=tones,
                   prepare=both(scaled, lambda patch: patch.setattr(train, "train_step", die))) == 137
    assert (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "last.pt").exists()
    assert program(monkeypatch, tmp_path, "--resume", prepare=scaled) == 2  # nothing to continue
    assert program(monkeypatch, tmp_path, "--resume", "auto", data=tones, prepare=scaled) == 0
    assert outcome(tmp_path / "run") == untouched[0]


@pytest.mark.parametrize("flags", [(), ("--workers", 2), ("--eval-batch-size", 3), ("--save-every", 1)])
def test_the_same_seed_gives_the_same_run(flags, untouched, tones, tmp_path, monkeypatch):
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=scaled) == 0
    found = outcome(tmp_path / "run")
    if "--eval-batch-size" in flags:  # sums in another order
        for a, b in zip(found.pop("history"), untouched[0]["history"], strict=True):
            assert [float(a[k]) for k in a] == pytest.approx([float(b[k]) for k in b], rel=1e-5)
        assert found == {key: value for key, value in untouched[0].items() if key != "history"}
    else:
        assert found == untouched[0]


def test_another_seed_gives_another_run(untouched, tones, tmp_path, monkeypatch):
    assert program(monkeypatch, tmp_path, "--seed", 1, data=tones, prepare=scaled) == 0
    assert outcome(tmp_path / "run")["weights"] != untouched[0]["weights"]


@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_moments(kills, tones, tmp_path):
    """SIGKILL again and again: weights, history and per-step losses as in a run that was never touched."""
    done = subprocess.run([*KILL, "--kills", str(kills), "--folder", tmp_path, "--data", tones, *TINY, "--epochs", "6",
                           "--save-every", "1"], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout and "equal" in done.stdout
    assert rows(tmp_path / "untouched" / "steps.csv")


def test_the_kill_script_sees_a_run_that_is_not_the_same(tones, tmp_path):
    """The control: a run that does not go on from its place in the epoch but starts the epoch anew."""
    done = subprocess.run([*KILL, "--kills", "4", "--break-resume", "--folder", tmp_path, "--data", tones, *TINY,
                           "--epochs", "6", "--save-every", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "DIFFERENT" in done.stdout, done.stdout + done.stderr
