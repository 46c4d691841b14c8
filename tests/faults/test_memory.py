"""Memory that runs out (fault 11)."""
import math

import pytest
import torch
from float64 import DoubleFocal, Through, cut
from harness import outcome, program, rows

import train
from core.device.memory import BatchSplitter, ClipTooLargeError, is_out_of_memory, largest_batch
from core.device.precision import Precision
from core.learner import Learner
from core.run.checkpoint import load_checkpoint
from data.augment import Augment
from model.ast import AST, ASTConfig
from model.groups import parameter_groups
from sched import RelativeSchedule

CPU = torch.device("cpu")


class FailsInForward(torch.nn.Module):
    """An AST for which more than `fits` clips need too much memory in the forward pass."""

    def __init__(self, model, fits):
        super().__init__()
        self.model, self.fits, self.config = model, fits, model.config

    def forward(self, spec, *draws):
        if len(spec) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.model(spec, *draws)


class FailsInBackward(FailsInForward):
    """Memory runs out in the backward pass, when half of the gradients are already added."""

    def forward(self, spec, *draws):
        if len(spec) <= self.fits:
            return self.model(spec, *draws)
        hook = self.model.blocks[1].register_forward_pre_hook(
            lambda _, inputs: (OutOfMemoryInBackward.apply(inputs[0]), *inputs[1:]))
        try:
            return self.model(spec, *draws)
        finally:
            hook.remove()


class OutOfMemoryInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def make_learner(failing=None, fits=None):
    """A learner in float64, and a dict that each step fills with its gradients by name."""
    torch.manual_seed(0)
    config = ASTConfig(3, dim=16, depth=2, heads=2, n_mels=32, time_patches=4, drop_path=0.3)
    model = AST(config).double().train()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 0.0, 0.0), lr=0.0)
    gradients = {}

    def record(*_):
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
    optimizer.register_step_pre_hook(record)
    augment = Augment(freq_mask=4, time_mask=4, mixup_alpha=0.4, mixup_p=1.0)
    learner = Learner(failing(model, fits) if failing else model, Through(), augment, DoubleFocal(),
                      optimizer, RelativeSchedule(optimizer, 0, 10), Precision(CPU, None, ""),
                      math.inf)
    return learner, gradients


def make_micro_batches():
    """Eight clips in micro-batches of 5 and 3."""
    generator = torch.Generator().manual_seed(1)
    wave = torch.randn(8, 32 * 40, dtype=torch.float64, generator=generator)
    return cut(wave, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), (5, 3))


# --- one step ---

@pytest.mark.parametrize("failing", [FailsInForward, FailsInBackward])
@pytest.mark.parametrize("fits, limit, n_attempts", [(4, 3, 1), (2, 2, 2), (1, 1, 3)])
def test_out_of_memory_splits_the_micro_batch_with_the_same_result(failing, fits, limit, n_attempts,
                                                                   capsys):
    learner, whole = make_learner()
    expected = train.train_step(learner, make_micro_batches(), 3)
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    learner, split = make_learner(failing, fits)
    result = train.train_step(learner, make_micro_batches(), 3)
    assert learner.splitter.limit == limit
    assert capsys.readouterr().out.count("out of memory") == n_attempts
    assert split.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(result.numbers, expected.numbers, atol=1e-6, rtol=1e-6)
    assert [row for rows, _ in result.losses for row in rows.tolist()] == list(range(8))
    train.train_step(learner, make_micro_batches(), 4)  # with the smaller size
    assert capsys.readouterr().out == ""


def test_control_gradients_of_the_failed_attempt_are_detected(monkeypatch):
    """A retry that does not start from zero."""
    learner, whole = make_learner()
    train.train_step(learner, make_micro_batches(), 3)
    learner, split = make_learner(FailsInBackward, 4)
    monkeypatch.setattr(learner.optimizer, "zero_grad", lambda set_to_none: None)
    train.train_step(learner, make_micro_batches(), 3)
    assert any(not torch.allclose(split[name], whole[name], atol=1e-6) for name in whole)


def test_errors_that_count_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)  # as the CPU's allocator puts it
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_slices_cover_every_clip_once():
    for n_clips in range(1, 9):
        for limit in (None, *range(1, 10)):
            slices = BatchSplitter(limit).slices(n_clips)
            clips = [i for part in slices for i in range(n_clips)[part]]
            assert clips == list(range(n_clips))
            assert all(part.stop - part.start <= (limit or n_clips) for part in slices)


# --- the largest batch ---

def test_largest_batch_that_fits_is_found():
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
    assert largest_batch([1, 2, 4, 8, 16, 32], attempt, CPU) == 8
    assert tried == [1, 2, 4, 8, 16]
    assert largest_batch([1, 2, 4], attempt, CPU) == 4
    with pytest.raises(ClipTooLargeError):
        largest_batch([10], attempt, CPU)


def test_other_errors_of_an_attempt_are_raised():
    def attempt(size):
        raise RuntimeError("other")
    with pytest.raises(RuntimeError, match="other"):
        largest_batch([1], attempt, CPU)


# --- whole runs ---

def limited_memory(fits):
    """-> prepare: training on more than `fits` clips at once needs too much memory."""
    def prepare(patch):
        real = AST.forward

        def forward(model, spec, *draws):
            if len(spec) > fits and model.training:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(model, spec, *draws)
        patch.setattr(AST, "forward", forward)
    return prepare


def test_single_clip_that_does_not_fit_ends_with_exit_3_and_names_a_flag(tones, tmp_path,
                                                                        monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, data=tones, prepare=limited_memory(0)) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--checkpointing" in error


def test_batch_size_auto_keeps_the_effective_batch(tones, tmp_path, monkeypatch):
    flags = ("--batch-size", "auto")
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=limited_memory(3)) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["flags"]["batch_size"] == 3
    assert checkpoint["flags"]["effective_batch"] == 6
    assert checkpoint["split_limit"] is None
    assert {row["clips"] for row in rows(tmp_path / "run" / "steps.csv")} == {"6", "3"}


def test_smaller_size_is_found_once_and_saved(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, data=tones, prepare=limited_memory(1)) == 0
    assert capsys.readouterr().out.count("out of memory") == 1
    assert load_checkpoint(tmp_path / "run" / "last.pt")["split_limit"] == 1
    assert outcome(tmp_path / "run")["schedule"]["steps"] == 12
