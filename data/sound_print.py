"""Know a recording again after another codec, rate, gain or a little padding.

A print has bits of how the spectrum changes: J. Haitsma and T. Kalker, "A Highly Robust Audio
Fingerprinting System", 2002. It is of the first SECONDS of a file, at 8 kHz.
"""
import math

import numpy as np
import soxr

RATE = 8000  # Hz
WINDOW, HOP = 2048, 512  # samples: 256 ms every 64 ms, so that a shift by half a hop changes little
FRAMES, STEP = 80, 2  # words of a print; a bit compares a frame with the one STEP earlier
BITS = 16  # of a word: one for each pair of neighbouring bands
SECONDS = ((FRAMES + STEP - 1) * HOP + WINDOW) / RATE  # 5.4 s
LOWEST, HIGHEST = 150, 3600  # Hz
FLOOR = 1e-6  # of the highest energy of a band; below is silence
DEAD_ZONE = 0.02  # natural logarithm of energy; steady tones change less
N_KEYS, N_BLOCKS = 24, 6
PRINT = np.dtype([("words", "<u2", FRAMES), ("keys", "<u2", N_KEYS)])
# What a checkpoint remembers of a clip: the words with most bits, from `offset` on, and some keys.
SHORT_WORDS, SHORT_KEYS = 20, 11
SHORT = np.dtype([("offset", "u1"), ("words", "<u2", SHORT_WORDS), ("keys", "<u2", SHORT_KEYS)])

MIN_BITS = 60  # set in a print; fewer are silence, a steady tone or a very short clip
MAX_LAG = 3  # hops
# Set bits in common, of those set in either. Other recordings have a third, and in 80,000 pairs of
# field recordings up to 0.45; copies have at least 0.6. Chance is larger with fewer bits.
MIN_OVERLAP, CHANCE, CHANCE_PER_ROOT = 0.5, 0.34, 2.2
SAME_SECONDS = 0.15  # a codec or padding may change the length by this
NEIGHBOURS = 32  # with the same key that a print is compared with

SHORT_WINDOW, SHORT_HOP = 512, 256  # samples; four times as fast as transforms of WINDOW
PER_WINDOW, PER_HOP = (WINDOW - SHORT_WINDOW) // SHORT_HOP + 1, HOP // SHORT_HOP
_EDGES = np.geomspace(LOWEST, HIGHEST, BITS + 2) * SHORT_WINDOW / RATE
_BAND_STARTS = np.round(_EDGES).astype(int)
_PROJECTION = np.random.default_rng(0).standard_normal((N_BLOCKS * BITS, N_KEYS * 16))
_SHORT_WINDOW = np.hanning(SHORT_WINDOW).astype(np.float32)
_WINDOW = np.square(np.hanning(PER_WINDOW + 2)[1:-1]).astype(np.float32)


def sound_print(wave: np.ndarray, rate: int) -> np.ndarray:
    """The print of mono samples (k,) float32 at `rate` Hz: a PRINT record.

    It is all 0 for silence and for very short files.
    """
    result = np.zeros((), PRINT)
    wave = wave[:math.ceil(SECONDS * rate)]
    peak = np.abs(wave).max(initial=0)
    if not peak > 0:
        return result
    wave = (wave / peak).astype(np.float32)
    if rate != RATE:
        wave = soxr.resample(wave, rate, RATE, quality="LQ")
    if len(wave) < WINDOW + STEP * HOP:
        return result
    bands = _band_energies(wave)
    highest = bands.max()
    if not highest > 0:
        return result
    slopes = np.diff(np.log(bands + FLOOR * highest), axis=1)  # (frames, BITS)
    is_rising = slopes[STEP:] - slopes[:-STEP] > DEAD_ZONE
    result["words"][:len(is_rising)] = np.packbits(is_rising, axis=1).view("<u2")[:, 0]
    if np.count_nonzero(is_rising) >= MIN_BITS:
        result["keys"] = _keys(slopes)
    return result


