import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: the cores are shared with the other workers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "faults")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests fetch from servers of their own only

# The tests that `python -m pytest -m quick` runs: less than a minute, no whole training run.
QUICK = {
    "test_annotation_tables", "test_annotations", "test_architecture", "test_ast", "test_audio",
    "test_augment", "test_calibration", "test_checkpoint", "test_columns", "test_csv_table",
    "test_events", "test_flags", "test_folder_layout", "test_folders", "test_folds",
    "test_frontend", "test_grouping", "test_locate", "test_losses", "test_manifest",
    "test_metrics", "test_metrics_multi_label", "test_names", "test_negatives",
    "test_old_split", "test_overview", "test_progress", "test_recorder_names", "test_relevance",
    "test_sampling", "test_scan", "test_scan_index", "test_sched", "test_split_csv",
    "test_splits", "test_step", "test_stream", "test_tables", "test_util", "test_xenocanto",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in QUICK:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="session")
def esc10():
    """Folder of real recordings like ESC-50, from WARBLE_ESC10 or beside the repository."""
    folder = Path(os.environ.get("WARBLE_ESC10", ROOT.parent / "shared" / "esc10"))
    if not (folder / "meta" / "esc50.csv").is_file():
        pytest.skip(f"no recordings in {folder}; set WARBLE_ESC10 to a folder laid out like ESC-50")
    return folder


@pytest.fixture(scope="session")
def real_clips(esc10):
    """Paths of ten real recordings of several classes."""
    return sorted((esc10 / "audio").iterdir())[::40]


def tone(seconds, rate=16000, hz=440.0, noise=0.05, seed=0):
    """(samples,) float32: a tone in noise."""
    t = np.arange(int(seconds * rate)) / rate
    rng = np.random.default_rng([seed, int(hz)])
    wave = 0.3 * np.sin(2 * np.pi * hz * t) + noise * rng.standard_normal(len(t))
    return wave.astype(np.float32)


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """Recordings that a tiny model learns in seconds: 3 class folders of 16 tones, 1 s each."""
    folder = tmp_path_factory.mktemp("tones")
    for c, (name, hz) in enumerate({"low": 300, "mid": 1200, "high": 4000}.items()):
        (folder / name).mkdir()
        for i in range(16):
            wave = tone(1.0, hz=hz * (1 + 0.01 * i), seed=100 * c + i)
            sf.write(folder / name / f"{name}{i}.wav", wave, 16000)
    return folder


@pytest.fixture(scope="session")
def finished_run(tones, tmp_path_factory):
    """The folder of a finished tiny run of two epochs without EMA; tests work on copies."""
    from harness import program
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        assert program(patch, folder, "--ema", 0, data=tones) == 0
    return folder / "run"


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of the finished run in tmp_path/run."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A made run of hostile class names with its report.html; tests leave its files alone."""
    from made_run import HOSTILE, MadeRun
    run = MadeRun(tmp_path_factory.mktemp("small") / "run", HOSTILE)
    run.write()
    return run


@pytest.fixture
def source(made):
    """The text of the report.html of `made`."""
    return (made.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def server(monkeypatch):
    """A loopback server of data sets."""
    from dataset_server import running_server
    with running_server(monkeypatch) as server:
        yield server


@pytest.fixture
def put(server, monkeypatch):
    """Publish a data set on `server`: put(name, files)."""
    from dataset_server import publish
    return partial(publish, server, monkeypatch)


@pytest.fixture
def ways_in(tmp_path, tones, monkeypatch, capsys, recwarn):
    """Give checkpoint files to the programs; see faults/ways_in.py."""
    from ways_in import WaysIn
    return WaysIn(tmp_path, tones, monkeypatch, capsys, recwarn)


@pytest.fixture
def restored_signals():
    """Put the handlers back that a StopRequest replaces."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
