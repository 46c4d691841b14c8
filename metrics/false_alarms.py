"""False alarms: how often a detector fires in audio that contains none of its classes.

Conventions of all functions here:

* `scores` are (n, C). A class is an alarm in a window if its score is at least its threshold.
* `hours` is the length of each window in hours: (n,), or one number if all are alike. If windows
  overlap, it is the hop, so that the sum is the length of the audio.
* `top_k`: only the k highest-scoring classes of a window can be alarms, the first ones on a tie.
  1 fits models that give one label per window; None allows all classes.
* Results are plain Python numbers, ready for JSON.

scipy is imported inside the functions: that takes a quarter of a second, which --help can save.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

ROUNDING = 1e-9  # relative: 1200 windows of 3 / 3600 h are 0.99999999999998 h


def false_alarms(
    scores: ArrayLike,
    thresholds: ArrayLike,
    hours: ArrayLike,
    groups: ArrayLike,
    top_k: int | None = None,
) -> dict[str, Any]:
    """Count false alarms per hour with 95% intervals, on windows without any of the classes.

    scores: (n, C) calibrated scores. thresholds: (C,). groups: (n,) codes of the recordings.
    "per_hour" counts windows with at least one alarm; "per_class" counts the windows of each class.

    The interval is the exact Poisson interval of F. Garwood, 1936, widened if the recordings
    differ by more than chance (see `_dispersion`). So zero alarms have a positive upper bound,
    3.7 / hours. With one recording the interval takes its windows as independent.

    In simulations the interval contains the true rate in 96% to 99% of trials if it is the same in
    all of 6 to 30 recordings. It does in 95% (93% to 99%) if the rates vary as much as their mean
    (gamma, shape 1), and in 94% (90% to 99%) if they vary by 1.4 times their mean. It is too narrow
    (90%, 81% to 99%) if a few recordings have nearly all alarms (2.2 times their mean).

    Returns {"hours", "recordings", "windows_with_alarm", "per_hour", "per_hour_ci95": [low, high],
    "interval_over": "recordings" or "windows", "per_class": [{"count", "per_hour",
    "per_hour_ci95"}] in class order}. Raises ValueError if shapes do not fit, there are no windows,
    a score is not finite, or a length is not positive.
    """
    is_alarm = reported_classes(scores, thresholds, top_k)
    hours = _check_hours(hours, len(is_alarm))
    groups = np.asarray(groups)
    if groups.shape != hours.shape:
        raise ValueError(f"groups {groups.shape} for {len(is_alarm)} windows")
    codes, group_of = np.unique(groups, return_inverse=True)
    hours_of_group = np.bincount(group_of, weights=hours)
    any_alarm = is_alarm.any(axis=1, keepdims=True)
    total = _rates(any_alarm, group_of, hours_of_group)[0]
    return {
        "hours": float(math.fsum(hours)),
        "recordings": len(codes),
        "windows_with_alarm": total["count"],
        "per_hour": total["per_hour"],
        "per_hour_ci95": total["per_hour_ci95"],
        "interval_over": "recordings" if len(codes) > 1 else "windows",
        "per_class": _rates(is_alarm, group_of, hours_of_group),
    }


def reported_classes(
    scores: ArrayLike, thresholds: ArrayLike, top_k: int | None = None
) -> np.ndarray:
    """The classes that are reported in each window, those that `false_alarms` counts: (n, C) bool.

    scores: (n, C) calibrated scores. thresholds: (C,).
    """
    scores = _only_top(_check_scores(scores, "scores"), top_k)
    return scores >= _check_thresholds(thresholds, scores)


def _rates(is_alarm, group_of, hours_of_group):
    """Counts, rates and intervals of each column of is_alarm (n, C) -> C dicts."""
    hours = math.fsum(hours_of_group)
    counts = is_alarm.sum(axis=0)
    low, high = poisson_interval(counts, _dispersion(is_alarm, group_of, hours_of_group))
    return [
        {"count": int(count), "per_hour": float(count / hours),
         "per_hour_ci95": [float(lowest / hours), float(highest / hours)]}
        for count, lowest, highest in zip(counts, low, high, strict=True)
    ]


def _dispersion(is_alarm, group_of, hours_of_group):
    """How many times the variance of each column's counts exceeds that of a Poisson: (C,) >= 1.

    Pearson's estimate over the recordings, for the same rate in all of them. It is uncertain with
    few recordings, so it is raised by (t / z)^2, the quantiles of Student's t and the normal. It is
    at most the count: then all alarms are one event.
    """
    from scipy.special import ndtri, stdtrit

    n_groups, counts = len(hours_of_group), is_alarm.sum(axis=0)
    if n_groups == 1:
        return np.ones(len(counts))
    window, column = np.nonzero(is_alarm)
    pairs, of_pair = np.unique(
        column.astype(np.int64) * n_groups + group_of[window], return_counts=True)
    # The sum of (count - expected)^2 / expected, where expected = total count * share of hours.
    squares = of_pair.astype(np.float64) ** 2 / hours_of_group[pairs % n_groups]
    squares = np.bincount(pairs // n_groups, weights=squares, minlength=len(counts))
    pearson = hours_of_group.sum() * squares / np.maximum(counts, 1) - counts
    correction = (stdtrit(n_groups - 1, 0.975) / ndtri(0.975)) ** 2
    return np.clip(pearson / (n_groups - 1) * correction, 1, np.maximum(counts, 1))


def poisson_interval(
    counts: ArrayLike, dispersion: ArrayLike = 1.0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Exact interval of the expected counts -> (low, high), F. Garwood, 1936.

    dispersion: variance divided by mean; the interval of count / dispersion is scaled by it.
    """
    from scipy.special import gammaincinv

    events = np.asarray(counts, np.float64) / dispersion
    tail = (1 - level) / 2
    low = np.where(events > 0, gammaincinv(np.where(events > 0, events, 1), tail), 0)
    return low * dispersion, gammaincinv(events + 1, 1 - tail) * dispersion


