"""Target-free soundscape for the demo data: recordings that hold none of the demo's classes.

`synthesise_soundscape(index)` returns one recording of 150 s; the 24 recordings are an hour. Each
is a site of its own: which sounds there are, how loud they are and how they sound is drawn for
each. Steady sounds are layers, which swell and fade: wind, leaves, traffic far away, mains hum,
crickets, cicadas, babble of voices, an aeroplane. Short ones are events: footsteps, thumps,
handling of the recorder, creaks, an animal in dry leaves. All is NumPy in float64 until the last
rounding, so a recording is the same on every machine.
"""
import numpy as np

from .synthesis import (
    SAMPLE_RATE,
    as_16_bit,
    drift,
    fade,
    harmonics,
    log_uniform,
    one_period,
    ring,
)

RECORDINGS = 24
SECONDS = 150
SAMPLES = SECONDS * SAMPLE_RATE
STREAM = 1000  # of random numbers; the classes of the demo have 0 to 9

# Levels change slowly. They are curves of 50 points per second, linear in between.
POINT = 441  # samples from one point to the next
POINTS_PER_SECOND = SAMPLE_RATE // POINT
POINTS = SECONDS * POINTS_PER_SECOND + 1
BLOCK, OVERLAP = 2**17, 2**12  # samples of noise made at once, and of the crossfade between them


# Building blocks. A curve is (POINTS,), a layer is (SAMPLES,).

def _curve(rng, per_second):
    """Random curve of about unit variance, with `per_second` independent values a second."""
    return drift(rng, POINTS, per_second, POINTS_PER_SECOND)


def _seconds():
    return np.arange(POINTS) / POINTS_PER_SECOND


def _gain(decibels):
    return 10 ** (decibels / 20)


def _with_level(layer, curve):
    """The layer times the curve."""
    ramp = np.arange(POINT) / POINT
    level = curve[:-1, None] + np.diff(curve)[:, None] * ramp
    return layer * level.ravel()


def _bump(centre, width):
    """Curve of something that passes by: 1 at `centre`, half of it `width` earlier and later."""
    return 1 / (1 + ((_seconds() - centre) / width) ** 2)


def _stretches(rng, shortest, longest):
    """Curve that is 1 in some stretches and 0 in others, with soft edges; never 0 throughout."""
    curve, is_on, start = np.zeros(POINTS), rng.random() < 0.5, 0.0
    while start < SECONDS:
        stop = start + log_uniform(rng, shortest, longest)
        curve[int(start * POINTS_PER_SECOND):int(stop * POINTS_PER_SECOND)] = is_on
        start, is_on = stop, not is_on
    if not curve.any():
        curve[:] = 1
    edge = np.hanning(2 * POINTS_PER_SECOND + 1)
    return np.convolve(curve, edge / edge.sum(), "same")


def _unit(x):
    """x at RMS 1."""
    return x / np.sqrt(np.mean(x**2) + 1e-20)


