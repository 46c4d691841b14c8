"""The built-in generated data set: ten classes of synthesised sounds, written as ordinary WAV folders.

Nothing to download: `write_demo(folder)` leaves `<folder>/<class>/<class>_0001.wav` and so on, the layout that
one's own recordings may have too. Pitch, tempo, level, place in time, room and background vary within a class;
some classes are easily taken for each other (up-chirp and siren, trill and clicks, rain and surf); their sizes
are uneven; some clips have noise louder than the sound, or a snippet of another class. All is numpy in float64
until the last rounding, so that a clip is the same on every machine.
"""
import os
import tempfile
import wave
from pathlib import Path

import numpy as np

SAMPLE_RATE = 22050  # Hz
SECONDS = 4.0
SAMPLES = int(SAMPLE_RATE * SECONDS)
COUNTS = {"rain": 72, "chirp_up": 60, "engine": 52, "trill": 46, "harmonic_call": 40,
          "clicks": 36, "siren": 32, "surf": 28, "chirp_down": 26, "bell": 24}  # clips per class, 416 in all
CLASSES = tuple(sorted(COUNTS))
VERSION = 4  # raise it with every change of the recipe: older copies are then rewritten

README = """Demo data of warble: synthesised sounds, written by data/demo.py. One folder per class, clips of 4 s,
22,050 Hz, mono, 16-bit WAV. Your own data may be laid out in the same way, a folder of class folders of
recordings, with names, lengths and sample rates as they come; elsewhere, for this folder is the demo's to rewrite.
"""


# Building blocks. Durations are in seconds, frequencies in Hz; signals are (n,) float64.

def _log_uniform(rng, low, high):
    return low * (high / low) ** rng.random()


def _length(seconds):
    return min(SAMPLES, int(seconds * SAMPLE_RATE))


def _drift(rng, n, per_second):
    """(n,) wandering curve of about unit variance, with `per_second` independent values a second."""
    knots = rng.standard_normal(int(n / SAMPLE_RATE * per_second) + 2)
    return np.interp(np.arange(n) * (per_second / SAMPLE_RATE), np.arange(len(knots)), knots)


def _harmonics(freq, amps):
    """(n,) sines at 1..K times freq (n,), of amplitudes amps (K,), without those that would alias."""
    audible = np.arange(1, len(amps) + 1) * freq.max() < 0.48 * SAMPLE_RATE
    period = np.fft.irfft(np.r_[0, -2048j * amps * audible], 4096)  # a table: the cost does not grow with K
    return np.interp(np.cumsum(freq) / SAMPLE_RATE % 1.0 * 4096, np.arange(4097), np.r_[period, period[0]])


def _noise(rng, low, high, slope):
    """(SAMPLES,) Gaussian noise of unit RMS between low and high, falling by 3 * slope dB per octave."""
    freq = np.maximum(np.fft.rfftfreq(SAMPLES, 1 / SAMPLE_RATE), 1.0)
    gain = freq ** (-slope / 2) / (1 + (low / freq) ** 2) / (1 + (freq / high) ** 2)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(SAMPLES)) * gain, SAMPLES)
    return noise / np.sqrt(np.mean(noise**2))


def _ring(freq, decay, n):
    """(n,) damped sine: a click, a drop, a struck partial."""
    t = np.arange(n) / SAMPLE_RATE
    return np.exp(-t / decay) * np.sin(2 * np.pi * freq * t)


def _fade(x, attack, release):
    """x (n,) with raised-cosine edges."""
    rise, fall = (np.linspace(0, np.pi / 2, min(_length(edge), len(x))) for edge in (attack, release))
    x = x.copy()
    x[:len(rise)] *= np.sin(rise) ** 2
    x[-len(fall):] *= np.cos(fall) ** 2
    return x


def _place(rng, x):
    """x (n,), cut to a clip's length if longer, at a random place of a silent clip (SAMPLES,)."""
    x = x[:SAMPLES]
    start = int(rng.random() * (SAMPLES - len(x) + 1))
    return np.pad(x, (start, SAMPLES - len(x) - start))


def _sequence(rng, events, gap):
    """Events one after the other with about `gap` of silence between, at a random place of a clip."""
    parts = [np.pad(event, (0, _length(gap * rng.uniform(0.7, 1.4)))) * rng.uniform(0.6, 1.0) for event in events]
    return _place(rng, np.concatenate(parts))


# The sound families: each takes a generator and returns one clean clip, (SAMPLES,) float64 at any level.

