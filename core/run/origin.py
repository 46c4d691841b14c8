"""Whether a checkpoint is in the folder of its run, so that what it says of folders can be used.

A checkpoint from elsewhere may name any folder of this machine. Its recordings would be read into
a report, and its cache written. So folders come from the run.json beside it, or from a flag.
"""
import json
from pathlib import Path

from data.manifest import Manifest
from data.splits import split_hash

from .checkpoint import Checkpoint, as_checkpoint_error


def own_run_info(checkpoint: Checkpoint) -> dict | None:
    """The content of run.json if the checkpoint is in the folder of its run, else None.

    run.json must have the same split, and says where the recordings are: its root may be newer than
    the checkpoint's. A link to the checkpoint may be anywhere.
    """
    folders = dict.fromkeys((checkpoint.path.parent, checkpoint.path.resolve().parent))
    infos = [info for info in map(read_run_info, folders) if info is not None]
    if not infos:
        return None
    with as_checkpoint_error(checkpoint.path):
        split = split_hash(Manifest.from_dict(checkpoint["manifest"]))
    return next((info for info in infos if info["split_sha256"] == split), None)


def read_run_info(folder: Path) -> dict | None:
    """The content of run.json if it names the data, the split and the flags, else None."""
    path = folder / "run.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        info["split_sha256"], info["data"]["root"], info["flags"].get("cache_dir")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return info