def _band_energies(wave):
    """(frames, BITS + 1) float32 energies of the bands under long windows, made of short ones."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, SHORT_WINDOW)[::SHORT_HOP]
    spectrum = np.fft.rfft(frames[:PER_WINDOW + (FRAMES + STEP - 1) * PER_HOP] * _SHORT_WINDOW)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    bands = np.add.reduceat(power, _BAND_STARTS, axis=1)[:, :-1]
    groups = np.lib.stride_tricks.sliding_window_view(bands, PER_WINDOW, axis=0)[::PER_HOP]
    return groups @ _WINDOW


def _keys(slopes):
    """(N_KEYS,) uint16 that near-identical recordings share one of: signs of random projections."""
    slopes = slopes - slopes.mean(axis=0)
    position = (np.arange(len(slopes)) + 0.5) / len(slopes) * (N_BLOCKS - 1)
    weight = np.maximum(0, 1 - np.abs(position - np.arange(N_BLOCKS)[:, None]))  # (blocks, frames)
    blocks = weight @ slopes / weight.sum(axis=1, keepdims=True)
    signs = blocks.reshape(-1) @ _PROJECTION > 0
    return np.packbits(signs).view("<u2")


def shorten(prints: np.ndarray) -> np.ndarray:
    """(n,) PRINT -> (n,) SHORT."""
    short = np.zeros(len(prints), SHORT)
    n_bits = np.bitwise_count(prints["words"]).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(n_bits, SHORT_WORDS, axis=1)
    short["offset"] = windows.sum(axis=2).argmax(axis=1)
    columns = short["offset"][:, None] + np.arange(SHORT_WORDS)
    short["words"] = np.take_along_axis(prints["words"], columns, axis=1)
    short["keys"] = prints["keys"][:, :SHORT_KEYS]
    return short


def matches(prints: np.ndarray, short: np.ndarray) -> np.ndarray:
    """(n,) index of a near-identical one of the short prints (m,) for each print (n,), -1: none.

    Lengths are not compared.
    """
    result = np.full(len(prints), -1, np.int64)
    known = np.flatnonzero(short["keys"].any(axis=1))
    asked = np.flatnonzero(prints["keys"].any(axis=1))
    columns = np.minimum(short["offset"], FRAMES - SHORT_WORDS)[:, None] + np.arange(SHORT_WORDS)
    for k in range(SHORT_KEYS):
        order = known[np.argsort(short["keys"][known, k], kind="stable")]
        keys = short["keys"][order, k]
        first = np.searchsorted(keys, prints["keys"][asked, k])
        for distance in range(NEIGHBOURS):
            at = first + distance
            is_same = at < len(order)
            is_same[is_same] = keys[at[is_same]] == prints["keys"][asked[is_same], k]
            rows, candidates = asked[is_same], order[at[is_same]]
            if len(rows) == 0:
                break
            words, mask = np.zeros((2, len(rows), FRAMES), np.uint16)
            np.put_along_axis(words, columns[candidates], short["words"][candidates], axis=1)
            np.put_along_axis(mask, columns[candidates], np.uint16(0xFFFF), axis=1)
            chosen = is_near(prints["words"][rows], words, mask)
            result[rows[chosen]] = candidates[chosen]
    return result


def is_near(first: np.ndarray, second: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """(n,) bool: whether two prints' words (n, words) overlap more than other recordings do.

    mask: (n, words) uint16 of the bits of `second` that are known; by default all are.
    """
    n_bits = np.bitwise_count(second).sum(axis=1)
    if mask is None:
        n_bits = (n_bits + np.bitwise_count(first).sum(axis=1)) / 2
    least = np.maximum(MIN_OVERLAP, CHANCE + CHANCE_PER_ROOT / np.sqrt(np.maximum(n_bits, 1)))
    return overlap(first, second, mask) >= least


def overlap(first: np.ndarray, second: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """(n,) share of the set bits of two prints' words (n, words) that they have in common.

    The best of all lags up to MAX_LAG counts, 0 for prints with too few bits.
    """
    best = np.zeros(len(first))
    n_words = first.shape[1]
    for lag in range(-MAX_LAG, MAX_LAG + 1):
        a = first[:, max(0, lag):n_words + min(0, lag)]
        b = second[:, max(0, -lag):n_words + min(0, -lag)]
        if mask is not None:
            a = a & mask[:, max(0, -lag):n_words + min(0, -lag)]
        both = np.bitwise_count(a & b).sum(axis=1, dtype=int)
        either = np.bitwise_count(a | b).sum(axis=1, dtype=int)
        best = np.where(either >= MIN_BITS, np.maximum(best, both / np.maximum(either, 1)), best)
    return best


def near_pairs(prints: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """(k, 2) pairs of near-identical recordings, sorted; the first index is the lower one.

    prints: (n,) PRINT, all 0 if unknown. seconds: (n,) length of each file. In large sets of
    copies not every pair is listed, but the pairs connect the set.
    """
    known = np.flatnonzero(prints["keys"].any(axis=1))
    found = [np.zeros((0, 2), np.int64)]
    for k in range(N_KEYS):
        keys = prints["keys"][known, k]
        order = known[np.lexsort((seconds[known], keys))]
        keys = prints["keys"][order, k]
        for distance in range(1, min(NEIGHBOURS + 1, len(order))):
            a, b = order[:-distance], order[distance:]
            same_key = keys[:-distance] == keys[distance:]
            if not same_key.any():
                break
            same_key &= np.abs(seconds[a] - seconds[b]) <= SAME_SECONDS
            found.append(np.sort(np.stack([a[same_key], b[same_key]], axis=1), axis=1))
    candidates = np.unique(np.concatenate(found), axis=0)
    words = prints["words"]
    chosen = [is_near(words[block[:, 0]], words[block[:, 1]])
              for block in np.array_split(candidates, len(candidates) // 10_000 + 1)]
    return candidates[np.concatenate(chosen)]
