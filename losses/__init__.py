"""Losses: (logits (B, C), target) -> (B,) float32, one value per clip.

target is class indices (B,) or soft labels (B, C); for the sigmoid losses also labels (B, C) of clips that hold several
classes, with NaN where it is not known whether a clip holds the class. Everything is computed in float32 from log-softmax or
log-sigmoid, so logits of any size, in fp16 too, give finite values and gradients. Nothing is averaged
here: the caller divides by the clips of the whole accumulation window.
"""
import torch
import torch.nn.functional as F
from torch import nn

SIGMOID = ("bce", "focal-bce")  # losses that take each class for itself, and so several or unknown labels of a clip


def soft_target(target, n_classes):
    """Class indices (B,) -> one-hot (B, C) float32; soft labels pass through in float32."""
    if target.dim() == 1:
        return F.one_hot(target, n_classes).float()
    return target.float()


def hits(logits, target):
    """Whether the highest of a clip's classes, the unknown ones left out, is one of its labels: logits (B, C), target class
    indices (B,) or labels (B, C), of a mixed clip those of its larger part -> (B,) bool."""
    target = soft_target(target, logits.shape[1])
    best = logits.masked_fill(target.isnan(), -torch.inf).argmax(dim=1, keepdim=True)
    return target.gather(1, best)[:, 0] >= 0.5


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
    """Binary cross-entropy with logits, averaged over a clip's known classes (0 where it has none)."""

    def forward(self, logits, target):
        target = soft_target(target, logits.shape[1])
        loss = F.binary_cross_entropy_with_logits(logits.float(), target.nan_to_num(), reduction="none")
        return known_mean(loss, target)


class FocalBCE(nn.Module):
    """Binary focal loss averaged over a clip's known classes: target * alpha * (1 - p) ** gamma * -log p
    + (1 - target) * (1 - alpha) * p ** gamma * -log(1 - p) with p = sigmoid(logit).

    T.-Y. Lin et al., "Focal Loss for Dense Object Detection", 2017; for hard labels torchvision's sigmoid_focal_loss. Linear
    in the target, so that a mixed clip has the mean of its parts' losses. alpha: None for no weights, or 0 to 1.
    """

    def __init__(self, gamma=2.0, alpha=None):
        super().__init__()
        if alpha is not None and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
            raise ValueError(f"alpha of focal-bce is {alpha!r:.40}: None, or a number from 0 to 1")
        self.gamma = gamma
        self.present, self.absent = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)

    def forward(self, logits, target):
        target = soft_target(target, logits.shape[1])
        log_p, log_not_p = F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())
        positive = -self.present * torch.exp(self.gamma * log_not_p) * log_p
        negative = -self.absent * torch.exp(self.gamma * log_p) * log_not_p
        share = target.nan_to_num()
        return known_mean(share * positive + (1 - share) * negative, target)


def known_mean(loss, target):
    """(B, C) -> (B,): the mean of each clip's losses over the classes whose target is not NaN."""
    known = ~target.isnan()
    return torch.where(known, loss, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)


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
    """The loss that the flags name. alpha: None, a number or, for focal alone, (C,) class weights; tau: strength of the logit
    adjustment to the class frequencies (C,), 0 for none."""
    if name in SIGMOID:
        if tau:
            raise ValueError("logit adjustment belongs to a softmax loss; use focal or ce")
        return BCE() if name == "bce" else FocalBCE(gamma, alpha)
    if name not in ("focal", "ce"):
        raise ValueError(f"loss {name!r}: focal, ce, bce or focal-bce")
    loss = FocalLoss(gamma, alpha) if name == "focal" else CrossEntropy(label_smoothing)
    return Adjusted(loss, tau, frequency) if tau else loss
