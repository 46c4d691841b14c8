"""The schedule, always with unequal rates: equal ones would hide one rate for all groups."""
import math

import pytest
import torch

from sched import SHAPES, RelativeSchedule, lr_factor


def optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (5e-5, 1e-3)]
    return torch.optim.SGD(groups)


def rates(schedule):
    return [float(group["lr"]) for group in schedule.optimizer.param_groups]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
def test_ratio_between_groups_is_the_same_at_every_step(shape, warmup):
    opt = optimizer()
    schedule = RelativeSchedule(opt, warmup, 50, shape, min_ratio=0.01)
    for _ in range(60):
        low, high = (group["lr"] for group in opt.param_groups)
        assert high == pytest.approx(20 * low, rel=1e-12) and high > 0
        schedule.step()


def test_control_one_rate_for_all_groups_is_detected():
    opt = optimizer()
    schedule = RelativeSchedule(opt, 5, 50)
    schedule._write = lambda: [group.update(lr=1e-3) for group in opt.param_groups]
    schedule.step()
    with pytest.raises(AssertionError):
        low, high = (group["lr"] for group in opt.param_groups)
        assert high == pytest.approx(20 * low)


def test_warmup_reaches_the_base_rate_and_never_exceeds_it():
    factors = [lr_factor(step, 5, 50) for step in range(50)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert max(factors) == 1.0
    assert lr_factor(0, 0, 50) == 1.0


def test_cosine_agrees_with_torch():
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
    factors = [lr_factor(step, 10, 100, "wsd") for step in (10, 79, 80, 90, 100)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0])
    assert lr_factor(10**6, 10, 100, "cosine", 0.1) == pytest.approx(0.1)


def test_state_is_the_step():
    first, second = (RelativeSchedule(optimizer(), 5, 50) for _ in range(2))
    for _ in range(13):
        first.step()
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == {"steps": 13, "scale": 1.0}
    assert rates(second) == rates(first)
    assert rates(first)[0] == 5e-5 * 0.5 * (1 + math.cos(math.pi * 8 / 45))


def test_on_a_device_only_steps_that_happened_count():
    plain = RelativeSchedule(optimizer(), 5, 50, "wsd", 0.1)
    tensors = RelativeSchedule(optimizer(), 5, 50, "wsd", 0.1, device="cpu")
    for i in range(60):
        plain.step(i % 3 != 1)
        tensors.step(torch.tensor(i % 3 != 1))
        assert rates(tensors) == pytest.approx(rates(plain), rel=1e-6)
    assert plain.state_dict() == tensors.state_dict() == {"steps": 40, "scale": 1.0}
    for schedule in (plain, tensors):
        schedule.rescale(0.5)
        schedule.load_state_dict({"steps": 7, "scale": 0.25})
        schedule.step(torch.tensor(True))
        assert schedule.state_dict() == {"steps": 8, "scale": 0.25}
    assert rates(tensors) == pytest.approx(rates(plain), rel=1e-6)
    assert rates(plain)[0] == 0.25 * 5e-5


def test_a_shape_of_ones_own_needs_only_an_entry_in_the_table(monkeypatch):
    monkeypatch.setitem(SHAPES, "halves", lambda step, warmup_steps, total_steps: 0.5)
    schedule = RelativeSchedule(optimizer(), 0, 50, "halves")
    assert rates(schedule) == [2.5e-5, 5e-4]


def test_unknown_shapes_and_too_long_warmups_are_refused():
    with pytest.raises(ValueError, match="cosine, linear"):
        RelativeSchedule(optimizer(), 0, 50, "cosinus")
    with pytest.raises(ValueError, match="warm-up of 60"):
        RelativeSchedule(optimizer(), 60, 50)
