"""What a run's recordings are, so that they are known again in another place."""
import os
import zlib

import numpy as np

from util import open_regular

from .manifest import DataError, Manifest
from .scan import scan

N_SAMPLED = 200  # files that are read
BLOCK = 2**16  # bytes read of each, from its middle


def fingerprint(manifest: Manifest) -> dict:
    """{"bytes": size of each row's file, "sample": {path: CRC-32 of bytes in its middle}}.

    A file that cannot be read has the size -1.
    """
    paths = sorted(set(manifest.paths))
    sizes = {path: _size(manifest.root / path) for path in paths}
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, N_SAMPLED).astype(int)]
    sample = {path: _checksum(manifest.root / path, sizes[path]) for path in dict.fromkeys(chosen)}
    return {"bytes": [sizes[path] for path in manifest.paths], "sample": sample}


def check_same_recordings(manifest: Manifest, known: dict, data: str) -> None:
    """Raise DataError unless the files of the manifest are those of a fingerprint."""
    now = fingerprint(manifest)
    sizes = list(zip(now["bytes"], known["bytes"], strict=True))
    n_missing = sum(size < 0 for size, _ in sizes)
    n_other = sum(0 <= size != before for size, before in sizes)
    if not n_missing and not n_other:  # recordings of one length have one size
        n_other = sum(now["sample"].get(path) != checksum
                      for path, checksum in known["sample"].items())
    if n_missing or n_other:
        raise DataError(
            f"--data {data}: not the recordings that the run was started with: of {len(manifest)} "
            f"clips {n_missing} are missing and {n_other} differ; give their folder, or start a "
            "new run")


def check_same_lengths(manifest: Manifest, data: str) -> None:
    """The same for a run without a fingerprint: the lengths that the headers tell are compared."""
    found = scan(manifest, None, full=False)
    with np.errstate(invalid="ignore"):
        differs = ~found.ok | (abs(found.duration - manifest.duration)
                               > 0.1 + 0.01 * manifest.duration)
    if differs.any():
        path = manifest.paths[int(np.flatnonzero(differs)[0])]
        raise DataError(f"--data {data}: not the recordings that the run was started with: "
                        f"{differs.sum()} of {len(manifest)} clips are missing or of another "
                        f"length, such as {path}; give their folder, or start a new run")


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _checksum(path, size):
    try:
        with open_regular(path) as file:
            file.seek(max(0, size // 2 - BLOCK // 2))
            return zlib.crc32(file.read(BLOCK))
    except OSError:
        return None
