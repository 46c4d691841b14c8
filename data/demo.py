"""The built-in demo data: ten classes of synthesised sounds, written as WAV files in class folders.

Nothing is downloaded: `write_demo(folder)` writes `<folder>/<class>/<class>_0001.wav` and so on, a
layout that user data may have, too. The folder `noise` has an hour without any of the classes, see
soundscape.py. Pitch, tempo, level, time, room and background vary within a class. Some classes are
similar (up-chirp and siren, trill and clicks, rain and surf), and class sizes are uneven. Some
clips have noise louder than the sound, or a snippet of another class. All is NumPy in float64 until
the last rounding, so a clip is the same on every machine.
"""
import os
import tempfile
from pathlib import Path

import numpy as np

from . import soundscape
from .synthesis import (
    SAMPLE_RATE,
    as_16_bit,
    drift,
    fade,
    harmonics,
    log_uniform,
    ring,
    write_wav,
)

SECONDS = 4.0
SAMPLES = int(SAMPLE_RATE * SECONDS)
COUNTS = {  # clips per class, 416 in all
    "rain": 72,
    "chirp_up": 60,
    "engine": 52,
    "trill": 46,
    "harmonic_call": 40,
    "clicks": 36,
    "siren": 32,
    "surf": 28,
    "chirp_down": 26,
    "bell": 24,
}
CLASSES = tuple(sorted(COUNTS))
NOISE = "noise"  # folder of the recordings that hold none of the classes
VERSION = 5  # raise it with every change of the sounds: older copies are then rewritten

README = """\
Demo data of warble: synthesised sounds, written by data/demo.py. One folder per class, clips of
4 s, 22,050 Hz, mono, 16-bit WAV. The folder noise has recordings of 150 s, an hour in all, without
any of the classes. Your own data may have the same layout: a folder of class folders with
recordings of any name, length and sample rate. Keep it elsewhere: warble rewrites this folder.
"""


# Building blocks. Durations are in seconds, frequencies in Hz; signals are (n,) float64.

def _length(seconds):
    """Samples of a duration, at most those of a clip."""
    return min(SAMPLES, int(seconds * SAMPLE_RATE))


def _noise(rng, low, high, slope):
    """Gaussian noise (SAMPLES,) of RMS 1 from low to high, falling by 3 * slope dB per octave."""
    freq = np.maximum(np.fft.rfftfreq(SAMPLES, 1 / SAMPLE_RATE), 1.0)
    gain = freq ** (-slope / 2) / (1 + (low / freq) ** 2) / (1 + (freq / high) ** 2)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(SAMPLES)) * gain, SAMPLES)
    return noise / np.sqrt(np.mean(noise**2))


def _place(rng, x):
    """Put x (n,) at a random place of a silent clip (SAMPLES,); cut it if it is longer."""
    x = x[:SAMPLES]
    start = int(rng.random() * (SAMPLES - len(x) + 1))
    return np.pad(x, (start, SAMPLES - len(x) - start))


def _sequence(rng, events, gap):
    """Events one after the other, about `gap` of silence apart, at a random place of a clip."""
    parts = []
    for event in events:
        padded = np.pad(event, (0, _length(gap * rng.uniform(0.7, 1.4))))
        parts.append(padded * rng.uniform(0.6, 1.0))
    return _place(rng, np.concatenate(parts))


# The classes. Each function takes a generator and returns a clean clip (SAMPLES,) at any level.
# The order of the random draws matters: changing it changes the sounds.

def _chirp_up(rng):
    return _chirp(rng, rising=True)


def _chirp_down(rng):
    return _chirp(rng, rising=False)


def _chirp(rng, rising):
    """Short tonal sweeps with silence between."""
    low = log_uniform(rng, 450, 2400)
    ratio = rng.uniform(1.2, 2.6)
    seconds = log_uniform(rng, 0.12, 0.9)
    amps = rng.random(4) * [0, 0.6, 0.4, 0.2] + [1, 0, 0, 0]
    events = []
    for _ in range(rng.integers(3, 7)):
        n = _length(seconds * rng.uniform(0.85, 1.2))
        sweep = np.linspace(0, 1, n) ** log_uniform(rng, 0.6, 1.7)
        if not rising:
            sweep = sweep[::-1]
        freq = low * rng.uniform(0.95, 1.05) * ratio**sweep
        events.append(fade(harmonics(freq, amps), 0.02, rng.uniform(0.02, 0.08)))
    return _sequence(rng, events, log_uniform(rng, 0.05, 0.6))


