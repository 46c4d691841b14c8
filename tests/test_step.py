"""One optimizer step: its gradients against float64, and what a step that is not finite changes."""
import numpy as np
import pytest
import torch
from float64 import DoubleFocal, Through, cut

import train
from core.device.precision import Precision
from core.learner import Learner
from data.augment import Augment
from data.clips import Batch
from data.sampling import epoch_order, epoch_steps
from losses import FocalLoss
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.groups import parameter_groups
from sched import RelativeSchedule

CPU = torch.device("cpu")


def step_gradients(sizes, patchout=0.0):
    """Gradients of one train_step in float64 over the same 8 clips, in micro-batches of `sizes`."""
    torch.manual_seed(0)
    config = ASTConfig(3, dim=16, depth=2, heads=2, n_mels=32, time_patches=4, drop_path=0.3)
    model = AST(config).double().train()
    wave = torch.randn(8, 32 * 40, dtype=torch.float64)
    micro_batches = cut(wave, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), sizes)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 0.0, 0.0), lr=0.0)
    gradients = {}

    def record(*_):
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
    optimizer.register_step_pre_hook(record)
    augment = Augment(freq_mask=4, time_mask=4, specaug_p=1.0)
    learner = Learner(model, Through(), augment, DoubleFocal(), optimizer,
                      RelativeSchedule(optimizer, 0, 10), Precision(CPU, None, ""),
                      patchout=patchout)
    train.train_step(learner, micro_batches, epoch=3)
    return gradients


@pytest.mark.parametrize("patchout", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 3, 2), (1,) * 8, (5, 2, 1)])
def test_accumulation_gives_the_gradients_of_one_large_batch(sizes, patchout):
    whole, accumulated = step_gradients((8,), patchout), step_gradients(sizes, patchout)
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    assert accumulated.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(accumulated[name], whole[name], atol=1e-10, rtol=1e-10)


def test_control_mean_over_a_micro_batch_gives_other_gradients():
    whole = step_gradients((8,))
    for size in (3, 2):
        wrong = step_gradients((size,))
        assert any(not torch.allclose(wrong[name], whole[name], atol=1e-6) for name in whole)


def test_step_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    model = AST(ASTConfig(3, dim=16, depth=1, heads=2))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-2, 0.1), fused=True)
    schedule = RelativeSchedule(optimizer, 3, 10)
    learner = Learner(model, build_frontend(FrontendConfig()), Augment(), FocalLoss(), optimizer,
                      schedule, Precision(CPU, None, ""), clip_grad=1.0)
    target = torch.tensor([0, 1])
    good = Batch(torch.randn(2, 22050), target, np.arange(2), [])
    bad = Batch(torch.full((2, 22050), float("nan")), target, np.arange(2), [])

    def state():
        weights = [p.detach().clone() for p in model.parameters()]
        return weights + [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]

    train.train_step(learner, [good], 0)
    before = state()
    assert train.train_step(learner, [good, bad], 0).read().applied == 0
    assert schedule.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))

    assert train.train_step(learner, [good], 0).read().applied == 1
    assert schedule.steps == 2
    assert not torch.equal(before[0], state()[0])


def test_steps_of_an_epoch_have_every_clip_once_and_only_the_last_is_smaller():
    order = epoch_order(np.arange(100, 123), seed=0, epoch=4)
    assert sorted(order) == list(range(100, 123))
    assert order.tolist() != epoch_order(np.arange(100, 123), 0, 5).tolist()
    steps = epoch_steps(order, 4, 8)
    assert [[len(clip_ids) for clip_ids in step] for step in steps] == [[4, 4], [4, 4], [4, 3]]
    assert [row for step in steps for clip_ids in step for row in clip_ids] == order.tolist()
