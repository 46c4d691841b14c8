"""The run folder: where it is, how a run starts or continues in it, and its lock."""
import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from data.manifest import Manifest
from data.splits import split_hash
from util import InputError, if_supported, read_regular

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    as_checkpoint_error,
    link,
    load_checkpoint,
    load_newest,
)

COPIED = ("best.pt", "run.json", "split.csv", "bad_files.csv", "steps.csv", "history.csv",
          "events.csv")  # what a run takes along into another folder
_locks = {}  # path of a lock -> its file, which is open until the process ends


def _leave_locks():
    """In a forked process, such as a worker: it must not hold the lock when its run is killed."""
    for handle in _locks.values():
        os.close(handle)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks)


class RunError(InputError):
    """A run folder that cannot be used."""


def open_run(run_dir: str | None, resume: str | None,
             data_name: str) -> tuple[Path, Checkpoint | None, list[str]]:
    """Find the folder to work in, and the checkpoint to continue from.

    run_dir: the folder that was asked for, or None for `runs/<time>-<data_name>`. A run starts in
    one of four ways, by `resume`:

    1. None: a new run. Its folder is not made yet; `create_run` does that once all else is checked.
    2. "newest": continue the run in run_dir, by default the newest run under `runs/`.
    3. "auto": the same, or a new run if there is no checkpoint.
    4. A path: continue from that checkpoint, in run_dir or the checkpoint's folder. A folder with
       files of another run, or with a later checkpoint, is refused.

    Returns (folder, checkpoint or None, lines to print). A run to continue is locked. Raises
    RunError or CheckpointError.
    """
    new = Path(run_dir or default_folder(data_name))
    if resume is None:
        _check_is_new(new)
        return new, None, []
    if resume not in ("newest", "auto"):
        return _continue_from_file(Path(resume), run_dir and Path(run_dir))
    newest = newest_run("runs", "last.pt")
    folder = Path(run_dir) if run_dir else newest and newest.parent
    if folder is None or not folder.is_dir():
        if resume == "auto":
            return new, None, ["--resume auto: no run to continue, starting a new one"]
        raise RunError(f"--resume: no run {run_dir or 'under runs/'} to continue; start one "
                       "without --resume")
    lock_run(folder)
    checkpoint, notes = load_newest(folder)
    if checkpoint is None:
        if resume == "auto":
            return folder, None, [f"--resume auto: {folder} has no checkpoint yet, starting over"]
        raise RunError(f"--resume: {folder} has no checkpoint yet; remove it and start without "
                       "--resume")
    _link_missing_best(folder, checkpoint.require_all())
    return folder, checkpoint, [*notes, f"resuming {folder}"]


def default_folder(data_name: str) -> str:
    """runs/<time>-<name>"""
    return f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{data_name}"


def _continue_from_file(path, run_dir):
    """Continue from a checkpoint in its own folder, or in another that has no run."""
    checkpoint = load_checkpoint(path).require_all()
    folder = run_dir or path.parent
    _make_folder(folder)
    lock_run(folder)
    is_elsewhere = folder.resolve() != path.parent.resolve()
    other_name = f"continue it with --resume {path} --run-dir and the name of a new folder"
    if not _is_run_of(checkpoint, folder):
        raise RunError(f"--resume {path}: {folder} has the files of another run, which would be "
                       f"overwritten; {other_name}")
    step, later = checkpoint["progress"].get("step"), folder / "last.pt"
    if later.is_file() and not (path.exists() and later.samefile(path)):
        try:
            last_step = load_checkpoint(later)["progress"].get("step")
        except CheckpointError:
            last_step = 0
        if last_step > step:
            raise RunError(f"--resume {path}: stands at step {step}, but {later} at step "
                           f"{last_step}, which would be lost; {other_name}")
    if is_elsewhere and _is_run_of(checkpoint, path.parent):
        for name in COPIED:
            if (path.parent / name).is_file() and not (folder / name).exists():
                shutil.copyfile(path.parent / name, folder / name)
    _link_missing_best(folder, checkpoint)
    return folder, checkpoint, [f"resuming {path} in {folder}"]