def _chirp(rng, rising):
    """Short tonal sweeps with silence between."""
    low, ratio, seconds = _log_uniform(rng, 450, 2400), rng.uniform(1.2, 2.6), _log_uniform(rng, 0.12, 0.9)
    amps = rng.random(4) * [0, 0.6, 0.4, 0.2] + [1, 0, 0, 0]
    events = []
    for _ in range(rng.integers(3, 7)):
        sweep = np.linspace(0, 1, _length(seconds * rng.uniform(0.85, 1.2))) ** _log_uniform(rng, 0.6, 1.7)
        freq = low * rng.uniform(0.95, 1.05) * ratio ** (sweep if rising else sweep[::-1])
        events.append(_fade(_harmonics(freq, amps), 0.02, rng.uniform(0.02, 0.08)))
    return _sequence(rng, events, _log_uniform(rng, 0.05, 0.6))


def _siren(rng):
    """One unbroken tone whose pitch swings, from an even wail to a yelp that rises or falls at once."""
    n = _length(rng.uniform(2.8, 4.0))
    u = (np.arange(n) / SAMPLE_RATE / _log_uniform(rng, 0.4, 2.0) + rng.random()) % 1.0
    peak = rng.uniform(0.1, 0.9)  # where in a turn the pitch is highest
    swing = np.where(u < peak, u / peak, (1 - u) / (1 - peak))
    freq = _log_uniform(rng, 400, 1500) * rng.uniform(1.2, 2.6) ** (swing ** rng.uniform(0.6, 1.5))
    return _place(rng, _fade(_harmonics(freq, rng.random(6) / np.arange(1, 7)), 0.08, 0.15))


def _trill(rng):
    """Fast repetition of a short tonal note, in one or two bouts."""
    rate, pitch, duty = _log_uniform(rng, 7, 22), _log_uniform(rng, 1300, 5000), rng.uniform(0.3, 0.8)
    bend, glide, second = rng.uniform(-0.15, 0.15), rng.uniform(-0.2, 0.2), rng.uniform(0, 0.3)
    bouts = []
    for _ in range(rng.integers(1, 3)):
        n = _length(_log_uniform(rng, 1.0, 2.6))
        notes = np.cumsum(rate * (1 + 0.05 * _drift(rng, n, 4))) / SAMPLE_RATE
        u = np.minimum(notes % 1.0 / duty, 1.0)  # 0 to 1 within a note, then 1 until the next
        freq = pitch * (1 + bend * u + glide * np.linspace(-0.5, 0.5, n))
        bouts.append(_fade(_harmonics(freq, np.array([1, second])) * np.sin(np.pi * u) ** 2, 0.1, 0.1))
    return _sequence(rng, bouts, rng.uniform(0.2, 0.6))


def _clicks(rng):
    """Train of short pulses, from dry ticks to ringing knocks, more or less regular."""
    rate, jitter = _log_uniform(rng, 3, 12), rng.uniform(0.0, 0.25)
    pitch, decay = _log_uniform(rng, 900, 5000), _log_uniform(rng, 0.001, 0.008)
    n = _length(decay * 8)
    click = _ring(pitch, decay, n) + rng.uniform(0, 0.5) * _ring(pitch * rng.uniform(1.3, 2.2), decay / 2, n)
    train, at = np.zeros(_length(rng.uniform(2.0, 4.0))), 0.0
    while at < len(train) - n:
        train[int(at):int(at) + n] += click * rng.uniform(0.5, 1.0)
        at += SAMPLE_RATE / rate * (1 + jitter * rng.uniform(-1, 1))
    return _place(rng, train)


def _harmonic_call(rng):
    """Voice-like calls: a stack of harmonics under two resonances, with a bent pitch and vibrato."""
    pitch, seconds, k = _log_uniform(rng, 150, 600), _log_uniform(rng, 0.25, 1.0), np.arange(1, 31)
    amps = 0.05 / k
    for centre in (_log_uniform(rng, 450, 900), _log_uniform(rng, 1300, 2600)):
        amps = amps + np.exp(-0.5 * ((k * pitch - centre) / (0.3 * centre + 60)) ** 2) / np.sqrt(k)
    arch, slide, vibrato = rng.uniform(-0.2, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0, 0.04)
    turns, events = seconds * rng.uniform(4, 9), []  # turns of the vibrato in one call
    for _ in range(rng.integers(2, 5)):
        u = np.linspace(0, 1, _length(seconds * rng.uniform(0.7, 1.3)))
        bent = 1 + arch * np.sin(np.pi * u) + slide * u + vibrato * np.sin(2 * np.pi * turns * u)
        call = _harmonics(pitch * rng.uniform(0.93, 1.07) * bent, amps)
        events.append(_fade(call * (1 + 0.2 * _drift(rng, len(u), 10)), 0.04, 0.1))
    return _sequence(rng, events, _log_uniform(rng, 0.1, 0.6))


