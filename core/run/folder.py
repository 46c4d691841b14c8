"""The run folder: where it is, how a run starts or continues in it, and its lock."""
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from util import InputError

from .checkpoint import Checkpoint, as_checkpoint_error, link, load_checkpoint, load_newest

_locks = []  # held until the process ends


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
    4. A path: continue from that checkpoint, in run_dir or the checkpoint's folder.

    Returns (folder, checkpoint or None, lines to print). A run to continue is locked. Raises
    RunError or CheckpointError.
    """
    new = Path(run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{data_name}")
    if resume is None:
        _check_is_new(new)
        return new, None, []
    if resume not in ("newest", "auto"):
        folder = Path(run_dir) if run_dir else Path(resume).parent
        checkpoint = load_checkpoint(resume).require_all()
        _make_folder(folder)
        lock_run(folder)
        _link_missing_best(folder, checkpoint)
        return folder, checkpoint, [f"resuming {resume} in {folder}"]
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


def create_run(folder: Path, may_exist: bool = False) -> None:
    """Make a run folder and lock it.

    may_exist: also accept a folder with files in it, of a run that died before its first
    checkpoint. Raises RunError if the folder cannot be written or is in use.
    """
    if not may_exist:
        _check_is_new(folder)
    _make_folder(folder)
    lock_run(folder)


def _make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--run-dir {folder}: cannot be made ({error.strerror}); give another "
                       "--run-dir") from None


def lock_run(folder: Path) -> None:
    """Lock the run folder for this process until it ends, however it ends. Raises RunError."""
    # A singleton can be acquired again by the process that holds it.
    lock = FileLock(Path(folder).resolve() / ".lock", is_singleton=True, mode=0o644)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunError(f"--run-dir {folder}: another run is writing there; wait for it or give "
                       "another --run-dir") from None
    except OSError as error:
        raise RunError(f"--run-dir {folder}: cannot be written ({error.strerror}); give another "
                       "--run-dir") from None
    _locks.append(lock)


def newest_run(folder: str | Path, name: str) -> Path | None:
    """The newest `<folder>/*/<name>` by time of writing, or None."""
    candidates = [path for path in Path(folder).glob(f"*/{name}") if path.is_file()]
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
