"""Layer decay, freezing and the average of the weights."""
import numpy as np
import pytest
import torch

import train
from core.checkpoint import load_checkpoint
from core.ema import EMA
from evaluate import restore, weights_of
from model.ast import AST, ASTConfig
from model.groups import freeze_backbone, parameter_groups
from sched import RelativeSchedule
from tests.faults.harness import program, rows


def test_layer_decay_as_in_beit():
    """Against the rule written out: lr * decay ** (depth + 1 - layer), the embeddings at layer 0."""
    model = AST(ASTConfig(3, dim=16, depth=3, heads=2))
    groups = parameter_groups(model, 1e-4, 1e-2, 0.1, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    plain = {id(p): group["weight_decay"] for group in parameter_groups(model, 1, 1, 0.1) for p in group["params"]}
    assert decay == plain
    for name, p in model.named_parameters():
        want = {"cls_token": 1e-4 / 16, "dist_token": 1e-4 / 16, "pos_embed": 1e-4 / 16, "patch_embed": 1e-4 / 16,
                "norm": 1e-4, "head": 1e-2}.get(name.split(".")[0])
        if want is None:
            want = 1e-4 / (8, 4, 2)[int(name.split(".")[1])]
        assert rate[id(p)] == pytest.approx(want), name
    ratios = []
    optimizer = torch.optim.AdamW(groups)
    schedule = RelativeSchedule(optimizer, 5, 20)
    for _ in range(20):
        ratios.append([group["lr"] / optimizer.param_groups[-1]["lr"] for group in optimizer.param_groups])
        schedule.step()
    assert np.ptp(ratios, axis=0).max() < 1e-12  # through warm-up and decay


def test_a_frozen_backbone_does_not_move_and_then_does():
    model = AST(ASTConfig(3, dim=16, depth=2, heads=2))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 1e-2, 0.1), fused=True)
    x = torch.randn(4, 128, 40)
    for frozen in (True, False):
        freeze_backbone(model, frozen)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if not frozen or name.startswith("head.")}


def test_the_average_against_a_loop_in_float64():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4)
    ema = EMA(model, 0.9)
    want, n = model.weight.detach().double().clone(), 0
    for step in range(60):
        with torch.no_grad():
            model.weight.add_(torch.randn(4, 5))
        happened = step % 5 != 3
        ema.update(happened if step % 2 else torch.tensor(happened))
        if happened:
            rate = min(0.9, (1 + n) / (10 + n))
            want, n = rate * want + (1 - rate) * model.weight.detach().double(), n + 1
    torch.testing.assert_close(ema.averages["weight"].double(), want, atol=1e-5, rtol=1e-5)
    own = model.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(model.weight.double(), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.weight, own) and float(ema.updates) == 48


def test_the_average_is_what_is_evaluated_saved_and_used(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--ema", "0.9", data=tones) == 0
    state = load_checkpoint(tmp_path / "run" / "best.pt")
    assert state["ema"].keys() == state["model"].keys()
    assert any(not torch.equal(state["ema"][name], state["model"][name]) for name in state["model"])
    assert weights_of(state) is state["ema"]
    averaged, raw = (restore(state, torch.device("cpu"), averaged=which)[0].state_dict() for which in (True, False))
    assert all(torch.equal(averaged[name], state["ema"][name]) for name in averaged)
    assert all(torch.equal(raw[name], state["model"][name]) for name in raw)
    seen = []  # what validation and the test scored
    real = train.evaluate

    def watch(model, *how):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return real(model, *how)
    (tmp_path / "other").mkdir()
    assert program(monkeypatch, tmp_path / "other", "--ema", "0.9", data=tones,
                   prepare=lambda patch: patch.setattr(train, "evaluate", watch)) == 0
    last = load_checkpoint(tmp_path / "other" / "run" / "last.pt")
    assert len(seen) == 3 and all(torch.equal(seen[1][name], last["ema"][name]) for name in last["ema"])
    best = load_checkpoint(tmp_path / "other" / "run" / "best.pt")
    assert all(torch.equal(seen[2][name], best["ema"][name]) for name in best["ema"])


def test_freezing_in_a_run_and_a_linear_probe(tones, tmp_path, monkeypatch):
    start = {}
    real = train.train_step

    def step(t, *how):
        start.setdefault("weights", {name: p.detach().clone() for name, p in t.model.named_parameters()})
        return real(t, *how)
    for epochs, frozen in ((1, False), (2, True)):
        start.clear()
        (tmp_path / str(epochs)).mkdir()
        assert program(monkeypatch, tmp_path / str(epochs), "--freeze-epochs", epochs, data=tones,
                       prepare=lambda patch: patch.setattr(train, "train_step", step)) == 0
        last = load_checkpoint(tmp_path / str(epochs) / "run" / "last.pt")["model"]
        same = {name for name in last if torch.equal(last[name], start["weights"][name])}
        assert (same == {name for name in last if not name.startswith("head.")}) == frozen
        assert any(name.startswith("head.") for name in last) and not any(name.startswith("head.") for name in same)


def test_the_samplers_frequencies_are_printed_and_happen(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--sampler", "balanced", "--epochs", 1, data=tones) == 0
    assert "sampler balanced: clips of a class in an epoch" in capsys.readouterr().out
    assert sum(int(row["clips"]) for row in rows(tmp_path / "run" / "steps.csv")) == len(
        (tmp_path / "run" / "coverage.csv").read_text().splitlines()) - 1
