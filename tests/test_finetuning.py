"""Layer decay, freezing, averaged weights and the sampler, alone and in a run."""
import numpy as np
import pytest
import torch

import train
from core.ema import EMA
from core.run.checkpoint import load_checkpoint
from core.scoring import restore, weights_of
from model.ast import AST, ASTConfig
from model.groups import freeze_backbone, parameter_groups
from sched import RelativeSchedule
from tests.faults.harness import program, rows


def test_layer_decay_agrees_with_beit():
    """The rule: lr * decay ** (depth + 1 - layer), with the embeddings as layer 0."""
    model = AST(ASTConfig(3, dim=16, depth=3, heads=2))
    groups = parameter_groups(model, 1e-4, 1e-2, 0.1, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    without = parameter_groups(model, 1, 1, 0.1)
    assert decay == {id(p): group["weight_decay"] for group in without for p in group["params"]}
    expected = {
        "cls_token": 1e-4 / 16, "dist_token": 1e-4 / 16, "pos_embed": 1e-4 / 16,
        "patch_embed": 1e-4 / 16, "blocks.0": 1e-4 / 8, "blocks.1": 1e-4 / 4, "blocks.2": 1e-4 / 2,
        "norm": 1e-4, "head": 1e-2,
    }
    for name, p in model.named_parameters():
        part = ".".join(name.split(".")[:2 if name.startswith("blocks") else 1])
        assert rate[id(p)] == pytest.approx(expected[part]), name
    ratios = []
    optimizer = torch.optim.AdamW(groups)
    schedule = RelativeSchedule(optimizer, 5, 20)
    for _ in range(20):
        last = optimizer.param_groups[-1]["lr"]
        ratios.append([group["lr"] / last for group in optimizer.param_groups])
        schedule.step()
    assert np.ptp(ratios, axis=0).max() < 1e-12  # through warm-up and decay


def test_a_frozen_backbone_does_not_change_until_it_is_unfrozen():
    model = AST(ASTConfig(3, dim=16, depth=2, heads=2))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 1e-2, 0.1), fused=True)
    x = torch.randn(4, 128, 40)
    for frozen in (True, False):
        freeze_backbone(model, frozen)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name in before if not frozen or name.startswith("head.")}


def test_ema_agrees_with_a_loop_in_float64():
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


def test_averaged_weights_are_evaluated_saved_and_restored(tones, tmp_path, monkeypatch):
    assert program(monkeypatch, tmp_path, "--ema", "0.9", data=tones) == 0
    state = load_checkpoint(tmp_path / "run" / "best.pt")
    assert state["ema"].keys() == state["model"].keys()
    assert any(not torch.equal(state["ema"][name], state["model"][name]) for name in state["model"])
    assert weights_of(state) is state["ema"]
    averaged = restore(state, torch.device("cpu"), averaged=True)[0].state_dict()
    raw = restore(state, torch.device("cpu"), averaged=False)[0].state_dict()
    assert all(torch.equal(averaged[name], state["ema"][name]) for name in averaged)
    assert all(torch.equal(raw[name], state["model"][name]) for name in raw)
    seen = []  # the weights of each evaluation: two validations and the test
    real = train.evaluate

    def watch(learner, *rest, **options):
        seen.append({name: p.detach().clone() for name, p in learner.model.named_parameters()})
        return real(learner, *rest, **options)

    (tmp_path / "other").mkdir()
    assert program(monkeypatch, tmp_path / "other", "--ema", "0.9", data=tones,
                   prepare=lambda patch: patch.setattr(train, "evaluate", watch)) == 0
    last = load_checkpoint(tmp_path / "other" / "run" / "last.pt")
    assert len(seen) == 3
    assert all(torch.equal(seen[1][name], last["ema"][name]) for name in last["ema"])
    best = load_checkpoint(tmp_path / "other" / "run" / "best.pt")
    assert all(torch.equal(seen[2][name], best["ema"][name]) for name in best["ema"])


def test_freezing_in_a_run_and_a_linear_probe(tones, tmp_path, monkeypatch):
    start = {}  # the weights before the first step
    real = train.train_step

    def step(learner, *rest):
        if not start:
            start.update((name, p.detach().clone()) for name, p in learner.model.named_parameters())
        return real(learner, *rest)

    for freeze_epochs, always_frozen in ((1, False), (2, True)):  # of two epochs
        start.clear()
        folder = tmp_path / str(freeze_epochs)
        folder.mkdir()
        assert program(monkeypatch, folder, "--freeze-epochs", freeze_epochs, data=tones,
                       prepare=lambda patch: patch.setattr(train, "train_step", step)) == 0
        last = load_checkpoint(folder / "run" / "last.pt")["model"]
        unchanged = {name for name in last if torch.equal(last[name], start[name])}
        head = {name for name in last if name.startswith("head.")}
        assert (unchanged == last.keys() - head) == always_frozen
        assert head and not unchanged & head


def test_the_sampler_is_printed_and_an_epoch_has_all_its_clips(
        tones, tmp_path, monkeypatch, capsys):
    flags = ["--sampler", "balanced", "--epochs", 1]
    assert program(monkeypatch, tmp_path, *flags, data=tones) == 0
    assert "sampler balanced" in capsys.readouterr().out
    n_clips = sum(int(row["clips"]) for row in rows(tmp_path / "run" / "steps.csv"))
    assert n_clips == sum(row["split"] == "train" for row in rows(tmp_path / "run" / "split.csv"))
