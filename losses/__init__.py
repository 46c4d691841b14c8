"""Losses: (logits (B, C), target) -> (B,) float32, one value per clip.

target is class indices (B,) or soft labels (B, C). Everything is computed in float32 from log-softmax or
log-sigmoid, so logits of any size, in fp16 too, give finite values and gradients. Nothing is averaged
here: the caller divides by the clips of the whole accumulation window.
"""
import torch
import torch.nn.functional as F
from torch import nn


def soft_target(target, n_classes):
    """Class indices (B,) -> one-hot (B, C) float32; soft labels pass through in float32."""
    if target.dim() == 1:
        return F.one_hot(target, n_classes).float()
    return target.float()


class FocalLoss(nn.Module):
    """sum over classes of target * alpha * (1 - p) ** gamma * -log p.

    T.-Y. Lin et al., "Focal Loss for Dense Object Detection", 2017, in its softmax form. alpha: None, one
    number for all classes, or a (C,) tensor of class weights.
    """

    def __init__(self, gamma=2.0, alpha=None):
        super().__init__()
        self.gamma = gamma
        alpha = None if alpha is None else torch.as_tensor(alpha, dtype=torch.float32)
        self.register_buffer("alpha", alpha, persistent=False)

    def forward(self, logits, target):
        log_p = F.log_softmax(logits.float(), dim=1)
        # 1 - p as exp(log(1 - p)) keeps its gradient where p rounds to 1
        log_not_p = torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))
        loss = -torch.exp(self.gamma * log_not_p) * log_p
        if self.alpha is not None:
            loss = loss * self.alpha
        return (soft_target(target, logits.shape[1]) * loss).sum(dim=1)


class CrossEntropy(nn.Module):
    """Softmax cross-entropy; label smoothing spreads that share of the target evenly over all classes."""

    def __init__(self, label_smoothing=0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits, target):
        target = soft_target(target, logits.shape[1])
        target = target * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[1]
        return -(target * F.log_softmax(logits.float(), dim=1)).sum(dim=1)


class BCE(nn.Module):
    """Binary cross-entropy with logits, averaged over classes, for clips with any number of labels."""

    def forward(self, logits, target):
        target = soft_target(target, logits.shape[1])
        return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(dim=1)


def balanced_alpha(counts):
    """Class weights (C,) inversely proportional to the class counts, averaging 1 over the clips
    (scikit-learn's "balanced": n / (C * count))."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()


class Adjusted(nn.Module):
    """A softmax loss on logits + tau * log(class frequency) in training, and on the logits alone in evaluation: what the
    model learns then ranks classes as if all were equally frequent (A. K. Menon et al., "Long-tail learning via logit
    adjustment", 2021). frequency: (C,), any scale; a class without clips counts as one with a single clip.
    """

    def __init__(self, loss, tau, frequency):
        super().__init__()
        self.loss = loss
        frequency = torch.as_tensor(frequency, dtype=torch.float64).clamp(min=1)
        self.register_buffer("shift", (tau * (frequency / frequency.sum()).log()).float(), persistent=False)

    def forward(self, logits, target):
        return self.loss(logits.float() + self.shift if self.training else logits, target)


def build_loss(name, gamma=2.0, alpha=None, label_smoothing=0.0, tau=0.0, frequency=None):
    """The loss that the flags name. alpha: None, a number or (C,) class weights; tau: strength of the logit adjustment to
    the class frequencies (C,), 0 for none."""
    if name == "bce":
        if tau:
            raise ValueError("logit adjustment belongs to a softmax loss; use focal or ce")
        return BCE()
    if name not in ("focal", "ce"):
        raise ValueError(f"loss {name!r}: focal, ce or bce")
    loss = FocalLoss(gamma, alpha) if name == "focal" else CrossEntropy(label_smoothing)
    return Adjusted(loss, tau, frequency) if tau else loss
