"""The three ways in which a checkpoint file gets into the program: evaluate, resume, weights."""
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints import check_one_line
from harness import exit_code, program, without_pictures

import evaluate
import train

MARKER = "code-was-run"
PROGRAMS = ("evaluate", "resume", "weights")


class Evil:
    """Leaves a file in the working folder if it is ever unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


class WaysIn(NamedTuple):
    """What a test needs to give checkpoint files to the programs; see the fixture `ways_in`."""
    folder: Path  # where everything happens
    data: Path  # recordings
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture
    recwarn: pytest.WarningsRecorder

    def run(self, name, path):
        """Give a checkpoint to one of PROGRAMS -> exit code, as the process would have it."""
        self.monkeypatch.chdir(self.folder)
        if name == "resume":
            return program(self.monkeypatch, self.folder, "--resume", path)
        if name == "weights":
            return program(self.monkeypatch, self.folder, "--weights", path, "--epochs", 1,
                           "--warmup-epochs", 0, data=self.data)
        with without_pictures(self.monkeypatch) as patch:
            patch.setattr(evaluate, "write_report", lambda *_: "")
            out = self.folder / "out"
            return exit_code(evaluate.main, "--ckpt", path, "--device", "cpu", "--out", out)


def check_refused(ways_in, path, *names, programs=PROGRAMS):
    """Check that each program exits with 2 and one line that holds the path and `names`, before
    the first step, without a warning and without running code from the file."""
    with ways_in.monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *_: pytest.fail("a step was made"))
        for name in programs:
            ways_in.capsys.readouterr()
            ways_in.recwarn.clear()
            assert ways_in.run(name, path) == 2, name
            check_one_line(ways_in.capsys.readouterr().err, str(path), *names)
            assert not ways_in.recwarn.list
            assert not (ways_in.folder / MARKER).exists()
