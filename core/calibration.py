"""How far scores can be believed: temperature, thresholds and the reliability of probabilities, fitted on validation.

Probabilities (n, C) here are softmax outputs, or their mean over a clip's tiles; each row adds up to 1. Where labels are (n, C)
of 0, 1 and nan (not known), as `core/metrics.py` has them, they are sigmoid outputs, each class for itself.
"""
import numpy as np

HOTTEST = 20.0  # bounds of the temperature, 1/20 to 20: beyond them scores are all alike, or all 0 and 1


def calibrate(scores, labels):
    """What a checkpoint keeps, from validation scores (n, C) and labels (n,) or (n, C): {"temperature": float,
    "thresholds": [float]}."""
    temperature = fit_temperature(scores, labels)
    tempered = temper(scores, temperature, multi_label=np.ndim(labels) == 2)
    return {"temperature": temperature, "thresholds": fit_thresholds(tempered, labels)}


def temper(scores, temperature, multi_label=False):
    """(n, C) probabilities at a temperature: softmax(log(p) / T), which is softmax(logits / T) for a single tile; or each for
    itself, sigmoid(logit(p) / T)."""
    from scipy.special import expit, softmax
    return expit(_logits(scores) / temperature) if multi_label else softmax(_logs(scores) / temperature, axis=1)


def _logs(scores):
    return np.log(np.maximum(scores, np.finfo(np.float32).tiny))


def _logits(scores):
    from scipy.special import logit
    return logit(np.clip(np.asarray(scores, np.float64), np.finfo(np.float32).tiny, 1 - 2.0**-53))


def fit_temperature(scores, labels):
    """The temperature with the least negative log-likelihood (C. Guo et al., "On Calibration of Modern Neural Networks",
    2017), between 1 / HOTTEST and HOTTEST; of (n, C) labels over all known pairs of clip and class. Of the labels a share of
    1 / (n + 2) is spread over all classes, or over yes and no (after J. Platt, "Probabilistic Outputs for Support Vector
    Machines", 1999): of n clips or pairs that are all right nobody should be surer than that."""
    from scipy.optimize import minimize_scalar
    labels = np.asarray(labels)
    if labels.ndim == 2:
        known = ~np.isnan(labels)
        logits = _logits(np.asarray(scores, np.float64)[known])
        logs, labels = np.stack([np.zeros_like(logits), logits], axis=1), labels[known].astype(int)  # no and yes, up to a constant
    else:
        logs = _logs(np.asarray(scores, np.float64))
    spread = 1 / (len(labels) + 2)
    logs -= logs.max(axis=1, keepdims=True)
    wanted = ((1 - spread) * logs[np.arange(len(labels)), labels] + spread * logs.mean(axis=1)).mean()

    def loss(log_temperature):
        temperature = np.exp(log_temperature)
        return np.log(np.exp(logs / temperature).sum(axis=1)).mean() - wanted / temperature
    bound = np.log(HOTTEST)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def fit_thresholds(scores, labels):
    """For each class the score from which a clip counts as of it, by the best F1 of one class against the rest: a list of C
    floats, half-way between two scores that were seen. A class without clips among the labels has 0.5."""
    found, labels = [], np.asarray(labels)
    for c in range(scores.shape[1]):
        order = np.argsort(-scores[:, c], kind="stable")
        if labels.ndim == 2:
            order = order[~np.isnan(labels[order, c])]
        own, ranked = (labels[order] == c if labels.ndim == 1 else labels[order, c] == 1), scores[order, c]
        if not own.any():
            found.append(0.5)
            continue
        f1 = 2 * np.cumsum(own) / (np.arange(1, len(own) + 1) + own.sum())
        f1[:-1][ranked[:-1] == ranked[1:]] = -1  # of equal scores all or none are above
        k = int(f1.argmax())
        below = ranked[k + 1] if k + 1 < len(ranked) else 0.0
        found.append(float((ranked[k] + below) / 2))
    return found


def reliability(scores, labels, bins=10):
    """Confidence against accuracy over `bins` equal bins of the highest score: a list of (mean confidence, accuracy, clips) of
    the bins that have clips, and the expected calibration error (M. Naeini et al., 2015): their mean distance by clips. Of
    (n, C) labels, every score against whether the clip holds the class, over all known pairs of clip and class."""
    labels = np.asarray(labels)
    if labels.ndim == 2:
        known = ~np.isnan(labels)
        confidence, right = scores[known], labels[known] == 1
    else:
        confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = [(float(confidence[which == b].mean()), float(right[which == b].mean()), int((which == b).sum()))
            for b in range(bins) if (which == b).any()]
    return rows, sum(abs(c - a) * n for c, a, n in rows) / len(confidence)
