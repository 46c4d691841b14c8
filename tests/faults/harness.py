"""Run the program within the test's process; stop, break and continue it at chosen places."""
import contextlib
import csv
import hashlib
import os
import signal

import torch

import train
from core.device.precision import Precision
from core.exits import ending_of, print_error
from core.run.checkpoint import load_checkpoint
from core.run.signals import SIGNALS
from report import pictures

TINY = [
    "--weights", "none", "--dim", "16", "--depth", "1", "--heads", "2", "--seconds", "0.9",
    "--device", "cpu", "--amp", "off", "--lr-backbone", "1e-3", "--lr-head", "2e-3",
    "--epochs", "2", "--batch-size", "2", "--effective-batch", "6", "--warmup-epochs", "0.5",
    "--freq-mask", "8", "--time-mask", "8", "--mixup-alpha", "0.4", "--drop-path", "0.2",
    "--save-every", "0", "--ema", "0.8", "--sampler", "sqrt", "--crop", "active",
    "--noise-p", "0.5", "--gain", "6", "--filter-p", "0.5", "--patchout", "0.3",
    "--layer-decay", "0.8", "--logit-adjust", "0.5", "--freeze-epochs", "1",
]
TIMED_COLUMNS = ("seconds", "clips_per_second", "peak_memory_mb")  # differ between equal runs
PICTURES = ("schedule", "batch", "curves", "confusion")


def exit_code(main, *argv):
    """Run a script's `main` in this process -> exit code, as the process would have it.

    The line of an expected error is printed; signal handlers are put back.
    """
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        return main(list(map(str, argv))) or 0
    except SystemExit as stop:
        return stop.code
    except Exception as error:
        ending = ending_of(error)
        if ending is None:
            raise
        code, message = ending
        if message:
            print_error(message)
        return code
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def write_empty_page(out, *_):
    """In place of write_report: a finished run has a report."""
    out.write_text("")
    return ""


@contextlib.contextmanager
def without_pictures(monkeypatch):
    """No pictures, and an empty report."""
    with monkeypatch.context() as patch:
        for name in PICTURES:
            patch.setattr(pictures, name, lambda *_, **__: None)
        patch.setattr(train, "write_report", write_empty_page)
        yield patch


def program(monkeypatch, folder, *flags, data=None, prepare=None):
    """Run train.main in `folder` -> exit code.

    data: start a new tiny run with these recordings. `prepare(patch)` may break things.
    """
    with without_pictures(monkeypatch) as patch:
        patch.setenv("HOME", str(folder))
        if prepare:
            prepare(patch)
        new = ["--data", data, *TINY] if data else []
        return exit_code(train.main, *new, "--run-dir", folder / "run", *flags)


def rows(path, without=TIMED_COLUMNS):
    """The rows of a run's CSV, without the columns that a clock or the machine decides."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in without}
                for row in csv.DictReader(file)]


def outcome(run):
    """All that must be the same in two equal runs: tables, and a hash of the final state."""
    checkpoint = load_checkpoint(run / "last.pt")
    digest = hashlib.sha256()
    moments = checkpoint["optimizer"]["state"].values()
    for tensors in (checkpoint["model"], checkpoint["ema"] or {}, *moments):
        for name in sorted(tensors):
            digest.update(tensors[name].float().numpy().tobytes())
    progress = {name: value for name, value in checkpoint["progress"].items() if name != "seconds"}
    return {
        "steps": rows(run / "steps.csv"),
        "history": rows(run / "history.csv"),
        "progress": progress,
        "schedule": checkpoint["schedule"],
        "scaler": checkpoint["scaler"],
        "weights": digest.hexdigest(),
    }


def both(*prepares):
    """One `prepare` that does several."""
    def prepare(patch):
        for each in prepares:
            each(patch)
    return prepare


def stop_at(step, signum=signal.SIGTERM):
    """-> prepare: the signal arrives during that optimizer step, counted from 1 in this process."""
    def prepare(patch):
        real_step, n_done = train.train_step, 0

        def train_step(*args):
            nonlocal n_done
            n_done += 1
            if n_done == step:
                os.kill(os.getpid(), signum)
            return real_step(*args)
        patch.setattr(train, "train_step", train_step)
    return prepare


def record_clips(record):
    """-> prepare: append the rows of every micro-batch of every step to the list `record`."""
    def prepare(patch):
        real_step = train.train_step

        def train_step(learner, micro_batches, *rest):
            record.append([batch.rows.tolist() for batch in micro_batches])
            return real_step(learner, micro_batches, *rest)
        patch.setattr(train, "train_step", train_step)
    return prepare


class ScaledPrecision(Precision):
    """float32 with an active gradient scaler, whose scale changes every few steps.

    On a CPU the program itself never has one.
    """

    def __init__(self, init_scale=2.0**10):
        super().__init__(torch.device("cpu"), None, "scaled for the test")
        self._scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)

    @property
    def scaler(self):
        return self._scaler

    def on(self, device, plain=False):
        return self


def scaled(patch):
    """prepare: train with a ScaledPrecision."""
    patch.setattr(train, "choose_precision", lambda device, amp: ScaledPrecision())
