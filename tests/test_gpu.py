"""What only a CUDA device can show; skipped without one. Run alone: python -m pytest -m gpu"""
import csv

import numpy as np
import pytest
import soundfile as sf
import torch

import predict
import train
from core.memory import Pieces
from core.precision import Precision
from data.augment import Augment
from data.cache import WaveCache
from data.clips import Batch, Clips, evaluation_batches
from data.load import load_manifest
from data.scan import scan
from evaluate import window_scores
from losses import FocalLoss
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.groups import parameter_groups
from model.relevance import patch_relevance
from sched import RelativeSchedule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def training(device, dtype=None, dim=64, seconds=2):
    torch.manual_seed(0)
    device = torch.device(device)
    model = AST(ASTConfig(3, dim=dim, depth=3, heads=2, drop_path=0.2)).to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 2e-3, 0.01), fused=True)
    schedule = RelativeSchedule(optimizer, 2, 20, device=device if device.type == "cuda" else None)
    t = train.Training(model, build_frontend(FrontendConfig()).to(device), Augment(15, 30, 1.0, 0.4, 1.0, 1.0), FocalLoss(),
                       optimizer, schedule, Precision(device, dtype, ""), 1.0)
    generator = torch.Generator().manual_seed(1)
    window = [Batch(torch.randn(4, 22050 * seconds, generator=generator).pin_memory(), torch.tensor([0, 1, 2, 0]),
                    np.arange(4) + 4 * i, []) for i in range(3)]
    return t, window


def test_steps_on_the_gpu_are_those_on_the_cpu():
    figures = {}
    for device in ("cpu", "cuda"):
        t, window = training(device)
        figures[device] = [train.train_step(t, window, epoch)[0].cpu() for epoch in range(4)]
        figures[device].append(torch.stack([p.detach().double().norm().cpu() for p in t.model.parameters()]).float())
    for a, b in zip(figures["cpu"], figures["cuda"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_no_host_synchronisation_inside_a_window(dtype):
    t, window = training("cuda", dtype)
    pending = [train.train_step(t, window, 0)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in range(1, 4):
            lrs = train.group_lrs(t.optimizer)
            pending.append((*train.train_step(t, window, epoch), lrs))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(figures[0]).all() for figures in pending)


def test_a_step_that_is_not_finite_moves_neither_weights_nor_rates():
    t, window = training("cuda", torch.bfloat16)
    train.train_step(t, window, 0)
    weights, rate = [p.detach().clone() for p in t.model.parameters()], float(t.optimizer.param_groups[0]["lr"])
    window[1].wave[2, 100] = float("nan")
    figures, losses = train.train_step(t, window, 1)
    assert figures[3] == 0 and not torch.isfinite(losses[1][1][2])
    assert all(torch.equal(a, b) for a, b in zip(weights, t.model.parameters(), strict=True))
    assert float(t.optimizer.param_groups[0]["lr"]) == rate and int(t.schedule.steps) == 1


def test_running_out_of_real_memory_splits_the_micro_batch():
    t, window = training("cuda", dim=256, seconds=10)
    big = [Batch(torch.cat([batch.wave for batch in window] * 16), torch.cat([batch.target for batch in window] * 16),
                 np.arange(192), [])]
    whole = train.train_step(t, big, 0)[0].cpu()
    peak = torch.cuda.max_memory_allocated()
    t, _ = training("cuda", dim=256, seconds=10)
    t.pieces = Pieces()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / torch.cuda.get_device_properties(0).total_memory)
    try:
        parts = train.train_step(t, big, 0)[0].cpu()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert t.pieces.limit in (96, 48)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)


def test_loaded_batches_are_pinned_and_resident_ones_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        sf.write(tmp_path / "ab"[i % 2] / f"{i}.wav", 0.3 * rng.standard_normal(8000 + 1000 * i), 16000)
    manifest = load_manifest(tmp_path)
    manifest.duration = scan(manifest, None, full=False).duration
    clips = Clips(manifest, 16000, 9000, cache=WaveCache(tmp_path / "cache", 16000))
    loaded = list(evaluation_batches(clips, np.arange(6), 4, pin=True))
    assert all(batch.wave.is_pinned() and batch.target.is_pinned() for batch in loaded)
    clips.load_into_memory(torch.device("cuda"))
    for batch, other in zip(loaded, evaluation_batches(clips, np.arange(6), 4), strict=True):
        assert other.wave.is_cuda and torch.equal(other.wave.cpu(), batch.wave)


@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_steps_are_the_plain_ones(graphs):
    figures = []
    for compiled in (False, True):
        t, window = training("cuda", torch.bfloat16)
        if compiled:
            train.compile_model(t, 4, 22050 * 2, graphs)
            assert t.compiled is not None
        figures.append(torch.stack([train.train_step(t, window, step)[0].cpu() for step in range(4)]))
    torch.testing.assert_close(*figures, rtol=3e-2, atol=3e-2)


def test_scores_and_relevance_on_the_gpu_are_those_on_the_cpu():
    waves, found = 0.1 * torch.randn(4, 44100, generator=torch.Generator().manual_seed(2)), []
    for device in (torch.device("cpu"), torch.device("cuda")):
        torch.manual_seed(0)
        model, frontend = AST(ASTConfig(3, dim=64, depth=3, heads=2)).to(device).eval(), build_frontend(FrontendConfig()).to(device)
        logits, scores, features = window_scores(model, frontend, waves, Precision(device, None, ""), True)
        relevance = patch_relevance(model, frontend(waves.to(device)), logits.argmax(dim=1).clone())
        found.append([torch.from_numpy(scores), features.cpu(), relevance.cpu() / relevance.cpu().max()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_training_prediction_and_report_on_the_gpu(tones, tmp_path, monkeypatch):
    """A run with its recordings on the GPU to its report, and predict.py on both devices."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train.main(["--data", str(tones), "--weights=none", "--dim=32", "--depth=1", "--heads=2", "--seconds=1", "--epochs=1",
                       "--device=cuda", "--cache=device", "--run-dir=run"]) == 0
    assert "data:audio/mpeg" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    tables = []
    for device in ("cpu", "cuda"):
        predict.main([str(tones), "--ckpt=run/best.pt", f"--device={device}", "--amp=off", f"--out={device}", "--threshold=0", "--top-k=3"])
        with open(tmp_path / device / "files.csv", newline="") as file:
            tables.append({(row["path"], row["label"]): float(row["score"]) for row in csv.DictReader(file)})
    assert tables[0] == pytest.approx(tables[1], abs=2e-3)
