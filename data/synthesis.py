"""Building blocks of synthesised sounds, for the demo data.

Durations are in seconds, frequencies in Hz; signals are (n,) float64 at SAMPLE_RATE.
"""
import os
import wave

import numpy as np

SAMPLE_RATE = 22050  # Hz


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number from low to high, whose logarithm is uniform."""
    return low * (high / low) ** rng.random()


def drift(rng: np.random.Generator, n: int, per_second: float, rate: int = SAMPLE_RATE
          ) -> np.ndarray:
    """Random curve (n,) of about unit variance, with `per_second` independent values a second.

    rate: points of the curve per second.
    """
    knots = rng.standard_normal(int(n / rate * per_second) + 2)
    return np.interp(np.arange(n) * (per_second / rate), np.arange(len(knots)), knots)


def one_period(amps: np.ndarray) -> np.ndarray:
    """Sum (4096,) of sines that make 1 to K periods, of amplitudes amps (K,)."""
    return np.fft.irfft(np.r_[0, -2048j * amps], 4096)


def harmonics(freq: np.ndarray, amps: np.ndarray) -> np.ndarray:
    """Sum (n,) of sines at 1 to K times freq (n,), of amplitudes amps (K,), without aliases."""
    audible = np.arange(1, len(amps) + 1) * freq.max() < 0.48 * SAMPLE_RATE
    period = one_period(amps * audible)  # a table: so the cost does not grow with K
    phase = np.cumsum(freq) / SAMPLE_RATE % 1.0
    return np.interp(phase * 4096, np.arange(4097), np.r_[period, period[0]])


def ring(freq: float, decay: float, n: int) -> np.ndarray:
    """Damped sine (n,): a click, a drop, a partial of a bell."""
    t = np.arange(n) / SAMPLE_RATE
    return np.exp(-t / decay) * np.sin(2 * np.pi * freq * t)


def fade(x: np.ndarray, attack: float, release: float) -> np.ndarray:
    """x (n,) with raised-cosine edges."""
    rise = np.linspace(0, np.pi / 2, min(int(attack * SAMPLE_RATE), len(x)))
    fall = np.linspace(0, np.pi / 2, min(int(release * SAMPLE_RATE), len(x)))
    x = x.copy()
    x[:len(rise)] *= np.sin(rise) ** 2
    x[-len(fall):] *= np.cos(fall) ** 2
    return x


def as_16_bit(x: np.ndarray) -> np.ndarray:
    """x in [-1, 1] as float32 multiples of 1/32768, which a 16-bit file holds without loss."""
    return (np.rint(x * 32767) / 32768).astype(np.float32)


def write_wav(path: str | os.PathLike, samples: np.ndarray) -> None:
    """Write what `as_16_bit` returned as a mono WAV, without loss."""
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE, len(samples), "NONE", "not compressed"))
        out.writeframes(np.rint(samples * 32768).astype("<i2").tobytes())
