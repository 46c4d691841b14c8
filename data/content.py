"""A cheap key of what is in a file, to know a recording again under any name or date."""
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from util import open_regular

PIECE = 4096  # bytes at the start, middle and end of a file that its key covers
UNKNOWN = 0  # the key of a file that cannot be read


def content_key(path: str | os.PathLike) -> int:
    """A 63-bit key of a file's size and three pieces of it; UNKNOWN if it cannot be read."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            for start in (0, size // 2, max(0, size - PIECE)):
                file.seek(start)
                digest.update(file.read(PIECE))
    except OSError:
        return UNKNOWN
    return int.from_bytes(digest.digest(), "big") >> 1


def content_keys(root: Path, paths: Sequence[str]) -> np.ndarray:
    """(n,) int64 keys of files below a folder; a path that occurs again is read once."""
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(8) as pool:
        keys = dict(zip(distinct, pool.map(lambda path: content_key(root / path), distinct),
                        strict=True))
    return np.array([keys[path] for path in paths], np.int64)