def _engine(rng):
    """Low, rough harmonic hum with a wandering speed, over the hiss of the exhaust."""
    n = _length(rng.uniform(2.2, 4.0))
    speed = 1 + rng.uniform(0.01, 0.12) * _drift(rng, n, 2) + rng.uniform(-0.3, 0.3) * np.linspace(0, 1, n)
    freq = _log_uniform(rng, 24, 80) * np.maximum(speed, 0.4)
    hum = _harmonics(freq, rng.random(40) / np.arange(1, 41) ** rng.uniform(0.3, 1.0))
    hum *= 1 + rng.uniform(0.1, 0.5) * _harmonics(freq / rng.integers(2, 5), np.ones(1))  # uneven firing
    hiss = _noise(rng, 60, _log_uniform(rng, 400, 3000), 0.5)[:n] * (1 + 0.3 * _drift(rng, n, 20))
    mix = hum / np.sqrt(np.mean(hum**2)) + _log_uniform(rng, 0.1, 0.3) * hiss
    return _place(rng, _fade(mix, rng.uniform(0.1, 0.8), rng.uniform(0.1, 0.8)))


def _bell(rng):
    """Struck inharmonic partials, the higher ones dying sooner; two to five strokes."""
    pitch, decay, apart = _log_uniform(rng, 350, 2200), _log_uniform(rng, 0.35, 1.4), _log_uniform(rng, 0.3, 1.2)
    ratios = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.66, 3.01, 4.17]) * (1 + 0.02 * rng.standard_normal(8))
    amps = rng.uniform(0.2, 1.0, 8) / np.sqrt(np.arange(1, 9))
    stroke = sum(a * _ring(r * pitch, decay / r**0.7, _length(decay * 5)) for a, r in zip(amps, ratios))
    clip, at = np.zeros(SAMPLES), rng.uniform(0, 2.0)
    for _ in range(rng.integers(2, 6)):
        rest = clip[int(at * SAMPLE_RATE):]  # empty once past the end
        rest[:len(stroke)] += stroke[:len(rest)] * rng.uniform(0.5, 1.0)
        at += apart * rng.uniform(0.9, 1.1)
    return clip


def _rain(rng):
    """A steady bright hiss dotted with single drops; gusts move it a little."""
    hiss = _noise(rng, _log_uniform(rng, 200, 1500), _log_uniform(rng, 4000, 11000), rng.uniform(0, 1.2))
    hiss *= 1 + rng.uniform(0.0, 0.45) * np.clip(_drift(rng, SAMPLES, 1.0), -2, 2)
    drops = np.zeros(SAMPLES)
    for _ in range(int(SECONDS * _log_uniform(rng, 8, 80))):
        start = int(rng.random() * (SAMPLES - 500))
        drop = _ring(_log_uniform(rng, 1000, 7000), _log_uniform(rng, 0.001, 0.005), 500)
        drops[start:start + 500] += drop * rng.uniform(0.2, 1.0)
    return hiss + _log_uniform(rng, 1.5, 8) * drops


def _surf(rng):
    """Waves: hiss that swells, brightens as it breaks, and draws back."""
    turns = np.arange(SAMPLES) / SAMPLE_RATE / rng.uniform(1.8, 6.0) + 0.05 * _drift(rng, SAMPLES, 1)
    swell = (0.5 + 0.5 * np.sin(2 * np.pi * (turns + rng.random()))) ** rng.uniform(1.0, 2.5)
    deep = _noise(rng, 80, _log_uniform(rng, 500, 1800), 0.8)
    spray = _noise(rng, 500, _log_uniform(rng, 3000, 9000), 0.5)
    floor, bright = _log_uniform(rng, 0.05, 0.3), rng.uniform(0.5, 1.2)
    return deep * (floor + swell) + bright * spray * (floor / 2 + swell**2)


FAMILIES = {"bell": _bell, "chirp_down": lambda rng: _chirp(rng, rising=False), "clicks": _clicks, "rain": _rain,
            "siren": _siren, "chirp_up": lambda rng: _chirp(rng, rising=True), "engine": _engine, "surf": _surf,
            "harmonic_call": _harmonic_call, "trill": _trill}


# From a clean sound to a recording of it.

def _unit_level(x):
    """x scaled so that its loudest 0.2 s has RMS 1: an SNR then means the same for short and long sounds."""
    return x / np.sqrt(np.mean(x.reshape(20, -1) ** 2, axis=1).max())


def _reverberate(rng, x):
    """x (SAMPLES,) in a room: itself plus the tail of a decaying noise, at most a second long."""
    n = SAMPLES + SAMPLE_RATE  # room for the tail, so that it does not wrap round
    decay = 10 ** (-3 * np.arange(SAMPLE_RATE) / SAMPLE_RATE / _log_uniform(rng, 0.15, 1.2))
    tail = np.fft.rfft(rng.standard_normal(SAMPLE_RATE) * decay, n)
    wet = np.fft.irfft(np.fft.rfft(x, n) * tail, n)[:SAMPLES]
    return _unit_level(x + _log_uniform(rng, 0.1, 0.8) * _unit_level(wet))


