"""Write and read checkpoints: ordinary torch files, replaced atomically, checked when read.

A checkpoint holds tensors and plain types only, so it loads with `weights_only=True` and code in a
file is never run. It is a zip archive; the CRC-32 of every member is verified before it is used.
"""
import contextlib
import os
import pickle
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from util import InputError, fsync_path, if_supported

FORMAT = "warble"
VERSION = 2  # version 1 is converted when read

PARTS = {  # what a checkpoint holds, and its type
    # Learner.state_dict
    "model": dict, "ema": dict | None, "ema_updates": float, "optimizer": dict, "schedule": dict,
    "scaler": dict, "amp": str, "device": str, "split_limit": int | None,
    # what the model is and what it was trained on
    "config": dict, "frontend": dict, "clip": dict, "classes": list, "loss": dict, "weights": str,
    "manifest": dict, "bad_files": list, "flags": dict,
    # where the run stands
    "progress": dict, "calibration": dict | None,
    "fingerprint": dict | None,  # of the recordings, to know them in another place
}
MAX_DEPTH, MAX_TEXT, MAX_CLASSES = 12, 10_000, 100_000  # limits of what a file may hold
# of parts that are missing in early files
DEFAULTS = {"ema": None, "ema_updates": 0.0, "calibration": None, "fingerprint": None}


class CheckpointError(InputError):
    """A checkpoint that cannot be used or written."""


class Checkpoint(dict):
    """The parts of a checkpoint by name; asking for a missing one raises CheckpointError."""

    def __init__(self, path: Path, parts: dict):
        super().__init__(parts)
        self.path = path

    def __missing__(self, key):
        raise CheckpointError(
            f"{self.path}: lacks {key!r}; use a best.pt or last.pt that train.py wrote")

    def require_all(self) -> "Checkpoint":
        """Itself, if it has every part that a run needs to continue; raises CheckpointError."""
        for name in PARTS:
            self[name]
        return self


@contextlib.contextmanager
def as_checkpoint_error(path: Path) -> Iterator[None]:
    """Re-raise errors from using a checkpoint's contents as a CheckpointError that names the file.

    A file from elsewhere may hold anything, so the code that reads it may fail in many ways.
    """
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
            ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(f"{path}: its contents are not what train.py writes "
                              f"({type(error).__name__}: {reason}); use another checkpoint"
                              ) from None


# --- writing ---

def save_checkpoint(path: Path, parts: dict) -> tuple[int, float]:
    """Write `parts` (tensors and plain types) to `path`; the old file becomes `<name>.prev`.

    At any moment, also after a power cut, `path` holds the old file or the new one whole. Returns
    (bytes, seconds). Raises CheckpointError if the disk refuses; the old file is then intact.
    """
    path, started = Path(path), time.perf_counter()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **parts}, file)
            file.flush()
            with if_supported("syncing of files"):
                os.fsync(file.fileno())
        if path.exists():
            link(path, previous(path))
        os.replace(temporary, path)
        fsync_path(path.parent)
        return path.stat().st_size, time.perf_counter() - started
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = error if isinstance(error, OSError) else (error.__context__ or error)
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:100]
        raise CheckpointError(f"{path}: cannot be written ({reason}); free some space or permit "
                              "writing, then continue with --resume") from None


def previous(path: Path) -> Path:
    """Where the checkpoint before this one is."""
    return path.with_name(path.name + ".prev")


