"""How much of the recordings' energy lies above what the front end hears."""
import numpy as np

from .audio import AudioError, open_audio
from .manifest import Manifest

FILES = 12  # that are looked at
SECONDS = 1.0  # of each
LARGE = 0.6  # share of the energy; white noise at 44.1 kHz has half of it above 11 kHz


def energy_above(path: str, start: float, hz: float) -> float | None:
    """Share of a recording's energy above `hz`, in a second from `start` on (in seconds).

    None if its sample rate has nothing there, or if it is silent or unreadable.
    """
    try:
        with open_audio(path) as file:
            if file.rate <= 2.1 * hz:
                return None
            if file.seekable and start:
                file.seek(min(int(start * file.rate), max(0, file.frames - 1)))
            block, _ = file.read(min(file.frames, int(SECONDS * file.rate)))
    except AudioError:
        return None
    if len(block) < 64:
        return None
    wave = block[:, 0].astype(np.float64)
    power = np.abs(np.fft.rfft((wave - wave.mean()) * np.hanning(len(wave)))) ** 2
    total = power.sum()
    if not np.isfinite(total) or total <= 0:
        return None
    above = np.fft.rfftfreq(len(wave), 1 / file.rate) > hz
    return float(power[above].sum() / total)


def describe_unheard(manifest: Manifest, hz: float, frontend: str) -> list[str]:
    """A line if much of the energy of the recordings lies above `hz`, the front end's limit."""
    rows = np.unique(np.linspace(0, len(manifest) - 1, min(FILES, len(manifest))).astype(int))
    shares = []
    for row in rows.tolist():
        middle = float(manifest.start[row] + manifest.duration[row] / 2)
        shares.append(energy_above(manifest.file(row), middle, hz))
    n_large = sum(share is not None and share > LARGE for share in shares)
    if n_large <= len(rows) / 5:
        return []
    largest = max(share for share in shares if share is not None)
    return [f"not heard: in {n_large} of {len(rows)} recordings looked at, most of the energy (up "
            f"to {largest:.1%}) lies above {hz:,.0f} Hz, which --frontend {frontend} does not "
            "hear; for bats or insects, slow the recordings down first (a ten times lower sample "
            "rate in the header), or add a front end in model/frontend.py"]
