"""The run folder: made, locked, and written so that it is whole after any crash."""
import csv
import fcntl
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

HISTORY = ("epoch train_loss train_acc val_loss val_acc val_macro_f1 val_map lr_backbone lr_head seconds "
           "clips_per_second peak_memory_mb skipped_steps").split()
STEPS = "step epoch loss grad_norm lr_backbone lr_head scale clips".split()


class RunError(ValueError):
    """A run folder that cannot be used: one line that names it and the mend."""


def check_new(path):
    """Raise RunError where a new run folder would meet something that exists."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(entry.name != ".lock" for entry in path.iterdir())):
        raise RunError(f"--run-dir {path}: exists already; continue it with --resume, or give another --run-dir")


def create_run(path):
    """Make a new run folder and lock it -> (Path, lock to keep). Raises RunError where it exists already
    with something in it, or cannot be written."""
    path = Path(path)
    check_new(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--run-dir {path}: cannot be made ({error.strerror}); give another --run-dir") from None
    return path, lock_run(path)


def lock_run(path):
    """Hold the run folder for this process; the lock goes with the process, however it ends."""
    try:
        handle = open(Path(path) / ".lock", "a")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"--run-dir {path}: another run is writing there; wait for it or give another "
                       "--run-dir") from None
    except OSError as error:
        raise RunError(f"--run-dir {path}: cannot be written ({error.strerror}); give another --run-dir") from None
    return handle


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
    packages = {name: version(name) for name in ("torch", "torchaudio", "timm", "numpy", "soundfile", "soxr")}
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
        self.file = open(temporary, "w", newline="", encoding="utf-8")
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
    """history.csv, steps.csv and, if asked for, TensorBoard events of a run."""

    def __init__(self, run_dir, progress, tensorboard):
        self.history = CsvLog(run_dir / "history.csv", HISTORY, keep=progress.epoch)
        self.steps = CsvLog(run_dir / "steps.csv", STEPS, keep=progress.step)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(run_dir / "tensorboard", purge_step=progress.step + 1)

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

    def sync(self):
        self.steps.sync()
        self.history.sync()
