"""Runs of the program inside the test's own process, stopped, broken and continued at chosen places."""
import contextlib
import csv
import hashlib
import os
import signal

import torch

import train
from core.checkpoint import load_checkpoint
from core.precision import Precision
from report import pictures

TINY = ["--weights", "none", "--dim", "16", "--depth", "1", "--heads", "2", "--seconds", "0.9", "--device", "cpu", "--amp",
        "off", "--lr-backbone", "1e-3", "--lr-head", "2e-3", "--epochs", "2", "--batch-size", "2", "--effective-batch", "6",
        "--warmup-epochs", "0.5", "--freq-mask", "8", "--time-mask", "8", "--mixup-alpha", "0.4", "--drop-path", "0.2",
        "--save-every", "0", "--ema", "0.8", "--sampler", "sqrt", "--crop", "active", "--noise-p", "0.5", "--gain", "6",
        "--filter-p", "0.5", "--patchout", "0.3", "--layer-decay", "0.8", "--logit-adjust", "0.5", "--freeze-epochs", "1"]
TIMED = ("seconds", "clips_per_second", "peak_memory_mb")  # columns that may differ between equal runs


@contextlib.contextmanager
def calm(monkeypatch):
    """No pictures, no page, and the signal handlers of before afterwards."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with monkeypatch.context() as patch:
        for name in ("schedule", "batch", "curves", "confusion"):
            patch.setattr(pictures, name, lambda *_, **__: None)
        patch.setattr(train, "write_report", lambda *_: "")
        try:
            yield patch
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def program(monkeypatch, folder, *flags, data=None, prepare=None):
    """train.main with the run in `folder` -> exit code, as the process would have it; a new tiny run where
    `data` is given. `prepare(patch)` may break things."""
    with calm(monkeypatch) as patch:
        patch.setenv("HOME", str(folder))
        if prepare:
            prepare(patch)
        new = ["--data", str(data), *TINY] if data else []
        try:
            return train.main([*new, "--run-dir", str(folder / "run"), *map(str, flags)])
        except train.INPUT_ERRORS as error:
            return train.fail(error)
        except train.NUMBERS_ERRORS as error:
            return train.fail(error, 3)
        except SystemExit as stop:
            return stop.code


def rows(path, without=TIMED):
    """The rows of a CSV of a run, without what a clock or the machine put there."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in without} for row in csv.DictReader(file)]


def outcome(run):
    """All that must be the same in two equal runs: the rows of its files and a hash of its final state."""
    state = load_checkpoint(run / "last.pt")
    digest = hashlib.sha256()
    for part in (state["model"], state["ema"] or {}, *state["optimizer"]["state"].values()):
        for key in sorted(part):
            digest.update(part[key].float().numpy().tobytes())
    progress = {name: value for name, value in state["progress"].items() if name != "seconds"}
    return {"steps": rows(run / "steps.csv"), "history": rows(run / "history.csv"), "progress": progress,
            "schedule": state["schedule"], "scaler": state["scaler"], "weights": digest.hexdigest()}


def both(*prepares):
    def prepare(patch):
        for one in prepares:
            one(patch)
    return prepare


def stop_at(step, signum=signal.SIGTERM):
    """-> prepare: the signal comes in the middle of that optimiser step, counted from 1 in this process."""
    def prepare(patch):
        real, done = train.train_step, [0]

        def train_step(*args):
            done[0] += 1
            if done[0] == step:
                os.kill(os.getpid(), signum)
            return real(*args)
        patch.setattr(train, "train_step", train_step)
    return prepare


def record_clips(into):
    """-> prepare: the clips of every micro-batch of every step are appended to `into`."""
    def prepare(patch):
        real = train.train_step

        def train_step(t, window, *rest):
            into.append([batch.rows.tolist() for batch in window])
            return real(t, window, *rest)
        patch.setattr(train, "train_step", train_step)
    return prepare


class Scaled(Precision):
    """float32 with a live gradient scaler, which a CPU would not have: its scale moves every few steps."""

    def __init__(self, init_scale=2.0**10):
        super().__init__(torch.device("cpu"), None, "scaled for the test")
        self.kept = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)

    @property
    def scaler(self):
        return self.kept

    def on(self, device, plain=False):
        return self


def scaled(patch):
    patch.setattr(train, "choose_precision", lambda device, amp: Scaled())
