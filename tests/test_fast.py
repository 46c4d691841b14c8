"""The fast paths: what they spare is spared, and the losses are those of --plain."""
import shutil

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from core.compiled import Compiled
from core.precision import Precision
from data.augment import Augment
from data.clips import Batch
from losses import FocalLoss
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.groups import parameter_groups
from sched import RelativeSchedule
from tests.faults.harness import program, rows


def training(dtype=None, plain=False):
    """A small model and a window of three micro-batches of 2, 2 and 1 clips."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2, drop_path=0.2)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 2e-3, 0.01), fused=not plain, foreach=False)
    t = train.Training(model, build_frontend(FrontendConfig()), Augment(10, 10, 1.0, 0.4, 1.0, 1.0), FocalLoss(), optimizer,
                       RelativeSchedule(optimizer, 2, 20), Precision(cpu, dtype, "").on(cpu, plain), 1.0)
    generator = torch.Generator().manual_seed(1)
    window = [Batch(torch.randn(size, 11025, generator=generator), torch.tensor([0, 2][:size]), np.arange(size) + 2 * i, [])
              for i, size in enumerate((2, 2, 1))]
    return t, window


class Casts(TorchDispatchMode):
    """Counts copies of float32 weights of a shape to bf16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.n = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.n += args[0].shape == self.shape
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("plain, casts", [(False, 1), (True, 3)])
def test_weights_are_cast_once_a_window(plain, casts):
    t, window = training(torch.bfloat16, plain)
    for step in (0, 1):  # anew in each step: the weights have moved
        with Casts(t.model.patch_embed.weight.shape) as seen:
            train.train_step(t, window, step)
        assert seen.n == casts


def test_one_cast_gives_the_same_steps_as_three():
    figures = []
    for plain in (False, True):
        t, window = training(torch.bfloat16, plain)
        t.optimizer = torch.optim.AdamW(parameter_groups(t.model, 1e-3, 2e-3, 0.01), fused=True)  # alike on both sides
        t.schedule = RelativeSchedule(t.optimizer, 2, 20)
        figures.append(torch.stack([train.train_step(t, window, step)[0] for step in range(4)]))
    assert torch.equal(*figures) and figures[0][:, 2].min() > 0


def test_the_front_end_and_the_loss_stay_in_float32_within_the_window():
    t, window = training(torch.bfloat16)
    seen = {}
    t.frontend.register_forward_hook(lambda module, inputs, out: seen.update(
        spec=out.dtype, matrix=(torch.ones(2, 2) @ torch.ones(2, 2)).dtype))
    t.model.head.register_forward_hook(lambda module, inputs, out: seen.update(logits=out.dtype))
    t.loss_fn.register_forward_hook(lambda module, inputs, out: seen.update(loss=out.dtype))
    train.train_step(t, window, 0)
    assert seen == {"spec": torch.float32, "matrix": torch.float32, "logits": torch.bfloat16, "loss": torch.float32}


def test_plain_and_fast_give_the_same_losses(tones, tmp_path, monkeypatch):
    """The whole program, two epochs with every augmentation; the recordings are resampled, so the cache rounds them."""
    steps, history = [], []
    for name, flags in (("fast", []), ("plain", ["--plain"]), ("ram", ["--cache", "ram"]), ("other", ["--seed", "1"])):
        (tmp_path / name).mkdir()
        assert program(monkeypatch, tmp_path / name, *flags, data=tones) == 0
        steps.append(np.array([float(row["loss"]) for row in rows(tmp_path / name / "run" / "steps.csv")]))
        history.append(rows(tmp_path / name / "run" / "history.csv"))
    assert np.abs(steps[0] - steps[1]).max() < 1e-3 < np.abs(steps[0] - steps[3]).max()
    assert np.array_equal(steps[0], steps[2]) and history[0] == history[2]  # where samples are kept changes nothing
    kept = tmp_path / "fast" / ".cache" / "warble" / "audio" / "22050"
    assert len(list(kept.rglob("*/*"))) == 48  # train, validation and test clips
    assert not (tmp_path / "plain" / ".cache" / "warble" / "audio").exists()


def test_a_changed_cache_flag_on_resume_is_refused(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--epochs", 1, data=tones) == 0
    assert program(monkeypatch, tmp_path, "--resume", "--cache", "off") == 2
    assert "--cache off: the run was started with disk" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--compile", "default"], ["--cache", "ram"]])
def test_plain_does_not_go_with_fast(flags, tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--plain", *flags, data=tones) == 2
    assert "--plain" in capsys.readouterr().err


def test_a_compilation_that_fails_is_said_and_the_run_goes_on(tones, tmp_path, monkeypatch, capsys):
    def broken(model, **how):
        def call(*inputs):
            raise NotImplementedError("no compiler\nhere")
        return call
    assert program(monkeypatch, tmp_path, "--compile", "default", data=tones,
                   prepare=lambda patch: patch.setattr(torch, "compile", broken)) == 0
    assert "not compiled, the run goes on without: NotImplementedError: no compiler\n" in capsys.readouterr().out


def test_only_full_training_micro_batches_are_compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **how: lambda x, *how: calls.append(len(x)) or model(x, *how))
    t, window = training()
    plain = train.train_step(*training(), 0)[0]
    t.compiled = Compiled(t.model, 2)
    assert torch.equal(train.train_step(t, window, 0)[0], plain) and calls == [2, 2]
    t.model.eval()
    t.compiled(torch.zeros(2, 128, 40))
    assert calls == [2, 2]


def test_gradients_of_graphs_stay_in_their_places(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    t, window = training()
    t.compiled = Compiled(t.model, 2, graphs=True)
    places = []
    for step in (0, 1):
        train.train_step(t, window, step)
        places.append([p.grad.data_ptr() for p in t.model.parameters()])
    assert places[0] == places[1] and all((p.grad == 0).all() for p in t.model.parameters())


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_steps_are_the_plain_ones():
    figures = []
    for compiled in (False, True):
        t, window = training()
        if compiled:
            train.compile_model(t, 2, 11025, graphs=False)
            assert t.compiled is not None
        figures.append(torch.stack([train.train_step(t, window, step)[0] for step in range(3)]))
    torch.testing.assert_close(*figures, rtol=1e-4, atol=1e-5)