def _siren(rng):
    """One continuous tone with a swinging pitch, from an even wail to an abrupt yelp."""
    n = _length(rng.uniform(2.8, 4.0))
    u = (np.arange(n) / SAMPLE_RATE / log_uniform(rng, 0.4, 2.0) + rng.random()) % 1.0
    peak = rng.uniform(0.1, 0.9)  # when the pitch is highest within a period
    swing = np.where(u < peak, u / peak, (1 - u) / (1 - peak))
    freq = log_uniform(rng, 400, 1500) * rng.uniform(1.2, 2.6) ** (swing ** rng.uniform(0.6, 1.5))
    return _place(rng, fade(harmonics(freq, rng.random(6) / np.arange(1, 7)), 0.08, 0.15))


def _trill(rng):
    """Fast repetition of a short tonal note, in one or two bouts."""
    rate = log_uniform(rng, 7, 22)  # notes per second
    pitch = log_uniform(rng, 1300, 5000)
    duty = rng.uniform(0.3, 0.8)
    bend = rng.uniform(-0.15, 0.15)
    glide = rng.uniform(-0.2, 0.2)
    second_harmonic = rng.uniform(0, 0.3)
    bouts = []
    for _ in range(rng.integers(1, 3)):
        n = _length(log_uniform(rng, 1.0, 2.6))
        notes = np.cumsum(rate * (1 + 0.05 * drift(rng, n, 4))) / SAMPLE_RATE
        u = np.minimum(notes % 1.0 / duty, 1.0)  # 0 to 1 within a note, then 1 until the next
        freq = pitch * (1 + bend * u + glide * np.linspace(-0.5, 0.5, n))
        tone = harmonics(freq, np.array([1, second_harmonic]))
        bouts.append(fade(tone * np.sin(np.pi * u) ** 2, 0.1, 0.1))
    return _sequence(rng, bouts, rng.uniform(0.2, 0.6))


def _clicks(rng):
    """Series of short pulses, from dry ticks to ringing knocks, more or less regular."""
    rate = log_uniform(rng, 3, 12)  # clicks per second
    jitter = rng.uniform(0.0, 0.25)
    pitch = log_uniform(rng, 900, 5000)
    decay = log_uniform(rng, 0.001, 0.008)
    n = _length(decay * 8)
    click = ring(pitch, decay, n)
    click = click + rng.uniform(0, 0.5) * ring(pitch * rng.uniform(1.3, 2.2), decay / 2, n)
    series = np.zeros(_length(rng.uniform(2.0, 4.0)))
    start = 0.0
    while start < len(series) - n:
        series[int(start):int(start) + n] += click * rng.uniform(0.5, 1.0)
        start += SAMPLE_RATE / rate * (1 + jitter * rng.uniform(-1, 1))
    return _place(rng, series)


def _harmonic_call(rng):
    """Voice-like calls: harmonics under two resonances, with a bent pitch and vibrato."""
    pitch = log_uniform(rng, 150, 600)
    seconds = log_uniform(rng, 0.25, 1.0)
    k = np.arange(1, 31)
    amps = 0.05 / k
    for centre in (log_uniform(rng, 450, 900), log_uniform(rng, 1300, 2600)):
        resonance = np.exp(-0.5 * ((k * pitch - centre) / (0.3 * centre + 60)) ** 2)
        amps = amps + resonance / np.sqrt(k)
    arch = rng.uniform(-0.2, 0.3)
    slide = rng.uniform(-0.3, 0.3)
    vibrato = rng.uniform(0, 0.04)
    periods = seconds * rng.uniform(4, 9)  # of the vibrato, in one call
    events = []
    for _ in range(rng.integers(2, 5)):
        u = np.linspace(0, 1, _length(seconds * rng.uniform(0.7, 1.3)))
        bent = 1 + arch * np.sin(np.pi * u) + slide * u + vibrato * np.sin(2 * np.pi * periods * u)
        call = harmonics(pitch * rng.uniform(0.93, 1.07) * bent, amps)
        events.append(fade(call * (1 + 0.2 * drift(rng, len(u), 10)), 0.04, 0.1))
    return _sequence(rng, events, log_uniform(rng, 0.1, 0.6))


