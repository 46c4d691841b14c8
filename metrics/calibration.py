"""Calibration: a temperature that makes scores match how often they are right, and thresholds.

Both are fitted on validation clips. Scores (n, C) are probabilities: of softmax (each row adds up
to 1) if labels are (n,) class indices, -1 for none; else of sigmoid, one class at a time (labels
(n, C) of 0, 1 and nan for unknown). A temperature of a softmax is fitted on clips with a label.

scipy is imported inside the functions: that takes a quarter of a second, which --help can save.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Temperatures from 1/20 to 20. Beyond them scores are all equal, or all 0 and 1.
MAX_TEMPERATURE = 20.0
SMALLEST = np.finfo(np.float32).tiny  # a probability of 0 has no logarithm


def calibrate(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None
) -> dict[str, Any]:
    """Fit what a checkpoint stores: {"temperature": float, "thresholds": [float] * C}.

    The temperature is 1 if fitted ones do not lower the loss of clips that they were not fitted on.
    groups: (n,) codes; clips of a group are then held out together.
    """
    temperature = fit_temperature(scores, labels)
    if not temperature_helps(scores, labels, groups):
        temperature = 1.0
    calibrated = apply_temperature(scores, temperature, sigmoid=np.ndim(labels) == 2)
    return {"temperature": temperature, "thresholds": fit_thresholds(calibrated, labels)}


def temperature_helps(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, n_folds: int = 5
) -> bool:
    """Whether temperatures lower the negative log-likelihood of folds they were not fitted on.

    False if there are fewer than two clips or groups. The folds are drawn with a fixed seed.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    group_of = np.arange(len(labels)) if groups is None else np.asarray(groups)
    codes, group_of = np.unique(group_of, return_inverse=True)
    n_folds = min(n_folds, len(codes))
    if n_folds < 2:
        return False
    fold_of = np.random.default_rng(0).permutation(len(codes))[group_of] % n_folds  # (n,)
    gain = 0.0
    for fold in range(n_folds):
        is_out = fold_of == fold
        logs, targets = _log_odds(scores[~is_out], labels[~is_out])
        if len(targets) == 0:  # nothing is known of these clips
            continue
        temperature = fit_temperature(scores[~is_out], labels[~is_out])
        logs, targets = _log_odds(scores[is_out], labels[is_out])
        gain += _loss(logs, targets, 1.0) - _loss(logs, targets, temperature)
    return bool(gain > 0)


def _loss(logs, targets, temperature):
    """Sum of the negative log-likelihood: logs (m, k), up to a constant per row; targets (m,)."""
    logs = logs / temperature
    logs = logs - logs.max(axis=1, keepdims=True)
    of_target = logs[np.arange(len(targets)), targets]
    return float((np.log(np.exp(logs).sum(axis=1)) - of_target).sum())


def check_calibration(calibration: Mapping[str, Any], n_classes: int) -> dict[str, Any]:
    """Check a stored calibration and return it as plain floats.

    Raises KeyError or TypeError if it is no calibration, ValueError if a value is out of range.
    """
    temperature, thresholds = calibration["temperature"], calibration["thresholds"]
    if not 1 / MAX_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError("the temperature of its calibration is out of range")
    if len(thresholds) != n_classes:
        raise ValueError(f"{len(thresholds)} thresholds for {n_classes} classes")
    if not all(0 <= value <= 1 for value in thresholds):
        raise ValueError("a threshold of its calibration is out of range")
    return {
        "temperature": float(temperature),
        "thresholds": [float(value) for value in thresholds],
    }


def predicted_classes(scores: ArrayLike, calibration: Mapping[str, Any]) -> np.ndarray:
    """Apply the temperature and the thresholds to scores (n, C) -> (n, C) bool.

    They are sigmoids unless the calibration has "sigmoid": False.
    """
    calibrated = apply_temperature(scores, calibration["temperature"],
                                   calibration.get("sigmoid", True))
    return calibrated >= calibration["thresholds"]


def apply_temperature(
    scores: ArrayLike, temperature: float, sigmoid: bool = False
) -> np.ndarray:
    """Divide the logits of probabilities (n, C) by a temperature -> probabilities (n, C).

    softmax(log(p) / T), which equals softmax(logits / T); sigmoid: sigmoid(logit(p) / T).
    """
    from scipy.special import expit, softmax

    if sigmoid:
        return expit(_logit(scores) / temperature)
    return softmax(_log(scores) / temperature, axis=1)


def _log(scores):
    return np.log(np.maximum(scores, SMALLEST))


def _logit(scores):
    from scipy.special import logit

    return logit(np.clip(np.asarray(scores, np.float64), SMALLEST, 1 - 2.0**-53))