def _background(rng):
    """(SAMPLES,) noise of about unit RMS, white to brown, sometimes gusty, sometimes with a mains hum."""
    gusts, hum = 0.3 * (rng.random() < 0.3), 0.5 * (rng.random() < 0.2)
    noise = _noise(rng, 30, SAMPLE_RATE, rng.uniform(0.0, 2.0))
    noise *= 1 + gusts * np.clip(_drift(rng, SAMPLES, 1.5), -2, 2)
    return noise + hum * _harmonics(np.full(SAMPLES, 50.0), 1 / np.arange(1, 9))


def _distractor(rng, name):
    """(SAMPLES,) the loudest fraction of a second of another class, somewhere in the clip."""
    others = [other for other in CLASSES if other != name]
    sound, n = FAMILIES[others[rng.integers(len(others))]](rng), _length(rng.uniform(0.15, 0.5))
    start = min(max(int(np.abs(sound).argmax()) - n // 2, 0), SAMPLES - n)
    return _unit_level(_place(rng, _fade(sound[start:start + n], 0.03, 0.03)))


def synthesise(name: str, index: int, seed: int = 0) -> np.ndarray:
    """One clip of class `name`: (88200,) float32 in [-1, 1], exact multiples of 1/32768 as a 16-bit WAV holds.

    `index` counts from 1, as the file names do. Depends on (name, index, seed) only, not on earlier calls.
    """
    rng = np.random.default_rng([seed, CLASSES.index(name), index])
    clip = _unit_level(FAMILIES[name](rng))
    if rng.random() < 0.4:
        clip = _reverberate(rng, clip)
    worst = 6 if name in ("rain", "surf") else 3  # dB; a hiss drowns in noise long before a tone does
    snr = rng.uniform(worst, worst + 9) if rng.random() < 0.08 else rng.uniform(18, 35)
    clip = clip + 10 ** (-snr / 20) * _background(rng)
    if rng.random() < 0.08:
        clip = clip + 10 ** (rng.uniform(-18, -9) / 20) * _distractor(rng, name)
    clip *= 10 ** (rng.uniform(-24, -0.5) / 20) / np.abs(clip).max()
    return (np.rint(clip * 32767) / 32768).astype(np.float32)


def write_wav(path, clip):
    """Write (samples,) float32 multiples of 1/32768, as `synthesise` gives them, as a 16-bit WAV, bit for bit."""
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE, len(clip), "NONE", "not compressed"))
        out.writeframes(np.rint(clip * 32768).astype("<i2").tobytes())


def _is_complete(root, files, marker):
    try:
        sizes = {os.path.getsize(root / file) for file in files}
        return sizes == {44 + 2 * SAMPLES} and (root / ".complete").read_bytes() == marker
    except OSError:
        return False


def write_demo(root: Path, seed: int = 0) -> Path:
    """Writes the set below `root` (72 MB, some seconds) unless a complete copy is there; returns `root`.

    It is made in a temporary folder beside `root` and moved into place: nobody sees a half-written file, and two
    processes may call this at once. An old or partial copy is renewed file by file; nothing is ever removed, and
    FileExistsError is raised where `root` holds other data.
    """
    root, marker = Path(root), f"warble demo {VERSION}, seed {seed}\n".encode()
    files = {f"{name}/{name}_{i:04d}.wav": (name, i) for name in CLASSES for i in range(1, COUNTS[name] + 1)}
    if _is_complete(root, files, marker):
        return root
    found = [root] if root.is_file() else sorted([*root.glob("[!.]*.*"), *root.glob("[!.]*/[!.]*")])
    for path in found:
        if path.relative_to(root).as_posix() not in files and path != root / "README.txt":
            raise FileExistsError(f"{path} is not demo data: remove it, or give the demo another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        fresh = Path(temporary) / "fresh"  # a folder of its own: the temporary one is closed to other users
        for file, clip in files.items():
            (fresh / file).parent.mkdir(parents=True, exist_ok=True)
            write_wav(fresh / file, synthesise(*clip, seed))
        (fresh / "README.txt").write_text(README, "utf-8")
        (fresh / ".complete").write_bytes(marker)
        try:
            os.rename(fresh, root)  # works where root is absent or empty
        except OSError:
            if not _is_complete(root, files, marker):  # else another process was first
                for file in [*files, "README.txt", ".complete"]:  # the marker last
                    (root / file).parent.mkdir(exist_ok=True)
                    os.replace(fresh / file, root / file)
    return root
