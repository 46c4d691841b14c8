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


def build_loss(name, gamma=2.0, alpha=None, label_smoothing=0.0, class_counts=None):
    """The loss that the flags name; alpha is None, a number or "balanced" (needs class_counts (C,))."""
    if name == "focal":
        return FocalLoss(gamma, balanced_alpha(class_counts) if alpha == "balanced" else alpha)
    if name == "ce":
        return CrossEntropy(label_smoothing)
    if name == "bce":
        return BCE()
    raise ValueError(f"loss {name!r}: focal, ce or bce")
