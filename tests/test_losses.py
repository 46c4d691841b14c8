"""Losses against torch's own and against their formulas in float64."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses import (
    BCE,
    LOSSES,
    SIGMOID_LOSSES,
    CrossEntropy,
    FocalLoss,
    balanced_alpha,
    build_loss,
    soft_target,
)

torch.manual_seed(0)
LOGITS = torch.randn(6, 5) * 3
HARD = torch.tensor([0, 1, 2, 3, 4, 0])
SOFT = torch.rand(6, 5).softmax(1)


def test_focal_agrees_with_its_formula_in_float64():
    alpha = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    p = LOGITS.double().softmax(1)
    for target, soft in ((HARD, F.one_hot(HARD, 5).double()), (SOFT, SOFT.double())):
        expected = -(soft * alpha.double() * (1 - p) ** 2 * p.log()).sum(1)
        loss = FocalLoss(2.0, alpha)(LOGITS, target).double()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_focal_with_gamma_0_is_cross_entropy():
    for target in (HARD, SOFT):
        expected = F.cross_entropy(LOGITS, target, reduction="none")
        torch.testing.assert_close(FocalLoss(0.0)(LOGITS, target), expected)


def test_cross_entropy_with_smoothing_agrees_with_torch():
    for target in (HARD, SOFT):
        expected = F.cross_entropy(LOGITS, target, reduction="none", label_smoothing=0.1)
        torch.testing.assert_close(CrossEntropy(0.1)(LOGITS, target), expected)


def test_bce_takes_any_number_of_labels():
    target = torch.tensor([[1, 0, 1, 0, 0]] * 6)
    expected = F.binary_cross_entropy_with_logits(LOGITS, target.float(), reduction="none")
    torch.testing.assert_close(BCE()(LOGITS, target), expected.mean(1))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_fp16_logits_give_finite_losses_and_gradients(name):
    values = [[6e4, -6e4, 0.0], [-6e4, 6e4, 0.0], [0.0, 0.0, 0.0]]
    logits = torch.tensor(values, dtype=torch.float16, requires_grad=True)
    loss = build_loss(name)(logits, torch.tensor([0, 0, 1]))
    assert loss.dtype == torch.float32 and loss.shape == (3,) and torch.isfinite(loss).all()
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_focal_gradient_agrees_with_float64():
    logits = (LOGITS * 4).requires_grad_()
    FocalLoss(2.0)(logits, HARD).sum().backward()
    exact = (LOGITS * 4).double().requires_grad_()
    p = exact.softmax(1)[torch.arange(6), HARD]
    (-(1 - p) ** 2 * p.log()).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)


def test_balanced_alpha_agrees_with_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight
    labels = [0] * 7 + [1] * 2 + [2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    alpha = balanced_alpha([7, 2, 1]).double()
    torch.testing.assert_close(alpha, torch.tensor(expected), rtol=1e-6, atol=0)


def test_soft_target_of_class_indices():
    assert torch.equal(soft_target(torch.tensor([1]), 3), torch.tensor([[0.0, 1.0, 0.0]]))


def test_an_unknown_loss_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="focal, ce, bce or focal-bce"):
        build_loss("mse")


def test_a_loss_of_ones_own_needs_only_an_entry_in_the_table(monkeypatch):
    class Brier(torch.nn.Module):
        settings = ("gamma",)

        def __init__(self, gamma):
            super().__init__()
            self.gamma = gamma

        def forward(self, logits, target):
            return self.gamma * (logits.softmax(1) - soft_target(target, 5)).square().sum(1)

    monkeypatch.setitem(LOSSES, "brier", Brier)
    loss = build_loss("brier", gamma=3.0, alpha=0.5, tau=0.0, frequency=[1, 2, 3, 4, 5])
    assert loss.gamma == 3.0 and loss(LOGITS, HARD).shape == (6,)
    assert build_loss("brier", tau=1.0, frequency=[1, 2, 3, 4, 5])(LOGITS, HARD).shape == (6,)


def test_sigmoid_losses_are_those_that_take_unknown_labels():
    target = F.one_hot(HARD, 5).float()
    target[:, 4] = torch.nan
    finite = {name for name in LOSSES if build_loss(name)(LOGITS, target).isfinite().all()}
    assert finite == set(SIGMOID_LOSSES) == {"bce", "focal-bce"}


@pytest.mark.parametrize("name", ["focal", "ce"])
def test_logit_adjustment_agrees_with_its_formula(name):
    counts, tau = [70, 20, 9, 1, 0], 1.5
    loss = build_loss(name, tau=tau, frequency=counts)
    shift = tau * np.log(np.array([70, 20, 9, 1, 1]) / 101)
    expected = build_loss(name)(LOGITS + torch.tensor(shift).float(), HARD)
    torch.testing.assert_close(loss(LOGITS, HARD), expected)
    loss.eval()
    assert torch.equal(loss(LOGITS, HARD), build_loss(name)(LOGITS, HARD))
    with pytest.raises(ValueError, match="softmax"):
        build_loss("bce", tau=1.0, frequency=counts)


def test_logit_adjustment_removes_the_class_frequencies_from_the_optimum():
    """No features, classes 9 : 1. Cross-entropy learns their ratio; adjusted, it learns none."""
    target = torch.tensor([0] * 9 + [1])
    for tau, expected in ((0.0, np.log(9)), (1.0, 0.0)):
        bias = torch.zeros(2, requires_grad=True)
        loss = build_loss("ce", tau=tau, frequency=[9, 1])
        optimizer = torch.optim.LBFGS([bias], max_iter=50)

        def closure(bias=bias, loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(bias.expand(10, -1), target).mean()
            value.backward()
            return value
        optimizer.step(closure)
        assert (bias[0] - bias[1]).item() == pytest.approx(expected, abs=1e-2)