def _engine(rng):
    """Low, rough harmonic hum of varying speed, with the hiss of the exhaust."""
    n = _length(rng.uniform(2.2, 4.0))
    speed = 1 + rng.uniform(0.01, 0.12) * drift(rng, n, 2)
    speed = speed + rng.uniform(-0.3, 0.3) * np.linspace(0, 1, n)
    freq = log_uniform(rng, 24, 80) * np.maximum(speed, 0.4)
    hum = harmonics(freq, rng.random(40) / np.arange(1, 41) ** rng.uniform(0.3, 1.0))
    roughness = rng.uniform(0.1, 0.5)  # of uneven firing
    hum *= 1 + roughness * harmonics(freq / rng.integers(2, 5), np.ones(1))
    hiss = _noise(rng, 60, log_uniform(rng, 400, 3000), 0.5)[:n] * (1 + 0.3 * drift(rng, n, 20))
    mix = hum / np.sqrt(np.mean(hum**2)) + log_uniform(rng, 0.1, 0.3) * hiss
    return _place(rng, fade(mix, rng.uniform(0.1, 0.8), rng.uniform(0.1, 0.8)))


def _bell(rng):
    """Struck inharmonic partials, the higher ones decaying faster; two to five strokes."""
    pitch = log_uniform(rng, 350, 2200)
    decay = log_uniform(rng, 0.35, 1.4)
    interval = log_uniform(rng, 0.3, 1.2)
    ratios = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.66, 3.01, 4.17])
    ratios = ratios * (1 + 0.02 * rng.standard_normal(8))
    amps = rng.uniform(0.2, 1.0, 8) / np.sqrt(np.arange(1, 9))
    n = _length(decay * 5)
    stroke = sum(a * ring(r * pitch, decay / r**0.7, n) for a, r in zip(amps, ratios))
    clip = np.zeros(SAMPLES)
    seconds = rng.uniform(0, 2.0)
    for _ in range(rng.integers(2, 6)):
        rest = clip[int(seconds * SAMPLE_RATE):]  # empty beyond the end
        rest[:len(stroke)] += stroke[:len(rest)] * rng.uniform(0.5, 1.0)
        seconds += interval * rng.uniform(0.9, 1.1)
    return clip


def _rain(rng):
    """A steady bright hiss with single drops and slight gusts."""
    low = log_uniform(rng, 200, 1500)
    high = log_uniform(rng, 4000, 11000)
    hiss = _noise(rng, low, high, rng.uniform(0, 1.2))
    hiss *= 1 + rng.uniform(0.0, 0.45) * np.clip(drift(rng, SAMPLES, 1.0), -2, 2)
    drops = np.zeros(SAMPLES)
    for _ in range(int(SECONDS * log_uniform(rng, 8, 80))):
        start = int(rng.random() * (SAMPLES - 500))
        drop = ring(log_uniform(rng, 1000, 7000), log_uniform(rng, 0.001, 0.005), 500)
        drops[start:start + 500] += drop * rng.uniform(0.2, 1.0)
    return hiss + log_uniform(rng, 1.5, 8) * drops


def _surf(rng):
    """Waves: hiss that swells, brightens and recedes."""
    periods = np.arange(SAMPLES) / SAMPLE_RATE / rng.uniform(1.8, 6.0)
    periods = periods + 0.05 * drift(rng, SAMPLES, 1)
    wave_height = 0.5 + 0.5 * np.sin(2 * np.pi * (periods + rng.random()))
    swell = wave_height ** rng.uniform(1.0, 2.5)
    deep = _noise(rng, 80, log_uniform(rng, 500, 1800), 0.8)
    spray = _noise(rng, 500, log_uniform(rng, 3000, 9000), 0.5)
    floor = log_uniform(rng, 0.05, 0.3)
    brightness = rng.uniform(0.5, 1.2)
    return deep * (floor + swell) + brightness * spray * (floor / 2 + swell**2)


FAMILIES = {
    "bell": _bell,
    "chirp_down": _chirp_down,
    "chirp_up": _chirp_up,
    "clicks": _clicks,
    "engine": _engine,
    "harmonic_call": _harmonic_call,
    "rain": _rain,
    "siren": _siren,
    "surf": _surf,
    "trill": _trill,
}


# From a clean sound to a recording of it.

def _unit_level(x):
    """Scale x so that its loudest 0.2 s has RMS 1.

    So a signal-to-noise ratio means the same for short and long sounds.
    """
    return x / np.sqrt(np.mean(x.reshape(20, -1) ** 2, axis=1).max())


def _reverberate(rng, x):
    """x (SAMPLES,) in a room: plus its reverberation by decaying noise of at most a second."""
    n = SAMPLES + SAMPLE_RATE  # long enough that the tail does not wrap around
    decay = 10 ** (-3 * np.arange(SAMPLE_RATE) / SAMPLE_RATE / log_uniform(rng, 0.15, 1.2))
    tail = np.fft.rfft(rng.standard_normal(SAMPLE_RATE) * decay, n)
    wet = np.fft.irfft(np.fft.rfft(x, n) * tail, n)[:SAMPLES]
    return _unit_level(x + log_uniform(rng, 0.1, 0.8) * _unit_level(wet))