def fit_temperature(scores: ArrayLike, labels: ArrayLike) -> float:
    """Find the temperature with the lowest negative log-likelihood, within its bounds.

    Source: C. Guo et al., "On Calibration of Modern Neural Networks", 2017. Multi-label: over all
    known pairs of clip and class.

    Labels are smoothed by 1 / (n + 2), after J. Platt, "Probabilistic Outputs for Support Vector
    Machines", 1999. Otherwise n clips that are all right would give a confidence of 1.
    """
    from scipy.optimize import minimize_scalar

    logs, labels = _log_odds(np.asarray(scores, np.float64), np.asarray(labels))
    smoothing = 1 / (len(labels) + 2)
    logs -= logs.max(axis=1, keepdims=True)
    of_label = logs[np.arange(len(labels)), labels]
    target = ((1 - smoothing) * of_label + smoothing * logs.mean(axis=1)).mean()

    def negative_log_likelihood(log_temperature):
        temperature = np.exp(log_temperature)
        normalizer = np.log(np.exp(logs / temperature).sum(axis=1)).mean()
        return normalizer - target / temperature

    bound = np.log(MAX_TEMPERATURE)
    best = minimize_scalar(negative_log_likelihood, bounds=(-bound, bound), method="bounded")
    return float(np.exp(best.x))


def _log_odds(scores, labels):
    """Log-probabilities up to a constant (m, k) and the index of the true one (m,).

    Multi-label: a row for each known pair of clip and class, with absent and present.
    """
    if labels.ndim == 1:
        has_label = labels >= 0
        return _log(scores[has_label]), labels[has_label]
    known = ~np.isnan(labels)
    logits = _logit(scores[known])
    return np.stack([np.zeros_like(logits), logits], axis=1), labels[known].astype(int)


def fit_thresholds(scores: ArrayLike, labels: ArrayLike) -> list[float]:
    """Find, for each class, the score threshold with the best F1 of that class against the rest.

    A threshold lies half-way between two scores that occur. A class without clips has 0.5.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    thresholds = []
    for c in range(scores.shape[1]):
        if labels.ndim == 2:
            known, is_positive = ~np.isnan(labels[:, c]), labels[:, c] == 1
            thresholds.append(_best_threshold(scores[known, c], is_positive[known]))
        else:
            thresholds.append(_best_threshold(scores[:, c], labels == c))
    return thresholds


def _best_threshold(scores, is_positive):
    """The threshold of one class: scores (n,), is_positive (n,) bool -> float."""
    if not is_positive.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    scores, is_positive = scores[order], is_positive[order]
    n_predicted = np.arange(1, len(scores) + 1)
    f1 = 2 * np.cumsum(is_positive) / (n_predicted + is_positive.sum())
    tied_with_next = scores[:-1] == scores[1:]
    f1[:-1][tied_with_next] = -1  # a threshold cannot separate equal scores
    last = int(f1.argmax())
    next_score = scores[last + 1] if last + 1 < len(scores) else 0.0
    return float((scores[last] + next_score) / 2)


def wilson(correct: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """95% interval (low, high) of a share (E. B. Wilson, 1927); (0, 1) for no clips."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, z * z
    middle = share + z2 / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    return max(0.0, float(low)), min(1.0, float(high))


class Bin(NamedTuple):
    """A bin of a reliability diagram."""

    confidence: float  # the mean
    accuracy: float
    n: int  # clips, or pairs of clip and class
    low: float  # 95% interval of the accuracy
    high: float


def reliability(scores: ArrayLike, labels: ArrayLike, bins: int = 10) -> tuple[list[Bin], float]:
    """Compare confidence with accuracy in `bins` equally filled bins of the highest score.

    Equal scores are in one bin, so that fewer bins may remain. Multi-label: compare each score with
    whether the clip contains the class, over all known pairs.

    Returns the bins and the expected calibration error (M. Naeini et al., 2015): the mean
    difference of confidence and accuracy, weighted by clips.
    """
    parts = _equally_filled(scores, labels, bins)
    rows = [Bin(float(confidence.mean()), float(is_correct.mean()), len(is_correct),
                *wilson(float(is_correct.sum()), len(is_correct)))
            for confidence, is_correct in parts]
    n = sum(row.n for row in rows)
    return rows, sum(abs(row.confidence - row.accuracy) * row.n for row in rows) / n


def error_by_chance(scores: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """The calibration error that perfectly calibrated scores stay below in 95% of samples.

    An error is never 0 with a finite number of clips. Source: J. Brocker and L. Smith, "Increasing
    the Reliability of Reliability Diagrams", 2007, with normal instead of binomial counts. Clips
    count as independent; those of one group are not, so the true limit is then higher.
    """
    parts = _equally_filled(scores, labels, bins)
    variance = np.array([(p * (1 - p)).sum() for p, _ in parts])  # of the number correct
    drawn = np.random.default_rng(0).standard_normal((4000, len(parts))) * np.sqrt(variance)
    n = sum(len(confidence) for confidence, _ in parts)
    return float(np.quantile(np.abs(drawn).sum(axis=1) / n, 0.95))


def _equally_filled(scores, labels, bins):
    """[(confidence (k,), is_correct (k,))] by rising confidence, equal confidences together."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if labels.ndim == 2:
        known = ~np.isnan(labels)
        confidence, is_correct = scores[known], labels[known] == 1
    else:
        confidence, is_correct = scores.max(axis=1), scores.argmax(axis=1) == labels
    order = np.argsort(confidence, kind="stable")
    confidence, is_correct = confidence[order], is_correct[order]
    n = len(confidence)
    ends = [n * (b + 1) // bins for b in range(bins)]
    ends = [int(np.searchsorted(confidence, confidence[end - 1], "right"))
            for end in ends if end > 0]
    ends = sorted(set(ends))
    return [(confidence[start:end], is_correct[start:end])
            for start, end in zip([0, *ends[:-1]], ends, strict=True)]
