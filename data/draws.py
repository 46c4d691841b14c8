"""Random numbers that belong to a clip: a pure function of (seed, epoch, clip, purpose).

No generator state: the same clip in the same epoch is treated alike whatever the batch it is in, the
number of workers or ranks, and whether the run was interrupted before it.
"""
import numpy as np

CROP, MIX, SPECAUGMENT, DROP_PATH, ORDER, SHIFT, PATCHOUT, GAIN, NOISE, FILTER = range(10)  # purposes: streams that never share a number


def uniform(seed, epoch, clips, purpose, count):
    """(len(clips), count) float64 in [0, 1) from splitmix64 (S. Vigna, 2015) over the mixed-in key."""
    with np.errstate(over="ignore"):
        key = np.uint64(seed % 2**64)
        for part in (epoch, purpose):
            key = _mix(key + np.uint64(part + 1) * np.uint64(0x9E3779B97F4A7C15))
        keys = _mix(key ^ _mix(np.asarray(clips, dtype=np.uint64)[:, None] + np.uint64(0x632BE59BD9B4E019)))
        steps = np.arange(1, count + 1, dtype=np.uint64)[None, :] * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(keys + steps) >> np.uint64(11)) * 2.0**-53


def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
