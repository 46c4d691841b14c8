"""A run that version 1 saved within an epoch is finished as version 1 finished it.

tests/fixtures/checkpoint_v1.json has the command that made checkpoint_v1.pt, and the results of
the program that wrote it when it continued.
"""
import csv
import hashlib
import json
import platform
from pathlib import Path

import pytest
import soundfile as sf
import torch
from conftest import tone
from harness import TIMED_COLUMNS, program

from core.run.checkpoint import load_checkpoint

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CLASSES = {"low": (300, 16), "high": (4000, 8)}  # Hz of the first tone, number of clips


def write_recordings(folder):
    """The recordings of the stored run: tones, and one file that is no audio."""
    for c, (name, (hz, n_clips)) in enumerate(CLASSES.items()):
        (folder / name).mkdir(parents=True)
        for i in range(n_clips):
            wave = tone(1.0, hz=hz * (1 + 0.01 * i), seed=100 * c + i)
            sf.write(folder / name / f"{i}.wav", wave, 16000)
    (folder / "low" / "broken.wav").write_text("no audio")


def machine():
    """What decides the last bits of a float32 sum."""
    cpu = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith(("model", "cpu family"))]
    return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(),
            "cpu": " ".join(cpu[:3]) or platform.machine()}


def state_sha256(checkpoint):
    """SHA-256 of the weights, their averages and the optimizer's moments."""
    digest = hashlib.sha256()
    moments = checkpoint["optimizer"]["state"]
    for tensors in (checkpoint["model"], checkpoint["ema"], *(moments[i] for i in sorted(moments))):
        for name in sorted(tensors):
            digest.update(tensors[name].float().numpy().tobytes())
    return digest.hexdigest()


def table(path):
    """The rows of a CSV of numbers, without the columns that a clock or the machine decides."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if name not in TIMED_COLUMNS}
                for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def expected():
    return json.loads((FIXTURES / "checkpoint_v1.json").read_text(encoding="utf-8"))


@pytest.fixture
def one_thread():
    """As when the fixture was made: the number of threads decides the order of sums."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def continue_run(folder, monkeypatch, change=None):
    """Finish the stored run in `folder`; `change(checkpoint)` alters it first -> its run folder."""
    write_recordings(folder / "data")
    checkpoint = torch.load(FIXTURES / "checkpoint_v1.pt", weights_only=True)
    checkpoint["manifest"]["root"] = str(folder / "data")  # it was made in another folder
    if change:
        change(checkpoint)
    (folder / "run").mkdir()
    torch.save(checkpoint, folder / "run" / "last.pt")
    assert program(monkeypatch, folder, "--resume") == 0
    return folder / "run"


def differences(run, expected):
    """What differs between a finished run and the results of version 1."""
    results = expected["continued_by_the_same_program"]
    is_same_machine = machine() == expected["machine"]
    found = {
        "steps": table(run / "steps.csv"),
        "history": table(run / "history.csv"),
        "test_loss": json.loads((run / "test" / "metrics.json").read_text())["loss"],
        "state_sha256": state_sha256(load_checkpoint(run / "last.pt")),
    }
    if is_same_machine:
        return [name for name, value in found.items() if value != results[name]]
    different = []
    for name in ("steps", "history"):
        if [row.keys() for row in found[name]] != [row.keys() for row in results[name]]:
            different.append(f"columns of {name}")
        for row, expected_row in zip(found[name], results[name]):
            if row != pytest.approx(expected_row, rel=1e-5):
                different.append(name)
    if found["test_loss"] != pytest.approx(results["test_loss"], rel=1e-5):
        different.append("test_loss")
    return different


def test_fixture_is_a_half_done_epoch_with_averaged_weights(expected):
    checkpoint = torch.load(FIXTURES / "checkpoint_v1.pt", weights_only=True)
    assert checkpoint["version"] == 1
    assert checkpoint["ema"]
    progress = {name: checkpoint["progress"][name] for name in expected["progress"]}
    assert progress == expected["progress"] == {"epoch": 1, "window": 1, "step": 6}


def test_run_of_version_1_continues_to_the_results_of_version_1(tmp_path, monkeypatch, expected,
                                                                one_thread):
    run = continue_run(tmp_path, monkeypatch)
    assert differences(run, expected) == []
    assert load_checkpoint(run / "last.pt")["version"] == 2


@pytest.mark.parametrize("name", ["window", "moments", "averages"])
def test_control_lost_part_of_the_state_changes_the_results(name, tmp_path, monkeypatch, expected,
                                                            one_thread):
    def change(checkpoint):
        if name == "window":
            checkpoint["progress"]["window"] = 0
        elif name == "moments":
            for moments in checkpoint["optimizer"]["state"].values():
                moments["exp_avg"].zero_()
        else:
            checkpoint["ema"] = {key: value.clone() for key, value in checkpoint["model"].items()}
    assert differences(continue_run(tmp_path, monkeypatch, change), expected)
