"""A run that is killed or interrupted and resumed equals one that was not (faults 1, 3, 7, 20)."""
import os
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from harness import TINY, both, outcome, program, record_clips, rows, scaled, stop_at

import core.run.run
import train
from core.run.checkpoint import load_checkpoint

N_STEPS = 12  # two epochs of 33 clips, in steps of 6
KILL = [sys.executable, ROOT / "tests" / "faults" / "kill.py"]


@pytest.fixture(scope="module")
def untouched(tones, tmp_path_factory):
    """(outcome, clips of each step) of a run that was not disturbed."""
    folder, clips = tmp_path_factory.mktemp("untouched"), []
    with pytest.MonkeyPatch.context() as patch:
        assert program(patch, folder, data=tones, prepare=both(scaled, record_clips(clips))) == 0
    result = outcome(folder / "run")
    assert len(result["steps"]) == N_STEPS == len(clips)
    assert len({row["scale"] for row in result["steps"]}) > 2  # the scaler is active
    return result, clips


# --- stop and resume at a step ---

def edit_checkpoint(edit):
    """-> prepare: change the checkpoint that a run resumes from by `edit(checkpoint)`."""
    def prepare(patch):
        real = core.run.run.open_run

        def open_run(*args):
            folder, checkpoint, notes = real(*args)
            edit(checkpoint)
            return folder, checkpoint, notes
        patch.setattr(core.run.run, "open_run", open_run)
    return prepare


def stop_and_resume(tones, folder, monkeypatch, step, workers=0, edit=None):
    """Stop at a step, change the checkpoint by `edit`, resume -> (outcome, clips of each step)."""
    clips = []
    prepare = both(scaled, record_clips(clips))
    code = program(monkeypatch, folder, "--workers", workers, data=tones,
                   prepare=both(prepare, stop_at(step)))
    assert code == 143
    assert load_checkpoint(folder / "run" / "last.pt")["progress"]["step"] == step
    if edit:
        prepare = both(prepare, edit_checkpoint(edit))
    assert program(monkeypatch, folder, "--resume", "--workers", workers, prepare=prepare) == 0
    return outcome(folder / "run"), clips


def check_steps(steps, workers, untouched, tones, tmp_path, monkeypatch):
    for step in steps:
        folder = tmp_path / str(step)
        folder.mkdir()
        assert stop_and_resume(tones, folder, monkeypatch, step, workers) == untouched, step


def test_resume_in_each_phase_gives_the_same_run(untouched, tones, tmp_path, monkeypatch):
    """In the warm-up, within an epoch, at an epoch's last step, in the second epoch."""
    check_steps((1, 4, 6, 9), 0, untouched, tones, tmp_path, monkeypatch)


