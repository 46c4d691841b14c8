"""Losses against torch's own and against float64 formulas."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses import BCE, CrossEntropy, FocalLoss, balanced_alpha, build_loss, soft_target

torch.manual_seed(0)
LOGITS = torch.randn(6, 5) * 3
HARD = torch.tensor([0, 1, 2, 3, 4, 0])
SOFT = torch.rand(6, 5).softmax(1)


def test_focal_by_its_formula_in_float64():
    alpha = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    p = LOGITS.double().softmax(1)
    for target, soft in ((HARD, F.one_hot(HARD, 5).double()), (SOFT, SOFT.double())):
        expected = -(soft * alpha.double() * (1 - p) ** 2 * p.log()).sum(1)
        torch.testing.assert_close(FocalLoss(2.0, alpha)(LOGITS, target).double(), expected, rtol=1e-5, atol=1e-6)


def test_focal_with_gamma_0_is_cross_entropy():
    torch.testing.assert_close(FocalLoss(0.0)(LOGITS, HARD), F.cross_entropy(LOGITS, HARD, reduction="none"))
    torch.testing.assert_close(FocalLoss(0.0)(LOGITS, SOFT), F.cross_entropy(LOGITS, SOFT, reduction="none"))


def test_cross_entropy_is_torchs_with_smoothing():
    for target in (HARD, SOFT):
        torch.testing.assert_close(CrossEntropy(0.1)(LOGITS, target),
                                   F.cross_entropy(LOGITS, target, reduction="none", label_smoothing=0.1))


def test_bce_takes_any_number_of_labels():
    target = torch.tensor([[1, 0, 1, 0, 0]] * 6)
    expected = F.binary_cross_entropy_with_logits(LOGITS, target.float(), reduction="none").mean(1)
    torch.testing.assert_close(BCE()(LOGITS, target), expected)


@pytest.mark.parametrize("name", ["focal", "ce", "bce"])
def test_extreme_fp16_logits_stay_finite(name):
    logits = torch.tensor([[6e4, -6e4, 0.0], [-6e4, 6e4, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    loss = build_loss(name)(logits, torch.tensor([0, 0, 1]))
    assert loss.dtype == torch.float32 and loss.shape == (3,) and torch.isfinite(loss).all()
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_focal_gradient_against_float64():
    logits = (LOGITS * 4).requires_grad_()
    FocalLoss(2.0)(logits, HARD).sum().backward()
    exact = (LOGITS * 4).double().requires_grad_()
    p = exact.softmax(1)[torch.arange(6), HARD]
    (-(1 - p) ** 2 * p.log()).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)


def test_balanced_alpha_is_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight
    labels = [0] * 7 + [1] * 2 + [2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    torch.testing.assert_close(balanced_alpha([7, 2, 1]).double(), torch.tensor(expected), rtol=1e-6, atol=0)


def test_soft_target_and_unknown_names():
    assert torch.equal(soft_target(torch.tensor([1]), 3), torch.tensor([[0.0, 1.0, 0.0]]))
    with pytest.raises(ValueError, match="focal, ce, bce or focal-bce"):
        build_loss("mse")


@pytest.mark.parametrize("name", ["focal", "ce"])
def test_logit_adjustment_by_its_formula(name):
    counts, tau = [70, 20, 9, 1, 0], 1.5
    loss = build_loss(name, tau=tau, frequency=counts)
    shift = tau * np.log(np.array([70, 20, 9, 1, 1]) / 101)
    torch.testing.assert_close(loss(LOGITS, HARD), build_loss(name)(LOGITS + torch.tensor(shift).float(), HARD))
    loss.eval()
    assert torch.equal(loss(LOGITS, HARD), build_loss(name)(LOGITS, HARD))
    with pytest.raises(ValueError, match="softmax"):
        build_loss("bce", tau=1.0, frequency=counts)


def test_logit_adjustment_makes_the_best_scores_those_of_equal_classes():
    """One feature without any information, classes 9 : 1. Cross-entropy learns the frequencies, adjusted it learns none."""
    target = torch.tensor([0] * 9 + [1])
    for tau, want in ((0.0, np.log(9)), (1.0, 0.0)):
        bias = torch.zeros(2, requires_grad=True)
        loss = build_loss("ce", tau=tau, frequency=[9, 1])
        optimizer = torch.optim.LBFGS([bias], max_iter=50)

        def closure(bias=bias, loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(bias.expand(10, -1), target).mean()
            value.backward()
            return value
        optimizer.step(closure)
        assert (bias[0] - bias[1]).item() == pytest.approx(want, abs=1e-2)