def recall_at(
    scores: ArrayLike,
    labels: ArrayLike,
    negative_scores: ArrayLike,
    hours: ArrayLike,
    rates: Sequence[float] = (0.1, 1, 10),
    top_k: int | None = None,
) -> dict[str, Any]:
    """Compute the recall of each class at given false alarms per hour.

    scores: (n, C) of clips with classes; labels: (n,) class indices, or (n, C) of 1, 0 and nan.
    negative_scores: (m, C) of windows without any class; hours: theirs.

    The threshold of a class is the lowest one at which its alarms on the negatives are at most
    rate * hours. Each class is allowed that rate. "recall" is the mean over classes with clips.

    A rate is None if hours < 1 / rate: the audio is too short to tell such a rate from none.

    Returns {"hours", "at": [{"per_hour", "allowed": alarms, "recall", "per_class": [recall],
    "thresholds": [C]}]} in the order of `rates`. Recall of a class without clips is None.
    Raises ValueError as `false_alarms`.
    """
    scores, positives, negatives, hours = _check_sides(
        scores, labels, negative_scores, hours, top_k)
    total = math.fsum(hours)
    ordered = -np.sort(-negatives, axis=0)  # (m, C), highest first
    results = []
    for rate in rates:
        allowed = math.floor(rate * total * (1 + ROUNDING))
        if allowed < 1:
            results.append({"per_hour": rate, "allowed": 0, "recall": None, "per_class": None,
                            "thresholds": None})
            continue
        thresholds = _lowest_score(scores, negatives)
        if allowed < len(ordered):
            just_above = np.nextafter(ordered[allowed], np.inf, dtype=ordered.dtype)
            thresholds = np.where(np.isfinite(ordered[allowed]), just_above, thresholds)
        per_class = _recall(scores, positives, thresholds)
        defined = [value for value in per_class if value is not None]
        results.append({
            "per_hour": rate,
            "allowed": allowed,
            "recall": float(np.mean(defined)) if defined else None,
            "per_class": per_class,
            "thresholds": thresholds.tolist(),
        })
    return {"hours": float(total), "at": results}


def _lowest_score(scores, negatives):
    """The lowest finite score of each class, in the dtype of the scores; 0 if there is none."""
    lowest = np.minimum(scores.min(axis=0, where=np.isfinite(scores), initial=np.inf),
                        negatives.min(axis=0, where=np.isfinite(negatives), initial=np.inf))
    return np.where(np.isfinite(lowest), lowest, 0).astype(scores.dtype)


def _recall(scores, positives, thresholds):
    """Share of each class's clips with at least its threshold; None without clips. -> C values."""
    n_found = ((scores >= thresholds) & positives).sum(axis=0)
    return [float(found / n) if n else None
            for found, n in zip(n_found, positives.sum(axis=0), strict=True)]