def _noise(rng, low, high, slope, n=SAMPLES):
    """Gaussian noise (n,) of RMS 1 from low to high, falling by 3 * slope dB per octave."""
    freq = np.maximum(np.fft.rfftfreq(BLOCK, 1 / SAMPLE_RATE), 1.0)
    gain = freq ** (-slope / 2) / (1 + (low / freq) ** 2) / (1 + (freq / high) ** 2)
    bins = np.flatnonzero(gain > 1e-4 * gain.max())
    gain = gain[bins] / np.sqrt(np.sum(gain[bins] ** 2))
    hop = BLOCK - OVERLAP
    noise = np.zeros(-(-n // hop) * hop + OVERLAP)
    rise = np.sin(np.linspace(0, np.pi / 2, OVERLAP))  # equal power: the level stays the same
    spectrum = np.zeros(BLOCK // 2 + 1, complex)
    for start in range(0, n, hop):
        parts = rng.standard_normal((2, len(bins)))
        spectrum[bins] = gain * (parts[0] + 1j * parts[1])
        block = np.fft.irfft(spectrum, BLOCK) * (BLOCK / 2)
        block[:OVERLAP] *= rise
        block[-OVERLAP:] *= rise[::-1]
        noise[start:start + BLOCK] += block
    return noise[:n]


def _repeat_second(second):
    """A layer that repeats one second (SAMPLE_RATE,): only for whole frequencies in Hz."""
    return np.tile(second, SECONDS)


def _sine(freq, phase=0.0):
    """One second of a sine of a whole frequency."""
    return np.sin(2 * np.pi * (freq * np.arange(SAMPLE_RATE) / SAMPLE_RATE + phase))


# The layers. Each takes a generator and returns (SAMPLES,) at any level.
# The order of the random draws matters: changing it changes the sounds.

def _wind(rng):
    """Low rumble with gusts, in which more of the higher noise is heard."""
    gusts = _curve(rng, log_uniform(rng, 0.12, 0.5)) + 0.4 * _curve(rng, 2.5)
    gusts = np.exp(rng.uniform(0.25, 0.8) * np.clip(gusts, -2.5, 2.5))
    rumble = _noise(rng, 15, log_uniform(rng, 70, 260), rng.uniform(1.0, 2.0))
    rush = _noise(rng, 150, log_uniform(rng, 500, 1600), rng.uniform(0.8, 1.6))
    rush = _with_level(rush, log_uniform(rng, 0.05, 0.5) * gusts)
    return _with_level(rumble + rush, gusts)


def _leaves(rng):
    """Rustle of leaves: a flickering hiss that comes with the gusts."""
    gusts = np.exp(rng.uniform(0.5, 1.0) * np.clip(_curve(rng, log_uniform(rng, 0.1, 0.4)), -2, 2))
    flicker = np.exp(0.6 * np.clip(_curve(rng, rng.uniform(12, 25)), -2, 2))
    hiss = _noise(rng, log_uniform(rng, 900, 2500), log_uniform(rng, 4000, 8000), 0.6)
    return _with_level(hiss, gusts * flicker)


def _traffic(rng):
    """A road far away: a steady hum, over which single vehicles pass slowly."""
    hum = _noise(rng, 35, log_uniform(rng, 120, 400), rng.uniform(0.8, 1.6))
    hum = _with_level(hum, 1 + 0.2 * np.clip(_curve(rng, 0.3), -2, 2))
    passing = np.zeros(POINTS)
    for _ in range(rng.integers(2, 14)):
        bump = _bump(rng.uniform(0, SECONDS), log_uniform(rng, 1.5, 6))
        passing += rng.uniform(0.2, 1.0) * bump
    tyres = _noise(rng, 200, log_uniform(rng, 600, 1600), rng.uniform(0.5, 1.2))
    return hum + _with_level(tyres, log_uniform(rng, 0.2, 1.0) * passing)


def _mains_hum(rng):
    """Hum of a transformer: harmonics of 50 or 60 Hz that never change, with a slight buzz."""
    mains = 50 if rng.random() < 0.6 else 60
    second = np.zeros(SAMPLE_RATE)
    for k in range(1, 25):
        evenness = 1.0 if k % 2 == 0 else rng.uniform(0.05, 0.6)
        second += evenness * rng.random() / k**0.9 * _sine(k * mains, rng.random())
    return _repeat_second(second)


def _crickets(rng):
    """One to four crickets: high tones in fast pulses, for a long time each."""
    layer = np.zeros(SAMPLES)
    for _ in range(rng.integers(1, 5)):
        tone = _sine(int(log_uniform(rng, 4200, 8500)))
        pulses = np.maximum(0, _sine(int(log_uniform(rng, 28, 75)), rng.random()) + 0.2)
        level = _stretches(rng, 8, 60) * np.exp(0.15 * _curve(rng, 1))
        if rng.random() < 0.4:  # pulses come in groups
            rate, share = log_uniform(rng, 0.7, 2.2), rng.uniform(0.4, 0.7)
            level *= (_seconds() * rate + rng.random()) % 1.0 < share
        layer += _with_level(_repeat_second(tone * pulses), log_uniform(rng, 0.2, 1.0) * level)
    return layer


def _cicadas(rng):
    """A buzzing band of noise that swells and fades over many seconds."""
    carrier = _sine(int(log_uniform(rng, 3800, 7500)))
    buzz = 1 + rng.uniform(0.3, 0.9) * _sine(int(log_uniform(rng, 60, 190)))
    band = _noise(rng, 1, log_uniform(rng, 300, 1100), 0.0) * _repeat_second(carrier * buzz)
    swell = np.exp(rng.uniform(0.2, 0.8) * np.clip(_curve(rng, log_uniform(rng, 0.04, 0.2)), -2, 2))
    return _with_level(band, swell * _stretches(rng, 15, 90))


def _babble(rng):
    """Many voices far away: syllables of changing vowels, no word of which can be made out."""
    layer = np.zeros(SAMPLES)
    k = np.arange(1, 31)
    for _ in range(rng.integers(4, 7)):
        pitch = log_uniform(rng, 85, 240)
        melody = 1 + 0.08 * _curve(rng, 3) + 0.05 * _curve(rng, 0.5)
        freq = pitch * _with_level(np.ones(SAMPLES), np.maximum(melody, 0.6))
        phase = (np.cumsum(freq) * (4096 / SAMPLE_RATE)).astype(np.int64) % 4096
        rate = rng.uniform(3, 6)  # syllables per second
        speaks = _stretches(rng, 1.2, 6)
        for _ in range(2):  # vowels, which take turns
            amps = 0.02 / k
            for formant in (log_uniform(rng, 300, 800), log_uniform(rng, 900, 2300)):
                amps = amps + np.exp(-0.5 * ((k * pitch - formant) / (0.2 * formant))**2) / k**0.7
            syllables = np.maximum(0, _curve(rng, rate)) * speaks
            voice = one_period(amps)[phase]
            layer += _with_level(voice, syllables * rng.uniform(0.4, 1.0))
    consonants = _noise(rng, 1500, 3500, 0.5)
    layer = _unit(layer) + 0.1 * _with_level(consonants, np.maximum(0, _curve(rng, 8)))
    return _with_level(layer, 0.3 + _stretches(rng, 20, 70))


def _aeroplane(rng):
    """A jet far above: a broad low noise that comes, turns darker and goes within a minute."""
    centre, width = rng.uniform(20, SECONDS - 20), log_uniform(rng, 8, 22)
    near = _noise(rng, 150, log_uniform(rng, 600, 1500), 0.8)
    far = _noise(rng, 40, log_uniform(rng, 120, 300), 0.8)
    wobble = np.exp(0.2 * _curve(rng, 1.5))
    approach = _bump(centre, width) ** 1.5 * wobble
    return _with_level(near, 0.6 * approach) + _with_level(far, _bump(centre + width / 2, width))


LAYERS = {  # name: (function, share of the recordings that have it, lowest level in dB, highest)
    "wind": (_wind, 0.75, -14, 4),
    "leaves": (_leaves, 0.4, -24, -2),
    "traffic": (_traffic, 0.5, -16, 2),
    "mains hum": (_mains_hum, 0.25, -22, -2),
    "crickets": (_crickets, 0.4, -26, 0),
    "cicadas": (_cicadas, 0.25, -24, 0),
    "babble": (_babble, 0.35, -20, 2),
    "aeroplane": (_aeroplane, 0.35, -10, 8),
}


# The events. Each takes a generator and returns (n,) at any level.

def _footsteps(rng):
    """Steps on gravel or a floor, one or two per second."""
    step = int(SAMPLE_RATE / rng.uniform(1.3, 2.1))
    crunch, low = log_uniform(rng, 0.05, 1.5), log_uniform(rng, 500, 2000)
    walk = np.zeros(step * rng.integers(4, 16) + SAMPLE_RATE)
    for start in range(0, len(walk) - SAMPLE_RATE, step):
        n = int(SAMPLE_RATE * rng.uniform(0.12, 0.3))
        sound = ring(rng.uniform(50, 130), 0.035, n) * 2
        grains = _noise(rng, low, 5000, 0.5, n) * np.maximum(0, drift(rng, n, 60))
        sound += crunch * fade(grains, 0.03, 0.1)
        start += int(rng.uniform(0, 0.06) * SAMPLE_RATE)
        walk[start:start + n] += rng.uniform(0.5, 1.0) * sound
    distance = np.sin(np.linspace(0.3, np.pi - 0.3, len(walk)))  # comes and goes
    return walk * distance


def _thump(rng):
    """A door, a branch, something that falls: one to three dull blows."""
    n = int(0.6 * SAMPLE_RATE)
    blow = ring(log_uniform(rng, 40, 160), log_uniform(rng, 0.04, 0.15), n)
    blow += 0.3 * _noise(rng, 60, 500, 1.0, n) * np.exp(-np.arange(n) / (0.05 * SAMPLE_RATE))
    gap = int(rng.uniform(0.3, 1.2) * SAMPLE_RATE)
    sound = np.zeros(3 * gap + n)
    for i in range(rng.integers(1, 4)):
        sound[i * gap:i * gap + n] += rng.uniform(0.4, 1.0) * fade(blow, 0.004, 0.1)
    return sound


def _handling(rng):
    """Somebody touches the recorder: bumps and scrapes, loud and low."""
    n = int(log_uniform(rng, 0.8, 5) * SAMPLE_RATE)
    bumps = _noise(rng, 25, log_uniform(rng, 80, 300), 1.0, n) * np.exp(1.2 * drift(rng, n, 7))
    scrapes = _noise(rng, 400, 6000, 0.8, n) * np.maximum(0, drift(rng, n, 10) - 0.5)
    return fade(bumps + log_uniform(rng, 0.1, 1.0) * scrapes, 0.1, 0.2)


def _creak(rng):
    """Wood that rubs on wood: knocks so fast that they become a rough, uneven tone."""
    n = int(log_uniform(rng, 0.4, 2.0) * SAMPLE_RATE)
    rate = log_uniform(rng, 25, 70) * np.exp(0.3 * drift(rng, n, 4))
    amps = np.ones(60) / np.arange(1, 61) ** 0.3
    k = np.arange(1, 61) * rate.mean()
    body = sum(np.exp(-0.5 * ((k - f) / (0.15 * f)) ** 2)
               for f in (log_uniform(rng, 250, 700), log_uniform(rng, 800, 1800)))
    tone = harmonics(rate * (1 + 0.08 * drift(rng, n, 60)), amps * (0.05 + body))
    return fade(tone * np.exp(0.5 * drift(rng, n, 12)), 0.08, 0.15)


def _dry_leaves(rng):
    """An animal in dry leaves: crackling in short rushes."""
    n = int(log_uniform(rng, 1.0, 6) * SAMPLE_RATE)
    crackle = _noise(rng, 1500, 7000, 0.3, n) * np.maximum(0, drift(rng, n, 90)) ** 3
    return fade(crackle * (0.1 + np.maximum(0, drift(rng, n, 2.5))), 0.05, 0.1)


EVENTS = (_footsteps, _thump, _handling, _creak, _dry_leaves)


def _add_events(rng, mix):
    """Add events to mix (SAMPLES,) of RMS 1, in place: two or three kinds, soft and loud."""
    kinds = rng.permutation(len(EVENTS))[:rng.integers(1, 4)]
    for _ in range(rng.integers(2, 13)):
        event = EVENTS[kinds[rng.integers(len(kinds))]](rng)
        event = event * _gain(rng.uniform(-6, 20)) / np.abs(event).max() * 3
        start = int(rng.random() * (SAMPLES - len(event)))
        mix[start:start + len(event)] += event


def synthesise_soundscape(index: int, seed: int = 0) -> np.ndarray:
    """Synthesise one recording of a site: (3307500,) float32 in [-1, 1], multiples of 1/32768.

    index: counts from 1, as in the file names. The recording depends on (index, seed) only.
    """
    rng = np.random.default_rng([seed, STREAM, index])
    chosen = [name for name, (_, share, _, _) in LAYERS.items() if rng.random() < share]
    if not chosen:
        chosen = ["wind"]
    mix = _gain(rng.uniform(-30, -12)) * _noise(rng, 30, SAMPLE_RATE, rng.uniform(0.0, 1.5))
    for name in chosen:
        layer, _, lowest, highest = LAYERS[name]
        mix += _gain(rng.uniform(lowest, highest)) * _unit(layer(rng))
    mix = _unit(mix)
    # Some sites are steady, in others all comes and goes.
    swing = rng.uniform(0, 6) * np.clip(_curve(rng, log_uniform(rng, 0.03, 0.15)), -2, 1)
    mix = _with_level(mix, _gain(swing))
    _add_events(rng, mix)
    mix *= _gain(rng.uniform(-20, -1)) / np.abs(mix).max()
    return as_16_bit(mix)
