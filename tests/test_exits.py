"""How the programs end: the exit code and the line on stderr of every kind of error."""
import errno
import os
import resource
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from core.device.distributed import Distributed, DistributedError
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


def test_operation_that_is_never_deterministic_ends_with_2_and_names_the_flag(capsys):
    """The error is torch's own: the operation has only such versions."""
    error = RuntimeError("histc_cuda does not have a deterministic implementation, but you set "
                         "'torch.use_deterministic_algorithms(True)'. You can turn off ...")
    assert end(error) == 2
    line = error_line(capsys)
    assert line.startswith("--deterministic: ") and "histc_cuda" in line


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


# --- disks, folders, streams, variables ---

@pytest.mark.parametrize("code", [
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EHOSTDOWN, errno.EREMOTEIO])
def test_disk_that_is_away_ends_with_2_and_names_the_file(code, capsys):
    assert end(OSError(code, os.strerror(code), "out/metrics.json")) == 2
    line = error_line(capsys)
    assert line.startswith("out/metrics.json: ")
    assert os.strerror(code) in line


@pytest.mark.parametrize("out", ["/dev/null", "/proc/warble", "file/below", "x" * 300, "/dev/full"])
def test_folder_for_results_that_cannot_be_made_is_one_line(out, finished_run, tmp_path,
                                                            monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for script, words in (("evaluate", ["--ckpt", finished_run / "best.pt", "--out", out]),
                          ("report/compare", [finished_run, finished_run, out])):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.delitem(sys.modules, "report.compare", raising=False)  # as in a new process
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__") if (
                script == "evaluate") else runpy.run_module("report.compare", run_name="__main__")
        assert stop.value.code == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert "Traceback" not in error


def test_full_disk_in_evaluate_is_one_line_and_leaves_no_part(finished_run, tmp_path):
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--ckpt", finished_run / "best.pt", "--out", "out"],
        cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True,
        preexec_fn=limit_files)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert os.strerror(errno.EFBIG) in done.stderr
    assert os.listdir(tmp_path / "out") == []


class Broken:
    """A stream that nobody reads."""
    errors = "strict"

    def __init__(self, error):
        self.error = error
        self.handle = os.open(os.devnull, os.O_WRONLY)

    def write(self, text):
        raise self.error

    def flush(self):
        if os.path.samestat(os.fstat(self.handle), os.stat(os.devnull)):
            return
        raise self.error

    def fileno(self):
        return self.handle


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.EIO, "x"),
                                   OSError(errno.ENOSPC, "x")])
def test_output_that_nobody_reads_changes_nothing(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))

    def main():
        print("epoch 1")
        return 3
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 3


def test_control_output_that_nobody_reads_is_an_error_of_print():
    with pytest.raises(BrokenPipeError):
        print("epoch 1", file=Broken(BrokenPipeError(errno.EPIPE, "x")))


@pytest.mark.parametrize("values", [
    {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "-1"},
    {"WORLD_SIZE": "9" * 30}, {"WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}])
def test_variables_of_torchrun_that_make_no_sense_are_one_line(values, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)

    def main():
        Distributed().start(torch.device("cpu"))
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    line = error_line(capsys)
    assert any(name in line for name in values)


PLACES = {
    "without HOME and USER": "env -u HOME -u USER -u LOGNAME {command}",
    "optimised": "env PYTHONOPTIMIZE=2 {command}",
    "in a folder that is gone": "mkdir gone && cd gone && rmdir ../gone && {command}",
    "as an unknown user": "env -u HOME -u USER setpriv --reuid 54321 --clear-groups {command}",
}


@pytest.mark.parametrize("place", PLACES)
def test_strange_places_give_one_line_or_work(place, finished_run, tmp_path):
    if place == "as an unknown user":
        if os.getuid() != 0:
            pytest.skip("only root may become somebody else")
        # A virtual environment in root's own folder cannot be read by anybody else.
        imports = PLACES[place].format(command=f"{sys.executable} -c 'import numpy, torch'")
        if subprocess.run(imports, shell=True, capture_output=True).returncode:
            pytest.skip("this Python's packages cannot be read by another user")
    for words, code in ((f"evaluate.py --ckpt {finished_run}/best.pt --out {tmp_path}/out", 0),
                        ("train.py --data nowhere", 2), ("predict.py --ckpt nowhere.pt x.wav", 2),
                        ("export.py --help", 0)):
        command = PLACES[place].format(command=f"{sys.executable} {ROOT}/{words}")
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, (words, done.stderr)
        assert done.returncode in (code, 2), (words, done.stderr)
        if done.returncode:
            assert done.stderr.startswith("error: "), (words, done.stderr)
        if place in ("without HOME and USER", "optimised"):
            assert done.returncode == code, (words, done.stderr)