def false_alarms_at_recall(
    scores: ArrayLike,
    labels: ArrayLike,
    negative_scores: ArrayLike,
    hours: ArrayLike,
    recall: float = 0.9,
    top_k: int | None = None,
) -> dict[str, Any]:
    """Compute the false alarms per hour at the same recall of every class, to compare models.

    Arguments as in `recall_at`. The threshold of a class is the highest one at which the share of
    its clips found is at least `recall`. A threshold is None for a class without clips. With top_k
    it is also None if too few clips have the class among their k highest; `not_reached` counts
    these. Classes without a threshold raise no alarms, so compare models with equal `not_reached`.

    Returns {"hours", "recall", "per_hour": windows with any alarm, "not_reached",
    "per_class": [{"threshold", "per_hour"}]}. Raises ValueError as `false_alarms`.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be above 0 and at most 1, got {recall}")
    scores, positives, negatives, hours = _check_sides(
        scores, labels, negative_scores, hours, top_k)
    total = math.fsum(hours)
    thresholds = np.full(scores.shape[1], np.inf, dtype=scores.dtype)
    for c in np.flatnonzero(positives.any(axis=0)):
        own = np.sort(scores[positives[:, c], c])[::-1]
        needed = math.ceil(recall * len(own) * (1 - ROUNDING))
        if np.isfinite(own[needed - 1]):
            thresholds[c] = own[needed - 1]
    is_alarm = negatives >= thresholds
    is_set = np.isfinite(thresholds)
    return {
        "hours": float(total),
        "recall": float(recall),
        "per_hour": float(is_alarm.any(axis=1).sum() / total),
        "not_reached": int((positives.any(axis=0) & ~is_set).sum()),
        "per_class": [
            {"threshold": float(threshold) if known else None,
             "per_hour": float(count / total) if known else None}
            for threshold, known, count in zip(thresholds, is_set, is_alarm.sum(axis=0))
        ],
    }


def _only_top(scores, top_k):
    """Scores (n, C) with -inf for all but the `top_k` highest of each row."""
    if top_k is None or top_k >= scores.shape[1]:
        return scores
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_k == 1:
        top = scores.argmax(axis=1)[:, None]
    else:
        top = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    masked = np.full_like(scores, -np.inf)
    np.put_along_axis(masked, top, np.take_along_axis(scores, top, axis=1), axis=1)
    return masked


def _check_scores(scores, what):
    scores = np.asarray(scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"{what} must be (n, C) with n and C above 0, got {scores.shape}")
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"the {what} are not all finite")
    return scores


def _check_thresholds(thresholds, scores):
    """(C,), in the dtype of the scores: a float32 score of 0.7 reaches a threshold of 0.7."""
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if thresholds.shape != scores.shape[1:] or np.isnan(thresholds).any():
        raise ValueError(f"thresholds must be ({scores.shape[1]},) numbers, got {thresholds.shape}")
    return thresholds.astype(scores.dtype)


def _check_hours(hours, n):
    hours = np.asarray(hours, dtype=np.float64)
    if hours.shape not in ((), (n,)):
        raise ValueError(f"hours {hours.shape} for {n} windows")
    if not (np.isfinite(hours) & (hours > 0)).all():
        raise ValueError("hours must be positive")
    return np.broadcast_to(hours, (n,))


def _check_sides(scores, labels, negative_scores, hours, top_k):
    """-> scores (n, C) and positives (n, C) of clips, scores (m, C) and hours (m,) of negatives."""
    scores = _check_scores(scores, "scores")
    negatives = _check_scores(negative_scores, "negative scores")
    if negatives.shape[1] != scores.shape[1]:
        raise ValueError(f"{negatives.shape[1]} classes of negatives, {scores.shape[1]} of clips")
    dtype = np.result_type(scores, negatives)
    scores, negatives = scores.astype(dtype, copy=False), negatives.astype(dtype, copy=False)
    labels = np.asarray(labels)
    if labels.shape == scores.shape:
        positives = labels == 1
    elif labels.shape == scores.shape[:1]:
        positives = labels[:, None] == np.arange(scores.shape[1])
    else:
        raise ValueError(f"labels {labels.shape} for scores {scores.shape}")
    hours = _check_hours(hours, len(negatives))
    return _only_top(scores, top_k), positives, _only_top(negatives, top_k), hours
