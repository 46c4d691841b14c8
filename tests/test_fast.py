"""The fast paths do less work, and the losses are those of --plain."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from build import fit_to_device
from core.device.compiled import Compiled
from core.device.precision import Precision
from core.learner import Learner
from data.augment import Augment
from data.clips import Batch
from losses import FocalLoss
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.groups import parameter_groups
from sched import RelativeSchedule
from tests.faults.harness import program, rows

# Not shorter: one column of patches would be embedded in float32, without a cast.
SECONDS, RATE = 1.0, 22050


def make_learner(dtype=None, plain=False, fused=None):
    """A small model, and the micro-batches of a step, of 2, 2 and 1 clips."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2, drop_path=0.2)).train()
    groups = parameter_groups(model, 1e-3, 2e-3, 0.01)
    fused = not plain if fused is None else fused
    optimizer = torch.optim.AdamW(groups, fused=fused, foreach=False)
    augment = Augment(freq_mask=10, time_mask=10, specaug_p=1.0, mixup_alpha=0.4, mixup_p=1.0,
                      shift_p=1.0)
    learner = Learner(model, build_frontend(FrontendConfig()), augment, FocalLoss(), optimizer,
                      RelativeSchedule(optimizer, 2, 20), Precision(cpu, dtype, "").on(cpu, plain),
                      clip_grad=1.0)
    generator = torch.Generator().manual_seed(1)
    micro_batches = [
        Batch(torch.randn(size, round(SECONDS * RATE), generator=generator),
              torch.tensor([0, 2][:size]), np.arange(size) + 2 * i, [])
        for i, size in enumerate((2, 2, 1))]
    return learner, micro_batches


def numbers_of_steps(learner, micro_batches, n_steps):
    """The StepNumbers of some steps, (n_steps, 5)."""
    return torch.stack([train.train_step(learner, micro_batches, epoch).numbers
                        for epoch in range(n_steps)])


# --- casts ---

