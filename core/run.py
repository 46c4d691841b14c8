"""The run folder: made, locked, and written so that it is whole after any crash."""
import csv
import errno
import fcntl
import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from .checkpoint import link, load_checkpoint, load_newest, reading

HISTORY = ("epoch train_loss train_acc val_loss val_acc val_macro_f1 val_map lr_backbone lr_head seconds "
           "clips_per_second peak_memory_mb skipped_steps").split()
STEPS = "step epoch loss grad_norm lr_backbone lr_head scale clips".split()
EVENTS = "step epoch event detail".split()
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


_locks = []  # held until the process ends


class RunError(ValueError):
    """A run folder that cannot be used: one line that names it and the mend."""


def open_run(run_dir, resume, name):
    """The folder to work in -> (Path, the checkpoint to continue from or None, lines for the person).

    run_dir: the folder that was asked for, or None; name: of the data, for a new folder's name. resume: None
    for a new run, whose folder is not made yet (`create_run` does that once all else is known to be well);
    "newest" to continue the run in run_dir, by default the newest; "auto" for the same, or a new run where
    there is no checkpoint; or the path of a checkpoint. A run to continue is locked. Raises RunError,
    CheckpointError.
    """
    new = Path(run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}")
    if resume is None:
        _check_new(new)
        return new, None, []
    if resume not in ("newest", "auto"):
        folder = Path(run_dir) if run_dir else Path(resume).parent
        state = load_checkpoint(resume).whole()
        _make(folder)
        lock_run(folder)
        _keep_best(folder, state)
        return folder, state, [f"resuming {resume} in {folder}"]
    last = newest_run("runs", "last.pt")
    folder = Path(run_dir) if run_dir else last and last.parent
    if folder is None or not folder.is_dir():
        if resume == "auto":
            return new, None, ["--resume auto: nothing to continue, a new run"]
        raise RunError(f"--resume: no run {run_dir or 'under runs/'} to continue; start one without --resume")
    lock_run(folder)
    state, notes = load_newest(folder)
    if state is None:
        if resume == "auto":
            return folder, None, [f"--resume auto: {folder} has no checkpoint yet, started afresh"]
        raise RunError(f"--resume: {folder} has no checkpoint yet; remove it and start without --resume")
    _keep_best(folder, state.whole())
    return folder, state, [*notes, f"resuming {folder}"]


def _keep_best(folder, state):
    """A run may have died after its last.pt and before the best.pt that is the same: make it now."""
    with reading(state.path):
        epoch, best, window = (state["progress"][name] for name in ("epoch", "best_epoch", "window"))
    if best == epoch > 0 and window == 0:
        link(state.path, folder / "best.pt")


def _check_new(path):
    if path.exists() and (not path.is_dir() or any(entry.name != ".lock" for entry in path.iterdir())):
        raise RunError(f"--run-dir {path}: exists already; continue it with --resume, or give another --run-dir")


def create_run(path, again=False):
    """Make a new run folder and lock it. Raises RunError where it cannot be written, or exists already with
    something in it; `again` allows the latter, for a run that died before its first checkpoint."""
    if not again:
        _check_new(path)
    _make(path)
    lock_run(path)


def _make(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--run-dir {path}: cannot be made ({error.strerror}); give another --run-dir") from None


def lock_run(path):
    """Hold the run folder for this process; the lock goes with the process, however it ends."""
    if any(Path(path).resolve() == held for held, _ in _locks):
        return
    try:
        handle = open(Path(path) / ".lock", "a")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"--run-dir {path}: another run is writing there; wait for it or give another "
                       "--run-dir") from None
    except OSError as error:
        raise RunError(f"--run-dir {path}: cannot be written ({error.strerror}); give another --run-dir") from None
    _locks.append((Path(path).resolve(), handle))


def newest_run(folder, name):
    """The newest `<folder>/*/<name>`, by time of writing, or None."""
    found = [path for path in Path(folder).glob(f"*/{name}") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def write_json(path, value):
    """Write JSON by way of a temporary file, so that a reader never meets half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")
    os.replace(temporary, path)


def describe_machine(device):
    """Versions, device and commit, for run.json."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=False).stdout.strip() or None
    except OSError:
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    packages = {name: version(name) for name in ("torch", "timm", "numpy", "soundfile", "soxr")}
    return {"commit": commit, "python": platform.python_version(), "versions": packages, "device": str(device),
            "device_name": name, "threads": torch.get_num_threads()}


class CsvLog:
    """A CSV file that grows by rows. Opening it keeps only the rows whose first column is at most `keep`:
    what a killed run wrote after its last checkpoint is cut off, so that no row is lost or doubled."""

    def __init__(self, path, columns, keep=0):
        rows = []
        if keep and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= keep]
        temporary = path.with_name(path.name + ".tmp")
        self.file = open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace", buffering=1)
        self.writer = csv.writer(self.file)
        self.writer.writerow(columns)
        self.writer.writerows(rows)
        self.columns = columns
        self.sync()
        os.replace(temporary, path)

    def append(self, **values):
        """One row; floats are written so that they read back exactly."""
        self.writer.writerow([values[name] for name in self.columns])

    def sync(self):
        """On disk, before a checkpoint says that these rows have been written."""
        self.file.flush()
        os.fsync(self.file.fileno())


class RunLog:
    """history.csv, steps.csv, events.csv and, if asked for, TensorBoard events of a run."""

    def __init__(self, run_dir, progress, tensorboard):
        self.history = CsvLog(run_dir / "history.csv", HISTORY, keep=progress.epoch)
        self.steps = CsvLog(run_dir / "steps.csv", STEPS, keep=progress.step)
        self.events = CsvLog(run_dir / "events.csv", EVENTS, keep=progress.step)
        self.folder, self.board = run_dir, None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(run_dir / "tensorboard", purge_step=progress.step + 1)
            self._pictures(progress.step, "schedule.png", "batch.png")

    def step(self, **row):
        """A row of steps.csv: the values named in STEPS."""
        self.steps.append(**row)
        if self.board:
            for name in ("loss", "grad_norm", "lr_backbone", "lr_head"):
                self.board.add_scalar(f"step/{name}", row[name], row["step"])

    def epoch(self, step, **row):
        """A row of history.csv: the values named in HISTORY; `step` places it among the steps."""
        self.history.append(**row)
        if self.board:
            for name, value in row.items():
                if name != "epoch":
                    self.board.add_scalar(f"epoch/{name}", value, step)
            self.board.flush()

    def event(self, step, epoch, event, detail):
        """A row of events.csv: what was out of the ordinary (skipped, diverged, rollback, unreadable, memory)."""
        self.events.append(step=step, epoch=epoch, event=event, detail=detail)

    def finish(self, step, flags, figures):
        """The end of a run, for TensorBoard alone: its pictures, and its flags with the figures of the test."""
        if self.board:
            self._pictures(step, "curves.png", "test/confusion.png")
            self.board.add_hparams({name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in flags.items()},
                                   {f"test/{name}": value for name, value in figures.items() if isinstance(value, float)}, run_name=".")
            self.board.close()

    def _pictures(self, step, *names):
        from PIL import Image
        for name in names:
            if (self.folder / name).exists():
                with Image.open(self.folder / name) as picture:
                    self.board.add_image(name.removesuffix(".png"), np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def sync(self):
        for log in (self.steps, self.history, self.events):
            log.sync()
