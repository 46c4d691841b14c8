import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the cores are shared with the other workers
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may fetch anything but from a server of its own


@pytest.fixture(scope="session")
def esc10():
    """Folder of real recordings in the layout of ESC-50, from WARBLE_ESC10 or beside the repository."""
    folder = Path(os.environ.get("WARBLE_ESC10", ROOT.parent / "shared" / "esc10"))
    if not (folder / "meta" / "esc50.csv").is_file():
        pytest.skip(f"no recordings in {folder}; set WARBLE_ESC10 to a folder laid out like ESC-50")
    return folder


@pytest.fixture(scope="session")
def real_clips(esc10):
    """Paths of ten real recordings, one from each class and some more."""
    return sorted((esc10 / "audio").iterdir())[::40]


def tone(seconds, rate=16000, hz=440.0, noise=0.05, seed=0):
    """(samples,) float32: a tone in noise."""
    t = np.arange(int(seconds * rate)) / rate
    rng = np.random.default_rng([seed, int(hz)])
    return (0.3 * np.sin(2 * np.pi * hz * t) + noise * rng.standard_normal(len(t))).astype(np.float32)


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """A data set that a tiny model learns in seconds: 3 classes of 16 tones, 1 s each, in class folders."""
    folder = tmp_path_factory.mktemp("tones")
    for c, (name, hz) in enumerate({"low": 300, "mid": 1200, "high": 4000}.items()):
        (folder / name).mkdir()
        for i in range(16):
            sf.write(folder / name / f"{name}{i}.wav", tone(1.0, hz=hz * (1 + 0.01 * i), seed=100 * c + i), 16000)
    return folder