def test_resume_with_workers_gives_the_same_run(untouched, tones, tmp_path, monkeypatch):
    check_steps((5,), 2, untouched, tones, tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_step_gives_the_same_run(workers, untouched, tones, tmp_path, monkeypatch):
    check_steps(range(1, N_STEPS + 1), workers, untouched, tones, tmp_path, monkeypatch)


def clear_moments(checkpoint):
    for moments in checkpoint["optimizer"]["state"].values():
        for value in moments.values():
            value.zero_()


@pytest.mark.parametrize("edit", [
    pytest.param(lambda checkpoint: checkpoint["flags"].update(seed=1), id="random numbers"),
    pytest.param(lambda checkpoint: checkpoint["progress"].update(step_in_epoch=0),
                 id="place in the epoch"),
    pytest.param(lambda checkpoint: checkpoint["scaler"].update(scale=2.0**10, _growth_tracker=0),
                 id="scaler"),
    pytest.param(lambda checkpoint: checkpoint["schedule"].update(steps=0), id="schedule"),
    pytest.param(clear_moments, id="moments"),
    pytest.param(lambda checkpoint: checkpoint["ema"].update(checkpoint["model"]), id="averages"),
    pytest.param(lambda checkpoint: checkpoint.update(ema_updates=0.0),
                 id="updates of the averages"),
    pytest.param(lambda checkpoint: checkpoint["progress"].update(loss_sum=0.0),
                 id="sums of the epoch"),
])
def test_control_loss_of_any_part_of_the_state_is_detected(edit, untouched, tones, tmp_path,
                                                           monkeypatch):
    assert stop_and_resume(tones, tmp_path, monkeypatch, 4, edit=edit) != untouched


# --- signals ---

def send_signal_in(module, function, signum):
    """-> prepare: the signal arrives when that function starts and again when it returns."""
    def prepare(patch):
        real = getattr(module, function)

        def wrapped(*args, **kwargs):
            os.kill(os.getpid(), signum)
            result = real(*args, **kwargs)
            os.kill(os.getpid(), signum)
            return result
        patch.setattr(module, function, wrapped)
    return prepare


@pytest.mark.parametrize("module, function, signum, code", [
    (train, "train_step", signal.SIGTERM, 143),
    (train, "train_step", signal.SIGINT, 130),
    (train, "train_step", signal.SIGUSR1, 143),
    (train, "evaluate", signal.SIGTERM, 143),
    (core.run.run, "save_checkpoint", signal.SIGTERM, 143),
    (train, "point_metrics", signal.SIGINT, 130),
    (train, "write_results", signal.SIGTERM, 0),
])
def test_signal_at_any_moment_stops_with_a_checkpoint(
        module, function, signum, code, untouched, tones, tmp_path, monkeypatch, capsys):
    """In a step, in validation, while saving, at an epoch's end, after the end; each time twice."""
    prepare = both(scaled, send_signal_in(module, function, signum))
    assert program(monkeypatch, tmp_path, data=tones, prepare=prepare) == code
    if code:
        command = shlex.split(capsys.readouterr().out.rstrip().splitlines()[-1])
        assert command == ["python", "train.py", "--resume", "--run-dir", str(tmp_path / "run")]
        assert program(monkeypatch, tmp_path, "--resume", prepare=scaled) == 0
    assert outcome(tmp_path / "run") == untouched[0]


def test_control_run_that_ignores_signals_is_detected(tones, tmp_path, monkeypatch):
    def ignore_signals(patch):
        patch.setattr(train.StopRequest, "requested", property(lambda self: False))
    prepare = both(send_signal_in(train, "train_step", signal.SIGTERM), ignore_signals)
    assert program(monkeypatch, tmp_path, data=tones, prepare=prepare) == 0


def test_signal_before_the_first_step_leaves_nothing_behind(tones, tmp_path, monkeypatch):
    prepare = send_signal_in(train, "parameter_groups", signal.SIGTERM)
    assert program(monkeypatch, tmp_path, data=tones, prepare=prepare) == 143
    assert not (tmp_path / "run").exists()
    assert program(monkeypatch, tmp_path, "--resume", "auto", data=tones) == 0  # starts a new run


def test_resume_auto_starts_over_after_death_before_the_first_checkpoint(
        untouched, tones, tmp_path, monkeypatch):
    def die(*_):
        raise SystemExit(137)

    def die_in_the_first_step(patch):
        patch.setattr(train, "train_step", die)
    prepare = both(scaled, die_in_the_first_step)
    assert program(monkeypatch, tmp_path, data=tones, prepare=prepare) == 137
    assert (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "last.pt").exists()
    assert program(monkeypatch, tmp_path, "--resume", prepare=scaled) == 2  # nothing to continue
    assert program(monkeypatch, tmp_path, "--resume", "auto", data=tones, prepare=scaled) == 0
    assert outcome(tmp_path / "run") == untouched[0]


# --- equal flags, equal runs ---

@pytest.mark.parametrize("flags", [(), ("--workers", 2), ("--save-every", 1)])
def test_same_seed_gives_the_same_run(flags, untouched, tones, tmp_path, monkeypatch):
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=scaled) == 0
    assert outcome(tmp_path / "run") == untouched[0]


def test_evaluation_batch_size_changes_only_the_rounding_of_the_history(
        untouched, tones, tmp_path, monkeypatch):
    """Sums are in another order."""
    flags = ("--eval-batch-size", 3)
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=scaled) == 0
    result, expected = outcome(tmp_path / "run"), dict(untouched[0])
    for row, expected_row in zip(result.pop("history"), expected.pop("history"), strict=True):
        assert row.keys() == expected_row.keys()
        numbers = [float(value) for value in row.values()]
        assert numbers == pytest.approx([float(value) for value in expected_row.values()], rel=1e-5)
    assert result == expected


def test_other_seed_gives_other_weights(untouched, tones, tmp_path, monkeypatch):
    assert program(monkeypatch, tmp_path, "--seed", 1, data=tones, prepare=scaled) == 0
    assert outcome(tmp_path / "run")["weights"] != untouched[0]["weights"]


# --- killed ---

def run_kill(*flags, data, folder, timeout):
    """Run kill.py with short epochs and a checkpoint after every step -> CompletedProcess."""
    command = [*KILL, *flags, "--folder", folder, "--data", data, *TINY, "--epochs", "6",
               "--save-every", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=pytest.mark.long)])
def test_run_killed_at_random_moments_gives_the_same_run(kills, tones, tmp_path):
    """SIGKILL again and again: weights, history and losses of each step are the same."""
    done = run_kill("--kills", str(kills), data=tones, folder=tmp_path, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
    assert "equal" in done.stdout
    assert rows(tmp_path / "untouched" / "steps.csv")


def test_control_kill_script_detects_a_run_that_repeats_the_epoch(tones, tmp_path):
    """A run that resumes at the start of the epoch, not at its place in it."""
    done = run_kill("--kills", "8", "--within", "0.6", "--break-resume", data=tones,
                    folder=tmp_path, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERENT" in done.stdout