def _is_run_of(checkpoint, folder):
    """Whether a folder has the run of this checkpoint, as its run.json tells, or none."""
    try:
        info = json.loads(read_regular(folder / "run.json"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    with as_checkpoint_error(checkpoint.path):
        manifest = Manifest.from_dict(checkpoint["manifest"])
        same_flags = all(checkpoint["flags"].get(name) == info["flags"].get(name)
                         for name in ("seed", "epochs", "loss", "lr_backbone", "lr_head"))
        return (same_flags and info["split_sha256"] == split_hash(manifest)
                and info["model"] == checkpoint["config"])


def _link_missing_best(folder, checkpoint):
    """Link best.pt if the run died after writing last.pt and before linking best.pt to it."""
    with as_checkpoint_error(checkpoint.path):
        progress = checkpoint["progress"]
        is_best = progress["best_epoch"] == progress["epoch"] > 0
        at_epoch_end = progress["step_in_epoch"] == 0
    if is_best and at_epoch_end:
        link(checkpoint.path, folder / "best.pt")


def _check_is_new(folder):
    if not folder.exists():
        return
    if not folder.is_dir() or any(entry.name != ".lock" for entry in folder.iterdir()):
        raise RunError(f"--run-dir {folder}: exists already; continue it with --resume, or give "
                       "another --run-dir")


def create_run(folder: Path, may_exist: bool = False, may_rename: bool = False) -> Path:
    """Make a run folder and lock it -> the folder.

    may_exist: also accept a folder with files in it, of a run that died before its first
    checkpoint. may_rename: take another name if somebody else has just taken this one. Raises
    RunError if the folder cannot be written or is in use.
    """
    if may_rename:
        folder = reserve_folder(folder)
    elif not may_exist:
        _check_is_new(folder)
    _make_folder(folder)
    lock_run(folder)
    return folder


def reserve_folder(folder: Path) -> Path:
    """Make a folder that nobody else has: `folder`, or else `folder`-2, -3 and so on."""
    for number in range(1, 1000):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            candidate.parent.mkdir(parents=True, exist_ok=True)
            candidate.mkdir()
            return candidate
        except FileExistsError:
            if not candidate.parent.is_dir():
                break
        except OSError:
            break
    return folder  # the error is raised when it is used


def _make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--run-dir {folder}: cannot be made ({error.strerror}); give another "
                       "--run-dir") from None


def lock_run(folder: Path) -> None:
    """Lock the run folder for this process until it ends, however it ends. Raises RunError.

    Processes that it starts do not hold the lock. A file system without locks is used without.
    """
    path = str(Path(folder).resolve() / ".lock")
    if path in _locks:
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with if_supported("locks"):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
    except BlockingIOError:
        raise RunError(f"--run-dir {folder}: another run is writing there; wait for it or give "
                       "another --run-dir") from None
    except OSError as error:
        raise RunError(f"--run-dir {folder}: cannot be written ({error.strerror}); give another "
                       "--run-dir") from None
    _locks[path] = handle


def is_being_written(folder: Path) -> bool:
    """Whether another process is writing to a run folder."""
    path = Path(folder).resolve() / ".lock"
    if str(path) in _locks:
        return False
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock, or no locks on this file system
    return False


def newest_run(folder: str | Path, name: str, with_folds: bool = False) -> Path | None:
    """The newest `<folder>/*/<name>` by time of writing, or None.

    with_folds: also look into the folders that `--folds` makes, `<folder>/*/fold*/`.
    """
    patterns = ["*", "*/fold*"] if with_folds else ["*"]
    candidates = [path for pattern in patterns for path in Path(folder).glob(f"{pattern}/{name}")
                  if path.is_file()]
    return max(candidates, key=lambda path: path.stat().st_mtime_ns, default=None)


def describe_machine(device: torch.device) -> dict:
    """Versions, device and commit, for run.json."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                             capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    except OSError:
        commit = None
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    else:
        device_name = platform.processor() or platform.machine()
    packages = ("torch", "timm", "numpy", "soundfile", "soxr")
    return {
        "commit": commit,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "device": str(device),
        "device_name": device_name,
        "threads": torch.get_num_threads(),
    }
