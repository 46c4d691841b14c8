"""The schedule, with unequal LRs throughout: equal ones would hide the fault that it guards against."""
import math

import pytest
import torch

from sched import SHAPES, RelativeSchedule, lr_factor


def optimizer(lrs=(5e-5, 1e-3)):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
def test_ratio_between_groups_is_the_same_at_every_step(shape, warmup):
    opt = optimizer()
    schedule = RelativeSchedule(opt, warmup, 50, shape, min_ratio=0.01)
    for _ in range(60):
        low, high = (group["lr"] for group in opt.param_groups)
        assert high == pytest.approx(20 * low, rel=1e-12) and high > 0
        schedule.step()


def test_one_lr_for_all_groups_would_be_seen():
    opt = optimizer()
    schedule = RelativeSchedule(opt, 5, 50)
    schedule._write = lambda: [group.update(lr=1e-3) for group in opt.param_groups]  # the earlier system's fault
    schedule.step()
    with pytest.raises(AssertionError):
        low, high = (group["lr"] for group in opt.param_groups)
        assert high == pytest.approx(20 * low)


def test_warmup_reaches_the_base_and_never_passes_it():
    factors = [lr_factor(step, 5, 50) for step in range(50)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert max(factors) == 1.0
    assert lr_factor(0, 0, 50) == 1.0


def test_cosine_is_torchs():
    opt = optimizer()
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 40)
    for step in range(40):
        assert opt.param_groups[0]["lr"] == pytest.approx(5e-5 * lr_factor(step, 0, 40), rel=1e-9)
        opt.step()
        theirs.step()


def test_shapes_at_their_ends():
    assert lr_factor(100, 10, 100, "cosine", 0.1) == pytest.approx(0.1)
    assert lr_factor(100, 10, 100, "linear", 0.1) == pytest.approx(0.1)
    assert lr_factor(55, 10, 100, "linear") == pytest.approx(0.5)
    assert lr_factor(99, 10, 100, "constant", 0.1) == 1.0
    assert [lr_factor(s, 10, 100, "wsd") for s in (10, 79, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.5, 0])
    assert lr_factor(10**6, 10, 100, "cosine", 0.1) == pytest.approx(0.1)


def test_state_is_the_step():
    first, second = (RelativeSchedule(optimizer(), 5, 50) for _ in range(2))
    for _ in range(13):
        first.step()
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == {"steps": 13, "scale": 1.0}
    assert [g["lr"] for g in second.optimizer.param_groups] == [g["lr"] for g in first.optimizer.param_groups]
    assert first.optimizer.param_groups[0]["lr"] == 5e-5 * 0.5 * (1 + math.cos(math.pi * 8 / 45))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="cosine, linear"):
        RelativeSchedule(optimizer(), 0, 50, "cosinus")
    with pytest.raises(ValueError, match="warm-up of 60"):
        RelativeSchedule(optimizer(), 60, 50)