class CountCasts(TorchDispatchMode):
    """Counts copies of float32 weights of a shape to bf16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.n = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_copy = function is torch.ops.aten._to_copy.default
        if is_copy and kwargs.get("dtype") is torch.bfloat16 and args[0].shape == self.shape:
            self.n += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize("plain, n_casts", [(False, 1), (True, 3)])
def test_weights_are_cast_once_per_step_or_once_per_micro_batch_if_plain(plain, n_casts):
    learner, micro_batches = make_learner(torch.bfloat16, plain)
    for epoch in (0, 1):  # in each step, because the weights have changed
        with CountCasts(learner.model.patch_embed.weight.shape) as casts:
            train.train_step(learner, micro_batches, epoch)
        assert casts.n == n_casts


def test_one_cast_gives_the_same_steps_as_three():
    fast, plain = (
        numbers_of_steps(*make_learner(torch.bfloat16, is_plain, fused=True), 4)
        for is_plain in (False, True))
    assert torch.equal(fast, plain)
    grad_norms = fast[:, 2]
    assert grad_norms.min() > 0


def test_front_end_and_loss_stay_in_float32_while_weights_are_cast_once():
    learner, micro_batches = make_learner(torch.bfloat16)
    dtypes = {}

    def record_front_end(module, inputs, spec):
        dtypes["spec"] = spec.dtype
        dtypes["product"] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    learner.frontend.register_forward_hook(record_front_end)
    learner.model.head.register_forward_hook(
        lambda module, inputs, logits: dtypes.update(logits=logits.dtype))
    learner.loss_fn.register_forward_hook(
        lambda module, inputs, loss: dtypes.update(loss=loss.dtype))
    train.train_step(learner, micro_batches, 0)
    assert dtypes == {"spec": torch.float32, "product": torch.float32, "logits": torch.bfloat16,
                      "loss": torch.float32}


# --- whole runs ---

def run_tiny(monkeypatch, folder, tones, *flags):
    """Train two epochs with every augmentation -> loss of each step (n,), rows of history.csv."""
    folder.mkdir()
    assert program(monkeypatch, folder, *flags, data=tones) == 0
    losses = np.array([float(row["loss"]) for row in rows(folder / "run" / "steps.csv")])
    return losses, rows(folder / "run" / "history.csv")


def test_plain_and_fast_runs_have_the_same_losses(tones, tmp_path, monkeypatch):
    """The recordings are resampled, so the cache rounds them."""
    losses, history = run_tiny(monkeypatch, tmp_path / "disk", tones)
    plain_losses, _ = run_tiny(monkeypatch, tmp_path / "plain", tones, "--plain")
    ram_losses, ram_history = run_tiny(monkeypatch, tmp_path / "ram", tones, "--cache", "ram")
    assert np.abs(losses - plain_losses).max() < 1e-3
    assert np.array_equal(losses, ram_losses)  # the cache mode changes nothing
    assert history == ram_history
    entries = tmp_path / "disk" / ".cache" / "warble" / "audio" / str(RATE)
    assert len(list(entries.rglob("*/*"))) == 48  # train, validation and test clips
    assert not (tmp_path / "plain" / ".cache" / "warble" / "audio").exists()


def test_control_another_seed_gives_other_losses(tones, tmp_path, monkeypatch):
    """By more than plain and fast runs may differ."""
    losses, _ = run_tiny(monkeypatch, tmp_path / "a", tones)
    other_losses, _ = run_tiny(monkeypatch, tmp_path / "b", tones, "--seed", "1")
    assert np.abs(losses - other_losses).max() > 1e-3


def test_changed_cache_flag_on_resume_is_refused(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--epochs", 1, data=tones) == 0
    assert program(monkeypatch, tmp_path, "--resume", "--cache", "off") == 2
    assert "--cache off" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--compile", "default"], ["--cache", "ram"]])
def test_plain_is_refused_together_with_a_fast_path(flags, tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--plain", *flags, data=tones) == 2
    assert "--plain" in capsys.readouterr().err


# --- compiled ---

def test_failing_compilation_is_reported_and_the_run_continues(tones, tmp_path, monkeypatch,
                                                              capsys):
    def compile_broken(model, **settings):
        def call(*inputs):
            raise NotImplementedError("no compiler\nhere")
        return call

    def prepare(patch):
        patch.setattr(torch, "compile", compile_broken)
    flags = ("--compile", "default")
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=prepare) == 0
    line, = [line for line in capsys.readouterr().out.splitlines() if "no compiler" in line]
    assert "NotImplementedError" in line
    assert "here" not in line.split()  # only the first line of the reason


def test_only_full_training_micro_batches_are_compiled(monkeypatch):
    sizes = []  # of the compiled model's inputs

    def compile_recording(model, **settings):
        def call(x, *draws):
            sizes.append(len(x))
            return model(x, *draws)
        return call
    monkeypatch.setattr(torch, "compile", compile_recording)
    expected = train.train_step(*make_learner(), 0).numbers
    learner, micro_batches = make_learner()
    learner.compiled = Compiled(learner.model, 2)
    assert torch.equal(train.train_step(learner, micro_batches, 0).numbers, expected)
    assert sizes == [2, 2]
    learner.model.eval()
    learner.compiled(torch.zeros(2, 128, 40))
    assert sizes == [2, 2]


def test_gradients_of_graphs_stay_in_their_places(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    learner, micro_batches = make_learner()
    learner.compiled = Compiled(learner.model, 2, graphs=True)
    addresses = []
    for epoch in (0, 1):
        train.train_step(learner, micro_batches, epoch)
        addresses.append([p.grad.data_ptr() for p in learner.model.parameters()])
    assert addresses[0] == addresses[1]
    assert all((p.grad == 0).all() for p in learner.model.parameters())


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None,
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_steps_are_the_plain_ones():
    expected = numbers_of_steps(*make_learner(), 3)
    learner, micro_batches = make_learner()
    args = SimpleNamespace(seconds=SECONDS, batch_size=2, compile="default")
    assert fit_to_device(args, learner, train.accumulate) == 2
    assert learner.compiled is not None
    numbers = numbers_of_steps(learner, micro_batches, 3)
    torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-5)
