"""Calibration: a temperature that makes scores match how often they are right, and thresholds.

Both are fitted on validation clips. Scores (n, C) are probabilities: of softmax (each row adds up
to 1) if each clip has one label (labels (n,)), else of sigmoid, one class at a time (labels (n, C)
of 0, 1 and nan for unknown).

scipy is imported inside the functions: that takes a quarter of a second, which --help can save.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Temperatures from 1/20 to 20. Beyond them scores are all equal, or all 0 and 1.
MAX_TEMPERATURE = 20.0
SMALLEST = np.finfo(np.float32).tiny  # a probability of 0 has no logarithm


def calibrate(scores: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
    """Fit what a checkpoint stores: {"temperature": float, "thresholds": [float] * C}."""
    temperature = fit_temperature(scores, labels)
    calibrated = apply_temperature(scores, temperature, multi_label=np.ndim(labels) == 2)
    return {"temperature": temperature, "thresholds": fit_thresholds(calibrated, labels)}


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
    """Apply the temperature and the thresholds to sigmoid scores (n, C) -> (n, C) bool."""
    calibrated = apply_temperature(scores, calibration["temperature"], multi_label=True)
    return calibrated >= calibration["thresholds"]


def apply_temperature(
    scores: ArrayLike, temperature: float, multi_label: bool = False
) -> np.ndarray:
    """Divide the logits of probabilities (n, C) by a temperature -> probabilities (n, C).

    softmax(log(p) / T), which equals softmax(logits / T); multi-label: sigmoid(logit(p) / T).
    """
    from scipy.special import expit, softmax

    if multi_label:
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

    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if labels.ndim == 2:
        known = ~np.isnan(labels)
        logits = _logit(scores[known])
        logs = np.stack([np.zeros_like(logits), logits], axis=1)  # absent, present: (pairs, 2)
        labels = labels[known].astype(int)
    else:
        logs = _log(scores)
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


def reliability(
    scores: ArrayLike, labels: ArrayLike, bins: int = 10
) -> tuple[list[tuple[float, float, int]], float]:
    """Compare confidence with accuracy in `bins` equal bins of the highest score.

    Multi-label: compare each score with whether the clip contains the class, over all known pairs.

    Returns [(mean confidence, accuracy, number of clips)] of the bins that are not empty, and the
    expected calibration error (M. Naeini et al., 2015): the mean difference, weighted by clips.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if labels.ndim == 2:
        known = ~np.isnan(labels)
        confidence, is_correct = scores[known], labels[known] == 1
    else:
        confidence, is_correct = scores.max(axis=1), scores.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        inside = bin_of == b
        if inside.any():
            rows.append((
                float(confidence[inside].mean()), float(is_correct[inside].mean()),
                int(inside.sum())))
    error = sum(abs(mean - accuracy) * n for mean, accuracy, n in rows) / len(confidence)
    return rows, error
