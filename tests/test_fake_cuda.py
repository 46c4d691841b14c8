"""On a GPU the host never waits within a step: checked on fake CUDA tensors, without a GPU.

`fake_cuda.py` explains how. Its cases run in one process, a minute on two busy cores. Tests on a
real GPU are in test_gpu.py.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Code for LD_PRELOAD. Backward asks torch for its accelerator and then for the streams of a real
# device. Here torch has no accelerator: std::optional<DeviceType> without a value, and false.
SHIM = """
unsigned short _ZN2at11accelerator14getAcceleratorEb(char checked) { return 0; }
char _ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE(char type) { return 0; }
"""
HELPER = Path(__file__).with_name("fake_cuda.py")
TRAINING = [
    "float32", "bf16", "fp16, ema, layer decay", "loaded, noise, patchout, drop-path", "in memory",
    "in memory, noise, bf16", "multi-label, fbank, frozen", "bf16, checkpointing",
]
EVALUATION = ["loaded", "in memory, bf16", "multi-label"]
PREDICTION = ["float32", "fp16, multi-label"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The notes of every case of fake_cuda.py, by its name."""
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU: see test_gpu.py")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and gcc, to replace two functions of torch")
    shim = tmp_path_factory.mktemp("shim") / "shim.so"
    built = subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", shim],
                           input=SHIM, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"{compiler}: {built.stderr.strip()[-200:]}")
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HELPER], env=environment, capture_output=True,
                          text=True, timeout=300)
    if done.returncode < 0:
        pytest.skip(f"the replaced functions of torch {torch.__version__} crash it")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    if "skip" in results:
        pytest.skip(results["skip"])
    return results


def notes_of(case, kind=None):
    assert case["error"] is None
    return [note for note in case["notes"] if kind is None or note[0] == kind]


# --- training ---

@pytest.mark.parametrize("name", TRAINING)
def test_host_waits_for_nothing_in_a_step_but_the_numbers_of_the_step_before(name, cases):
    case = cases[f"train: {name}"]
    waits = [note for note in notes_of(case) if note[0] != "event"]
    assert waits == []


@pytest.mark.parametrize("name", TRAINING)
def test_reading_a_step_does_not_wait_for_the_next_step(name, cases):
    """A read waits for all device operations up to the end of its own step and for no other."""
    case = cases[f"train: {name}"]
    ends = case["ends_of_steps"]
    assert 0 < ends[0] < ends[1] < ends[2]
    assert notes_of(case, "event") == [["event", ends[0]], ["event", ends[1]]]


@pytest.mark.parametrize("name", ["bf16", "bf16, checkpointing"])
def test_weights_are_cast_once_per_step(name, cases):
    """Also if blocks are recomputed in the backward pass. The step has two micro-batches."""
    # Weight and bias of: embedding, a block of four layers, head, and the last block, which takes
    # its queries' weights apart from the others, so that three are cast as a whole.
    n_weights = 2 * (1 + 4 + 1 + 3)
    casts = cases[f"train: {name}"]["casts"]
    assert casts == [n_weights, 2 * n_weights, 3 * n_weights]


# --- scores ---

@pytest.mark.parametrize("name", EVALUATION)
def test_an_evaluation_batch_is_copied_to_the_host_once(name, cases):
    case = cases[f"evaluate: {name}"]
    notes = notes_of(case)
    assert [kind for kind, _ in notes] == ["copy to host"] * case["n_batches"]
    assert all(place.startswith("core/scoring/evaluation.py:") for _, place in notes)


@pytest.mark.parametrize("name", PREDICTION)
def test_scores_of_windows_are_copied_to_the_host_once(name, cases):
    assert [kind for kind, _ in notes_of(cases[f"predict: {name}"])] == ["copy to host"]


# --- controls ---

def test_control_loss_without_a_mistake_gives_no_notes(cases):
    assert notes_of(cases["mistake: none"]) == []


@pytest.mark.parametrize("name, kind", [
    ("float", "read"),
    ("branch", "read"),
    ("host index", "mixed devices"),
    ("mask", "read"),
    ("blocking copy", "copy to device"),
    ("large copy", "pageable copy"),
    ("to host", "copy to host"),
])
def test_control_mistake_in_the_loss_is_found_with_its_line(name, kind, cases):
    first_kind, place = cases[f"mistake: {name}"]["notes"][0]
    path, line = place.split(":")
    source = HELPER.read_text().splitlines()
    branch = next(i for i, text in enumerate(source) if f'self.mistake == "{name}"' in text)
    assert (first_kind, path) == (kind, "tests/fake_cuda.py")
    assert 1 <= int(line) - 1 - branch <= 2  # lines after the branch's first one


def test_control_step_read_without_its_event_waits_for_more(cases):
    """A copy that is made when it is read, as before, is found."""
    assert [kind for kind, _ in notes_of(cases["mistake: late copy"])] == ["read"]


def test_control_buffer_on_the_host_raises(cases):
    assert "same device" in cases["mistake: buffer on the host"]["error"]
    assert "model/frontend.py" in cases["mistake: buffer on the host"]["error"]