def link(path: Path, other: Path) -> None:
    """Make `other` the same file as `path`, atomically, without a copy if the disk can.

    Checkpoints are replaced and never changed in place, so two names may share their bytes.
    """
    temporary = other.with_name(other.name + ".tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    if other.exists() and other.samefile(path):  # renaming between its two names would do nothing
        return
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
            fsync_path(temporary)
        os.replace(temporary, other)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


class SaveTimer:
    """Tell when to save within an epoch: every `500` steps or `10m` minutes; `0` is never.

    Raises ValueError for anything else.
    """

    def __init__(self, every: str):
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", every)
        if not match:
            raise ValueError("give steps as 500 or minutes as 10m")
        self.steps = int(match[1] or 0)
        self.seconds = 60 * float(match[2] or 0)
        self.last_step, self.last_time = 0, time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save now, after `step` steps."""
        if self.steps and step % self.steps == 0 and step != self.last_step:
            self.last_step = step
            return True
        return bool(self.seconds) and time.monotonic() - self.last_time >= self.seconds

    def saved(self) -> None:
        self.last_time = time.monotonic()


# --- reading ---

def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU and verify it; code in it is never run.

    `module.` and `_orig_mod.` prefixes of weights are removed. Raises CheckpointError for a file
    that is missing, truncated, altered or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give the path of a best.pt or last.pt")
    _verify_archive(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # about TorchScript archives
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: holds pickled code, which is never run; use a checkpoint "
                              "that train.py wrote") from None
    except Exception as error:  # torch raises many types for files that are no checkpoints
        raise CheckpointError(f"{path}: not a checkpoint of this program ({type(error).__name__}); "
                              "use a best.pt or last.pt that train.py wrote") from None
    if type(state) is not dict or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program; weights of other "
                              "programs go into train.py --weights")
    version = state.get("version")
    if version not in (1, VERSION):
        raise CheckpointError(f"{path}: checkpoint version {version!r:.20}, this program reads 1 "
                              f"to {VERSION}; use the program version that wrote it")
    with as_checkpoint_error(path):
        if version == 1:
            _convert_version_1(state)
        _check_size(state, path.stat().st_size)
        state = Checkpoint(path, DEFAULTS | state)
        _check_types(state)
        for part in ("model", "ema"):
            if state.get(part) is not None:
                state[part] = dict(_checked_weight(*item) for item in state[part].items())
    return state


def _verify_archive(path):
    """Compare every member of the zip archive with its CRC-32."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise CheckpointError(f"{path}: not a checkpoint of this program, or its beginning "
                                      "is damaged; use a best.pt or last.pt that train.py wrote")
        with zipfile.ZipFile(path) as archive:
            # torch.save stores plain files without compression. A compressed member could unpack
            # to any size; one that is marked as a folder would be left unread, without an error.
            # Members may overlap, too, so that their sum is more than the file.
            members = archive.infolist()
            is_stored = all(member.compress_type == zipfile.ZIP_STORED
                            and member.external_attr == 0 for member in members)
            is_stored &= sum(member.file_size for member in members) <= path.stat().st_size
            damaged = archive.testzip() if is_stored else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); make it readable or use "
                              "another") from None
    except CheckpointError:
        raise
    except Exception:  # zipfile raises many types for damaged archives
        raise CheckpointError(f"{path}: truncated or damaged; use last.pt.prev or best.pt of the "
                              "same run") from None
    if damaged is not None or not is_stored:
        raise CheckpointError(f"{path}: damaged, its contents do not match their CRC-32; use "
                              "last.pt.prev or best.pt of the same run")


def _convert_version_1(state):
    """Rename what version 1 called otherwise, in place."""
    if "piece" in state:
        state["split_limit"] = state.pop("piece")
    if "progress" in state:
        progress = dict(state["progress"])
        if "window" in progress:
            progress["step_in_epoch"] = progress.pop("window")
        state["progress"] = progress


def _check_size(state, file_size):
    """Raise ValueError for contents that are far larger than the file, or nested without end.

    A list in a pickle may be used many times and takes two bytes each time: ten levels of ten such
    uses are 10^10 items to whoever walks through them. What a run writes is written out, so that
    each item takes a byte or more.
    """
    n_items, level = 0, [state]
    for _ in range(MAX_DEPTH):
        below = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, (list, tuple, set)):
                below += item
            elif isinstance(item, str) and len(item) > MAX_TEXT:
                raise ValueError(f"it has a text of {len(item)} characters")
            elif isinstance(item, int) and abs(item) >= 2**64:
                raise ValueError("it has a number of more than 64 bits")
            n_items += 1
            if n_items + len(below) > file_size:
                raise ValueError("its contents are larger than the file")
        if not below:
            return
        level = below
    raise ValueError("its contents are nested too deeply")


def _check_types(state):
    for name, kind in PARTS.items():
        if name in state and not isinstance(state[name], kind):
            raise ValueError(f"its {name} is a {type(state[name]).__name__}")
    for name, value in state.get("flags", {}).items():
        if not isinstance(name, str) or not isinstance(value, str | int | float | None):
            raise ValueError(f"its flag {str(name)[:40]} is a {type(value).__name__}")
    classes = state.get("classes", [])
    if len(classes) > MAX_CLASSES or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"its classes are not names, or more than {MAX_CLASSES}")


def _checked_weight(name, value):
    """(name without the prefixes of DistributedDataParallel and torch.compile, tensor)"""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
    is_plain = (value.layout is torch.strided and not value.is_meta and value.is_contiguous()
                and value.is_floating_point())
    if not is_plain:
        raise ValueError(f"{name[:60]} is not a plain tensor")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name[:60]} has values that are not finite")
    return name, value


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest usable one of `last.pt` and `last.pt.prev`, or None if there is neither.

    Returns it with notes to print: a damaged file is skipped and named there. Raises
    CheckpointError if there are checkpoints and all are damaged.
    """
    last = Path(folder) / "last.pt"
    errors = []
    for path in (last, previous(last)):
        if not path.is_file():
            continue
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        return checkpoint, [f"{error}: skipped, using {path.name}" for error in errors]
    if errors:
        raise CheckpointError(errors[0])
    return None, []
