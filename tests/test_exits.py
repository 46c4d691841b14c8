"""How the programs end: the exit code and the line on stderr of every kind of error."""
import errno
import os
import runpy
import sys

import pytest
import torch
from conftest import ROOT

from core.device.distributed import DistributedError
from core.device.memory import ClipTooLargeError
from core.device.precision import DeviceError
from core.divergence import TrainingError
from core.exits import run_script
from core.run import CheckpointError, Interrupted, RunError
from data.manifest import DataError
from export import ExportError
from model.pretrained import WeightsError
from report.compare import CompareError
from util import InputError

INPUT_ERRORS = [CheckpointError, CompareError, DataError, DeviceError, ExportError, InputError,
                RunError, WeightsError]


def end(error=None, returns=None):
    """Exit code of a script whose main raises `error`, or else returns a value."""
    def main():
        if error is not None:
            raise error
        return returns
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    return stop.value.code


def error_line(capsys):
    """The one error line on stderr, without "error: "."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("value, code", [(None, 0), (0, 0), (3, 3), (143, 143)])
def test_exit_code_is_what_main_returns(value, code, capsys):
    assert end(returns=value) == code
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", INPUT_ERRORS)
def test_invalid_input_ends_with_2_and_its_message(kind, capsys):
    assert end(kind("x.wav: is no audio; repair it")) == 2
    assert error_line(capsys) == "x.wav: is no audio; repair it"


@pytest.mark.parametrize("kind", [TrainingError, ClipTooLargeError])
def test_failed_training_ends_with_3_and_its_message(kind, capsys):
    assert end(kind("diverged; lower --lr-head")) == 3
    assert error_line(capsys) == "diverged; lower --lr-head"


@pytest.mark.parametrize("error", [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
])
def test_memory_that_ran_out_elsewhere_ends_with_3_and_names_the_batch_sizes(error, capsys):
    assert end(error) == 3
    line = error_line(capsys)
    assert "--batch-size" in line
    assert "--eval-batch-size" in line


def test_lost_process_ends_with_1_and_its_message(capsys):
    assert end(DistributedError("another process is gone")) == 1
    assert error_line(capsys) == "another process is gone"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS,
                                  errno.EACCES, errno.EPERM])
def test_disk_that_refuses_ends_with_2_and_names_the_file_and_the_reason(code, capsys):
    assert end(OSError(code, os.strerror(code), "runs/a/history.csv")) == 2
    line = error_line(capsys)
    assert line.startswith("runs/a/history.csv: ")
    assert os.strerror(code) in line


def test_disk_error_without_a_file_name_is_one_line_too(capsys):
    assert end(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == 2
    assert os.strerror(errno.ENOSPC) in error_line(capsys)


@pytest.mark.parametrize("code", [130, 143])
def test_interrupted_run_ends_with_its_code_and_no_line(code, capsys):
    assert end(Interrupted(code)) == code
    assert capsys.readouterr().err == ""


def test_ctrl_c_before_a_run_has_begun_ends_with_130(capsys):
    assert end(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RuntimeError("x"),
                                   OSError(errno.ECHILD, "No child processes"), AssertionError()])
def test_control_unexpected_error_is_raised_with_its_traceback(error):
    with pytest.raises(type(error)):
        run_script(lambda: raise_error(error))


def raise_error(error):
    raise error


@pytest.mark.parametrize("kind", [DataError, TrainingError, DistributedError])
def test_message_with_line_breaks_and_bad_bytes_is_one_printable_line(kind, capsys):
    end(kind("a\nb\x1b[31m\udcff.wav: is no audio"))
    line = error_line(capsys)
    assert line.isprintable()
    assert ".wav" in line


@pytest.mark.parametrize("error, is_printed", [
    (DataError("the same on all processes"), False),
    (TrainingError("the same on all processes"), True),  # it may be raised by one process alone
])
def test_other_processes_do_not_repeat_invalid_input(error, is_printed, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    end(error)
    assert bool(capsys.readouterr().err) == is_printed


@pytest.mark.parametrize("script, words, name", [
    ("train", ["--data", "nowhere"], "nowhere"),
    ("train", ["--no-such-flag"], "--no-such-flag"),
    ("evaluate", ["--ckpt", "nowhere/x.pt"], "nowhere/x.pt"),
    ("evaluate", ["--no-such-flag"], "--ckpt"),
    ("predict", ["--ckpt", "nowhere/x.pt", "no.wav"], "no.wav"),
    ("predict", ["--ckpt", "nowhere/x.pt", "."], "."),
    ("export", ["--ckpt", "nowhere/x.pt", "--to", "hf"], "nowhere/x.pt"),
    ("export", ["--ckpt", "x.pt"], "--to"),
])
def test_script_ends_with_2_and_one_line(script, words, name, tmp_path, monkeypatch, capsys,
                                         restored_signals):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert name in error