def _background(rng):
    """Noise (SAMPLES,) of about unit RMS, white to brown, some with gusts, some with mains hum."""
    gusts = 0.3 if rng.random() < 0.3 else 0.0
    hum = 0.5 if rng.random() < 0.2 else 0.0
    noise = _noise(rng, 30, SAMPLE_RATE, rng.uniform(0.0, 2.0))
    noise *= 1 + gusts * np.clip(drift(rng, SAMPLES, 1.5), -2, 2)
    return noise + hum * harmonics(np.full(SAMPLES, 50.0), 1 / np.arange(1, 9))


def _distractor(rng, name):
    """The loudest 0.15 to 0.5 s of a sound of another class, at a random place: (SAMPLES,)."""
    others = [c for c in CLASSES if c != name]
    sound = FAMILIES[others[rng.integers(len(others))]](rng)
    n = _length(rng.uniform(0.15, 0.5))
    start = min(max(int(np.abs(sound).argmax()) - n // 2, 0), SAMPLES - n)
    return _unit_level(_place(rng, fade(sound[start:start + n], 0.03, 0.03)))


def synthesise(name: str, index: int, seed: int = 0) -> np.ndarray:
    """Synthesise one clip of a class: (88200,) float32 in [-1, 1], multiples of 1/32768.

    index: counts from 1, as in the file names. The clip depends on (name, index, seed) only.
    """
    rng = np.random.default_rng([seed, CLASSES.index(name), index])
    clip = _unit_level(FAMILIES[name](rng))
    if rng.random() < 0.4:
        clip = _reverberate(rng, clip)
    worst_snr = 6 if name in ("rain", "surf") else 3  # dB; noise masks a hiss more than a tone
    snr = rng.uniform(worst_snr, worst_snr + 9) if rng.random() < 0.08 else rng.uniform(18, 35)
    clip = clip + 10 ** (-snr / 20) * _background(rng)
    if rng.random() < 0.08:
        clip = clip + 10 ** (rng.uniform(-18, -9) / 20) * _distractor(rng, name)
    clip *= 10 ** (rng.uniform(-24, -0.5) / 20) / np.abs(clip).max()
    return as_16_bit(clip)


def write_demo(root: Path, seed: int = 0) -> Path:
    """Write the demo data to `root` (230 MB, half a minute) unless it is complete. Returns `root`.

    The data is made in a temporary folder beside `root` and moved into place. So nobody sees
    incomplete files, and two processes may call this at once. An old or incomplete copy is renewed
    file by file and nothing is removed. Raises FileExistsError if `root` has other data.
    """
    root = Path(root)
    marker = f"warble demo {VERSION}, seed {seed}\n".encode()
    counts = COUNTS | {NOISE: soundscape.RECORDINGS}
    files = {}  # relative path -> (name of its folder, index)
    for name in sorted(counts):
        for index in range(1, counts[name] + 1):
            files[f"{name}/{name}_{index:04d}.wav"] = name, index
    if _is_complete(root, files, marker):
        return root
    _refuse_other_data(root, files)

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        new = Path(temporary) / "new"  # a subfolder, as other users cannot read the temporary one
        for file, (name, index) in files.items():
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            if name == NOISE:
                samples = soundscape.synthesise_soundscape(index, seed)
            else:
                samples = synthesise(name, index, seed)
            write_wav(new / file, samples)
        (new / "README.txt").write_text(README, "utf-8")
        (new / ".complete").write_bytes(marker)
        try:
            os.rename(new, root)  # works if root does not exist or is empty
        except OSError:
            if _is_complete(root, files, marker):  # another process was faster
                return root
            for file in [*files, "README.txt", ".complete"]:  # the marker last
                (root / file).parent.mkdir(exist_ok=True)
                os.replace(new / file, root / file)
    return root


def _is_complete(root, files, marker):
    try:
        for file, (name, _) in files.items():
            n_samples = soundscape.SAMPLES if name == NOISE else SAMPLES
            if os.path.getsize(root / file) != 44 + 2 * n_samples:
                return False
        return (root / ".complete").read_bytes() == marker
    except OSError:
        return False


def _refuse_other_data(root, files):
    """Raise FileExistsError for any visible file in `root` that is not demo data."""
    if root.is_file():
        paths = [root]
    else:
        paths = sorted([*root.glob("[!.]*.*"), *root.glob("[!.]*/[!.]*")])
    for path in paths:
        if path.relative_to(root).as_posix() not in files and path != root / "README.txt":
            raise FileExistsError(
                f"{path} is not demo data: remove it or choose another folder for the demo"
            )
