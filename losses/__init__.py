"""Losses: (logits (B, C), target) -> (B,) float32, one value per clip.

target: class indices (B,) or soft labels (B, C). The sigmoid losses also take several labels per
clip, (B, C), with NaN for a class of which it is unknown whether the clip contains it. A clip that
contains none of the classes has zeros; a softmax loss then wants all classes to be equally likely.

All compute in float32 from log-softmax or log-sigmoid. So logits of any size, also in float16, give
finite values and gradients. None averages over clips: the caller divides the sum by the number of
clips in the optimizer step. To add a loss, write a class with `settings` and list it in `LOSSES`.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def soft_target(target: Tensor, n_classes: int) -> Tensor:
    """Class indices (B,) -> one-hot (B, C) float32. Soft labels (B, C) become float32."""
    if target.dim() == 1:
        return F.one_hot(target, n_classes).float()
    return target.float()


def softmax_target(target: Tensor, n_classes: int) -> Tensor:
    """As `soft_target`, for a softmax: what a target lacks to 1 is spread over all classes.

    So a clip of none of the classes has a uniform target, and one that is mixed with it a part of
    that. Source: A. R. Dhamija et al., "Reducing Network Agnostophobia", 2018.
    """
    target = soft_target(target, n_classes)
    missing = 1 - target.sum(dim=1, keepdim=True)
    missing = torch.where(missing > 1e-6, missing, 0.0)  # less is rounding
    return target + missing / n_classes


def is_correct(logits: Tensor, target: Tensor) -> Tensor:
    """Is the highest-scoring class one of the clip's labels? -> (B,) bool.

    logits (B, C), target class indices (B,) or labels (B, C). Unknown classes (NaN) are ignored.
    For a mixed clip, the labels of its larger part count. It is False for a clip without a label.
    """
    target = soft_target(target, logits.shape[1])
    predicted = logits.masked_fill(target.isnan(), -torch.inf).argmax(dim=1, keepdim=True)
    return target.gather(1, predicted)[:, 0] >= 0.5


def has_label(target: Tensor, n_classes: int) -> Tensor:
    """Whether `is_correct` can be true: (B,) bool. Arguments as there."""
    return (soft_target(target, n_classes) >= 0.5).any(dim=1)


class FocalLoss(nn.Module):
    """Sum over classes of target * alpha * (1 - p) ** gamma * -log p, with p = softmax(logits).

    T.-Y. Lin et al., "Focal Loss for Dense Object Detection", 2017, in its softmax form.
    alpha: None, one number for all classes, or class weights (C,).
    """
    settings = ("gamma", "alpha")

    def __init__(self, gamma: float = 2.0, alpha=None):
        super().__init__()
        self.gamma = gamma
        alpha = None if alpha is None else torch.as_tensor(alpha, dtype=torch.float32)
        self.register_buffer("alpha", alpha, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits.float(), dim=1)
        # 1 - p = exp(log(1 - p)) keeps its gradient even if p rounds to 1
        log_not_p = torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))
        loss = -torch.exp(self.gamma * log_not_p) * log_p
        if self.alpha is not None:
            loss = loss * self.alpha
        return (softmax_target(target, logits.shape[1]) * loss).sum(dim=1)


class CrossEntropy(nn.Module):
    """Softmax cross-entropy. `label_smoothing`: share of the target spread over all classes."""
    settings = ("label_smoothing",)

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        target = softmax_target(target, logits.shape[1])
        target = target * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[1]
        return -(target * F.log_softmax(logits.float(), dim=1)).sum(dim=1)


class BCE(nn.Module):
    """Binary cross-entropy, averaged over a clip's known classes (0 if it has none)."""
    settings = ()
    sigmoid = True

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        target = soft_target(target, logits.shape[1])
        known = target.nan_to_num()
        loss = F.binary_cross_entropy_with_logits(logits.float(), known, reduction="none")
        return mean_over_known(loss, target)


