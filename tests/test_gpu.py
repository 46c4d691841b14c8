"""What only a CUDA device can show; skipped without one. Run alone: python -m pytest -m gpu"""
import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch

import predict
import train
from build import fit_to_device
from core.device.memory import BatchSplitter, largest_batch
from core.device.precision import Precision
from core.learner import Learner
from core.scoring import window_scores
from data.augment import Augment
from data.cache import WaveCache
from data.clips import Batch, Clips, evaluation_batches
from data.load import load_manifest
from data.scan import scan
from losses import FocalLoss
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.groups import parameter_groups
from model.relevance import patch_relevance
from sched import RelativeSchedule

RATE = 22050
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """By default cuDNN rounds the inputs of convolutions to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_learner(device, dtype=None, dim=64, seconds=2):
    """A small model on a device, and a step of three micro-batches of 4 clips in pinned memory."""
    torch.manual_seed(0)
    device = torch.device(device)
    model = AST(ASTConfig(3, dim=dim, depth=3, heads=2, drop_path=0.2)).to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 2e-3, 0.01), fused=True)
    schedule = RelativeSchedule(optimizer, 2, 20,
                                device=device if device.type == "cuda" else None)
    augment = Augment(freq_mask=15, time_mask=30, specaug_p=1.0, mixup_alpha=0.4, mixup_p=1.0,
                      shift_p=1.0)
    learner = Learner(model, build_frontend(FrontendConfig()).to(device), augment, FocalLoss(),
                      optimizer, schedule, Precision(device, dtype, ""), clip_grad=1.0)
    generator = torch.Generator().manual_seed(1)
    micro_batches = [
        Batch(torch.randn(4, RATE * seconds, generator=generator).pin_memory(),
              torch.tensor([0, 1, 2, 0]), np.arange(4) + 4 * i, [])
        for i in range(3)]
    return learner, micro_batches


def numbers_of_steps(learner, micro_batches, n_steps):
    """The StepNumbers of some steps on the CPU, (n_steps, 5)."""
    return torch.stack([train.train_step(learner, micro_batches, epoch).numbers.cpu()
                        for epoch in range(n_steps)])


# --- the step ---

def test_steps_on_the_gpu_are_those_on_the_cpu():
    results = {}
    for device in ("cpu", "cuda"):
        learner, micro_batches = make_learner(device)
        numbers = numbers_of_steps(learner, micro_batches, 4)
        norms = [p.detach().double().norm().cpu() for p in learner.model.parameters()]
        results[device] = numbers, torch.stack(norms).float()
    for on_cpu, on_gpu in zip(results["cpu"], results["cuda"], strict=True):
        torch.testing.assert_close(on_cpu, on_gpu, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_host_does_not_wait_for_the_gpu_within_a_step(dtype):
    learner, micro_batches = make_learner("cuda", dtype)
    results = [train.train_step(learner, micro_batches, 0)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in range(1, 4):
            results.append(train.train_step(learner, micro_batches, epoch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(result.numbers).all() for result in results)


def test_control_reading_a_number_makes_the_host_wait():
    learner, micro_batches = make_learner("cuda")
    result = train.train_step(learner, micro_batches, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            result.numbers.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_reading_a_step_does_not_wait_for_later_work():
    learner, micro_batches = make_learner("cuda")
    train.train_step(learner, micro_batches, 0).read()
    result = train.train_step(learner, micro_batches, 1)
    torch.cuda._sleep(3_000_000_000)  # cycles: more than a second
    numbers = result.read()
    is_still_running = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert is_still_running
    assert list(numbers[:5]) == result.numbers.tolist()


def test_step_that_is_not_finite_changes_neither_weights_nor_rates():
    learner, micro_batches = make_learner("cuda", torch.bfloat16)
    train.train_step(learner, micro_batches, 0)
    weights = [p.detach().clone() for p in learner.model.parameters()]
    rate = float(learner.optimizer.param_groups[0]["lr"])
    micro_batches[1].wave[2, 100] = float("nan")
    result = train.train_step(learner, micro_batches, 1)
    assert result.read().applied == 0
    _, losses = result.losses[1]
    assert not torch.isfinite(losses[2])
    for before, after in zip(weights, learner.model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert float(learner.optimizer.param_groups[0]["lr"]) == rate
    assert int(learner.schedule.steps) == 1


def test_out_of_memory_on_the_gpu_splits_the_micro_batch():
    learner, micro_batches = make_learner("cuda", dim=256, seconds=10)
    wave = torch.cat([batch.wave for batch in micro_batches] * 16)
    target = torch.cat([batch.target for batch in micro_batches] * 16)
    large = [Batch(wave, target, np.arange(192), [])]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected = train.train_step(learner, large, 0).numbers.cpu()
    peak = torch.cuda.max_memory_allocated()
    learner, _ = make_learner("cuda", dim=256, seconds=10)
    learner.splitter = BatchSplitter()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    try:
        numbers = train.train_step(learner, large, 0).numbers.cpu()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert learner.splitter.limit in (96, 48)
    torch.testing.assert_close(numbers, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["default", "graphs"])
def test_compiled_steps_are_the_plain_ones(mode):
    dtype, seconds = torch.bfloat16, 2
    expected = numbers_of_steps(*make_learner("cuda", dtype, seconds=seconds), 4)
    learner, micro_batches = make_learner("cuda", dtype, seconds=seconds)
    args = SimpleNamespace(seconds=seconds, batch_size=4, compile=mode, epochs=1, freeze_epochs=0)
    fit_to_device(args, learner, train.accumulate)
    assert learner.compiled is not None
    assert learner.compiled.graphs == (mode == "graphs")
    numbers = numbers_of_steps(learner, micro_batches, 4)
    torch.testing.assert_close(numbers, expected, rtol=3e-2, atol=3e-2)


def test_largest_batch_leaves_a_tenth_of_the_free_memory_and_forgets_its_peak():
    def attempt(size):
        torch.empty(size << 30, dtype=torch.uint8, device="cuda")  # a GiB per clip
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    room = int(0.9 * (free + torch.cuda.memory_reserved())) >> 30
    best = largest_batch(range(1, 300), attempt, torch.device("cuda"))
    assert max(1, room - 1) <= best <= max(1, room)
    assert torch.cuda.max_memory_allocated() < 1 << 30


def test_moments_are_allocated_before_the_first_step_and_change_nothing():
    expected = numbers_of_steps(*make_learner("cuda"), 2)
    learner, micro_batches = make_learner("cuda")
    learner.allocate_moments()
    before = torch.cuda.memory_allocated()
    numbers = numbers_of_steps(learner, micro_batches, 2)
    assert torch.cuda.memory_allocated() - before < 1 << 20
    torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_deterministic_steps_are_the_same_bit_for_bit(dtype):
    """In a process of its own, because cuBLAS reads its setting at the first matrix product.

    Clips of 25 s have more columns of patches than the position parameter, which is interpolated.
    """
    code = ("import sys; sys.path[:0] = ['.', 'tests']\n"
            "from core.device.precision import use_deterministic\n"
            "use_deterministic()\n"
            "import torch, test_gpu\n"
            f"make = lambda: test_gpu.make_learner('cuda', {dtype}, seconds=25)\n"
            "first, second = (test_gpu.numbers_of_steps(*make(), 5) for _ in range(2))\n"
            "assert torch.equal(first, second), (first, second)\n")
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- clips ---

def test_loaded_batches_are_pinned_and_equal_those_in_gpu_memory(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        sf.write(folder / f"{i}.wav", 0.3 * rng.standard_normal(8000 + 1000 * i), 16000)
    manifest = load_manifest(tmp_path)
    manifest.duration = scan(manifest, None, full=False).duration
    clips = Clips(manifest, 16000, 9000, cache=WaveCache(tmp_path / "cache", 16000))
    loaded = list(evaluation_batches(clips, np.arange(6), 4, pin=True))
    assert all(batch.wave.is_pinned() and batch.target.is_pinned() for batch in loaded)
    clips.load_into_memory(torch.device("cuda"))
    in_memory = list(evaluation_batches(clips, np.arange(6), 4))
    for batch, expected in zip(in_memory, loaded, strict=True):
        assert batch.wave.is_cuda
        assert torch.equal(batch.wave.cpu(), expected.wave)


# --- scores ---

def test_scores_and_relevance_on_the_gpu_are_those_on_the_cpu():
    wave = 0.1 * torch.randn(4, 2 * RATE, generator=torch.Generator().manual_seed(2))
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        torch.manual_seed(0)
        model = AST(ASTConfig(3, dim=64, depth=3, heads=2)).to(device).eval()
        frontend = build_frontend(FrontendConfig()).to(device)
        precision = Precision(device, None, "")
        logits, scores, features = window_scores(model, frontend, wave, precision, True)
        predicted = logits.argmax(dim=1).clone()  # a clone, because it comes from inference mode
        relevance = patch_relevance(model, frontend(wave.to(device)), predicted).cpu()
        results.append([torch.from_numpy(scores), features.cpu(), relevance / relevance.max()])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_cpu, on_gpu, rtol=2e-3, atol=2e-3)


def test_training_prediction_and_report_on_the_gpu(tones, tmp_path, monkeypatch):
    """A run with its recordings in GPU memory, its report, and predict.py on both devices."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--weights=none", "--dim=32", "--depth=1", "--heads=2", "--seconds=1", "--epochs=1",
             "--device=cuda", "--cache=device", "--run-dir=run"]
    assert train.main(["--data", str(tones), *flags]) == 0
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "data:audio/mpeg" in report
    tables = []
    for device in ("cpu", "cuda"):
        predict.main([str(tones), "--ckpt=run/best.pt", f"--device={device}", "--amp=off",
                      f"--out={device}", "--threshold=0", "--top-k=3"])
        with open(tmp_path / device / "files.csv", newline="", encoding="utf-8") as file:
            tables.append({(row["path"], row["label"]): float(row["score"])
                           for row in csv.DictReader(file)})
    assert tables[0] == pytest.approx(tables[1], abs=2e-3)
