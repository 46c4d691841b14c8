"""Random numbers of a clip: a pure function of (seed, epoch, clip id, purpose).

There is no generator state. So a clip is augmented alike in any batch, with any number of workers
or ranks, and after an interruption. `data/clips.py` explains what a clip id is.
"""
import hashlib
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike


class Purpose(IntEnum):
    """What random numbers are for. Two purposes never share a number.

    The values decide the random numbers, so changing one changes the results of every run, also of
    a run that is resumed. A new augmentation needs no entry here: it may use any name.
    """
    CROP = 0
    MIXUP = 1
    SPEC_AUGMENT = 2
    DROP_PATH = 3
    ORDER = 4
    SHIFT = 5
    PATCHOUT = 6
    GAIN = 7
    NOISE = 8
    FILTER = 9


def uniform(
    seed: int, epoch: int, clip_ids: ArrayLike, purpose: Purpose | str, count: int
) -> np.ndarray:
    """Draw `count` uniform random numbers in [0, 1) for each clip.

    clip_ids: (B,) integers. purpose: a Purpose, or a name that is hashed. Returns (B, count)
    float64. The numbers are splitmix64 (S. Vigna, 2015) over a key that hashes all arguments.
    """
    if isinstance(purpose, str):
        digest = hashlib.blake2b(purpose.encode(), digest_size=7).digest()  # far above any Purpose
        purpose = int.from_bytes(digest, "little")
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2**64 on purpose
        key = np.uint64(seed % 2**64)
        for value in (epoch, purpose):
            key = _mix(key + np.uint64(value + 1) * np.uint64(0x9E3779B97F4A7C15))
        clip_ids = np.asarray(clip_ids, dtype=np.uint64)[:, None]  # (B, 1)
        keys = _mix(key ^ _mix(clip_ids + np.uint64(0x632BE59BD9B4E019)))
        steps = np.arange(1, count + 1, dtype=np.uint64)[None, :] * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(keys + steps) >> np.uint64(11)) * 2.0**-53  # 53 bits fill a float64


def _mix(z):
    """The output function of splitmix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