class FocalBCE(nn.Module):
    """Binary focal loss, averaged over a clip's known classes (0 if it has none).

    With p = sigmoid(logit), for each class: target * alpha * (1 - p) ** gamma * -log p
    + (1 - target) * (1 - alpha) * p ** gamma * -log(1 - p). T.-Y. Lin et al., "Focal Loss for Dense
    Object Detection", 2017; for hard labels, torchvision's sigmoid_focal_loss. It is linear in the
    target: a mixed clip has the weighted mean of its parts' losses. alpha: None for no weights, or
    0 to 1.
    """
    settings = ("gamma", "alpha")
    sigmoid = True

    def __init__(self, gamma: float = 2.0, alpha: float | None = None):
        super().__init__()
        if alpha is not None and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
            raise ValueError(f"alpha of focal-bce is {alpha!r:.40}; "
                             "use None or a number from 0 to 1")
        self.gamma = gamma
        self.positive_weight = 1.0 if alpha is None else alpha
        self.negative_weight = 1.0 if alpha is None else 1 - alpha

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        target = soft_target(target, logits.shape[1])
        log_p, log_not_p = F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())
        positive = -self.positive_weight * torch.exp(self.gamma * log_not_p) * log_p
        negative = -self.negative_weight * torch.exp(self.gamma * log_p) * log_not_p
        known = target.nan_to_num()
        return mean_over_known(known * positive + (1 - known) * negative, target)


def mean_over_known(loss: Tensor, target: Tensor) -> Tensor:
    """Average the losses (B, C) of each clip over the classes whose target is not NaN -> (B,)."""
    known = ~target.isnan()
    return torch.where(known, loss, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)


class LogitAdjusted(nn.Module):
    """A softmax loss on logits + tau * log(class frequency) in training, on plain logits otherwise.

    The model then learns to rank classes as if all were equally frequent (A. K. Menon et al.,
    "Long-tail learning via logit adjustment", 2021). frequency: (C,), clips per class; a class
    without clips counts as one with a single clip.
    """

    def __init__(self, loss: nn.Module, tau: float, frequency):
        super().__init__()
        self.loss = loss
        frequency = torch.as_tensor(frequency, dtype=torch.float64).clamp(min=1)
        shift = (tau * (frequency / frequency.sum()).log()).float()
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.training:
            logits = logits.float() + self.shift
        return self.loss(logits, target)


# A class's `settings` are the arguments of `build_loss` that it takes.
LOSSES = {"focal": FocalLoss, "ce": CrossEntropy, "bce": BCE, "focal-bce": FocalBCE}

# Losses that treat each class on its own, so they take several and unknown labels per clip.
SIGMOID_LOSSES = tuple(name for name, loss in LOSSES.items() if getattr(loss, "sigmoid", False))


def build_loss(name: str, gamma: float = 2.0, alpha=None, label_smoothing: float = 0.0,
               tau: float = 0.0, frequency=None) -> nn.Module:
    """Build the loss `name` of LOSSES with those settings that it takes.

    alpha: None, a number or, for focal alone, class weights (C,). tau: strength of the logit
    adjustment to the class frequencies (C,); 0 for none. Raises ValueError if settings do not fit.
    """
    if name not in LOSSES:
        *others, last = LOSSES
        raise ValueError(f"loss {name!r}: use {', '.join(others)} or {last}")
    settings = {"gamma": gamma, "alpha": alpha, "label_smoothing": label_smoothing}
    loss = LOSSES[name](**{setting: settings[setting] for setting in LOSSES[name].settings})
    if not tau:
        return loss
    if name in SIGMOID_LOSSES:
        raise ValueError("logit adjustment needs a softmax loss; use focal or ce")
    return LogitAdjusted(loss, tau, frequency)


def balanced_alpha(counts) -> Tensor:
    """Class weights (C,) inversely proportional to the class counts, with mean 1 over the clips.

    scikit-learn's "balanced": n / (C * count).
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()
