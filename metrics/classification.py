"""What each metric means and how it is computed.

Conventions, the same in every function:

* `scores` are (n, C). `labels` are (n,) class indices if each clip has one label. For multi-label
  data they are (n, C): 1 if the clip contains the class, 0 if it does not, nan if unknown.
* A clip may have no label: -1, or a row without 1. It counts as a clip without the class where a
  class is told from all else (average precision, and decisions by thresholds). Accuracy, and the
  other figures of single-label data, are of the clips with a label.
* Single-label: the predicted class is the one with the highest score, the first one on a tie.
  Multi-label: `predicted` (n, C) says which classes are predicted, by default those with a score of
  at least 0.5. A clip is ignored for the classes that are unknown in it.
* Averages over classes include only classes that have at least one clip; inside a bootstrap
  resample, at least one clip of that resample.
* An undefined ratio (0 / 0) is nan.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


class Outcome:
    """Checked scores, labels and predictions of n clips, as (n, C) arrays.

    Single-label data become the same arrays as multi-label data: every class is known, and one
    class per clip is positive and one is predicted.

    scores: (n, C). known, positives, predicted: (n, C) bool. has_label: (n,) bool. top_correct:
    (n,) bool, whether the highest-scoring known class is a label of the clip.
    Raises ValueError as described in `evaluate_scores`.
    """

    def __init__(self, scores: ArrayLike, labels: ArrayLike, predicted: ArrayLike | None = None):
        self.scores = scores = np.asarray(scores)
        if scores.ndim != 2 or scores.shape[1] == 0:
            raise ValueError(f"scores must be (n, C), got {scores.shape}")
        self.n, self.n_classes = scores.shape
        if self.n == 0:
            raise ValueError("no clips to evaluate")
        self.multi_label = np.ndim(labels) == 2
        if self.multi_label:
            labels = _check_label_matrix(labels, self.n_classes)
        else:
            labels = _check_class_indices(labels, self.n_classes, "labels", lowest=-1)
        if len(labels) != self.n:
            raise ValueError(f"{len(labels)} labels for {self.n} rows of scores")
        broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        if len(broken):
            raise ValueError(
                f"row {broken[0]} of the scores is not finite ({len(broken)} such rows)")

        if self.multi_label:
            self.known = ~np.isnan(labels)
            self.positives = labels == 1
        else:
            self.known = np.ones(scores.shape, dtype=bool)
            self.positives = labels[:, None] == np.arange(self.n_classes)
        self.has_label = self.positives.any(axis=1)
        if not self.has_label.any():
            raise ValueError("no clip has a label")
        top_class = np.where(self.known, scores, -np.inf).argmax(axis=1)
        self.top_correct = self.positives[np.arange(self.n), top_class]
        if not self.multi_label:
            self.predicted = top_class[:, None] == np.arange(self.n_classes)
            self.predicted &= self.has_label[:, None]
        else:
            predicted = scores >= 0.5 if predicted is None else np.asarray(predicted, dtype=bool)
            if predicted.shape != labels.shape:
                raise ValueError(f"predicted {predicted.shape} for labels {labels.shape}")
            self.predicted = predicted & self.known

    @cached_property
    def rankings(self) -> dict[int, "Ranking"]:
        """The ranking of each class that has clips: sorted once, used for every resample."""
        return {
            int(c): Ranking.of_class(self.scores[:, c], self.positives[:, c], self.known[:, c])
            for c in np.flatnonzero(self.positives.any(axis=0))
        }


class WeightedCounts:
    """What the metrics are computed from, for R weightings of the clips at once.

    weights: (n, R) ints, how often each clip counts. All attributes are sums of weights.
    """

    def __init__(self, outcome: Outcome, weights: np.ndarray):
        self.outcome = outcome
        self.weights = weights
        self.multi_label = outcome.multi_label

    def _per_class(self, mask):
        return mask.T.astype(np.float64) @ self.weights  # (n, C) bool -> (C, R)

    @cached_property
    def clips(self) -> np.ndarray:
        """Clips with a label: (R,)."""
        return self.outcome.has_label @ self.weights

    @cached_property
    def top_correct(self) -> np.ndarray:
        """Clips whose highest-scoring class is correct: (R,)."""
        return self.outcome.top_correct @ self.weights

    @cached_property
    def positives(self) -> np.ndarray:
        """Clips that contain each class: (C, R)."""
        return self._per_class(self.outcome.positives)

    @cached_property
    def negatives(self) -> np.ndarray:
        """Clips that do not contain each class: (C, R)."""
        return self._per_class(self.outcome.known & ~self.outcome.positives)

    @cached_property
    def predicted(self) -> np.ndarray:
        """Clips in which each class is predicted: (C, R)."""
        return self._per_class(self.outcome.predicted)

    @cached_property
    def correct(self) -> np.ndarray:
        """Clips in which each class is predicted correctly: (C, R)."""
        return self._per_class(self.outcome.predicted & self.outcome.positives)

    @cached_property
    def f1(self) -> np.ndarray:
        """F1 of each class: (C, R)."""
        return ratio(2 * self.correct, self.positives + self.predicted)


def accuracy(counts: WeightedCounts) -> np.ndarray:
    """Share of clips with a label whose highest-scoring class is correct.

    Multi-label: the highest-scoring known class is one of the clip's labels.
    """
    return ratio(counts.top_correct, counts.clips)


def balanced_accuracy(counts: WeightedCounts) -> np.ndarray:
    """Mean recall of the classes: every class counts the same, rare or common.

    Multi-label: mean of (recall + specificity) / 2; specificity is the share of clips without the
    class in which it is not predicted.
    """
    recall = ratio(counts.correct, counts.positives)
    if not counts.multi_label:
        return np.nanmean(recall, axis=0)
    specificity = ratio(counts.negatives - counts.predicted + counts.correct, counts.negatives)
    both = np.where(counts.negatives > 0, (recall + specificity) / 2, recall)
    return np.nanmean(both, axis=0)


def macro_f1(counts: WeightedCounts) -> np.ndarray:
    """Mean F1 of the classes: every class counts the same, rare or common.

    F1 is high only if most clips of a class are found and most predictions of it are right.
    """
    return np.nanmean(np.where(counts.positives > 0, counts.f1, np.nan), axis=0)


def weighted_f1(counts: WeightedCounts) -> np.ndarray:
    """Mean F1 of the classes, weighted by their number of clips: common classes dominate."""
    return np.nansum(counts.f1 * counts.positives, axis=0) / counts.positives.sum(axis=0)


def micro_f1(counts: WeightedCounts) -> np.ndarray:
    """F1 of all pairs of clip and class together, whichever class they are of."""
    all_counts = (counts.positives + counts.predicted).sum(axis=0)
    return 2 * counts.correct.sum(axis=0) / all_counts


def mean_average_precision(counts: WeightedCounts) -> np.ndarray:
    """Mean over classes of average precision: are clips of a class ranked above all others?

    Needs no threshold. 1 means that every clip of a class scores higher than every other clip.
    """
    values = [ranking.average_precision(counts.weights)
              for ranking in counts.outcome.rankings.values()]
    return np.nanmean(np.stack(values), axis=0)


@dataclass(frozen=True)
class Ranking:
    """The clips of one class's precision-recall curve, sorted from high to low scores.

    Precision matters only at thresholds where recall rises: the distinct scores of positives.

    clips: indices down to the lowest-scoring positive. ends: (T,) how many clips score at least
    threshold t. positives: indices of positives. first: (T,) the first positive at each threshold.
    """

    clips: np.ndarray
    ends: np.ndarray
    positives: np.ndarray
    first: np.ndarray

    @classmethod
    def of_class(cls, scores: np.ndarray, positives: np.ndarray, known: np.ndarray) -> "Ranking":
        """Rank the known clips by one class's scores; all arguments are (n,)."""
        keys = -scores.astype(np.float64)
        order = np.argsort(keys, kind="stable")
        order = order[known[order]]
        keys, is_positive = keys[order], positives[order]
        thresholds, first = np.unique(keys[is_positive], return_index=True)
        ends = np.searchsorted(keys, thresholds, side="right")  # includes ties
        return cls(order[: ends[-1]], ends, order[is_positive], first)

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Average precision under R weightings: weights (n, R) -> (R,).

        Sum over distinct scores of (rise in recall) x precision, without interpolation, tied scores
        counted together, as `sklearn.metrics.average_precision_score`. nan if no positive has any
        weight.
        """
        starts = np.concatenate(([0], self.ends[:-1]))
        retrieved = np.add.reduceat(weights[self.clips], starts, axis=0).cumsum(axis=0)  # (T, R)
        new_positives = np.add.reduceat(weights[self.positives], self.first, axis=0)
        correct = new_positives.cumsum(axis=0)
        # If nothing is retrieved, nothing is correct, so the 1 only avoids a division by zero.
        precision = correct / np.maximum(retrieved, 1)
        return ratio((new_positives * precision).sum(axis=0), correct[-1])


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    """Divide elementwise; nan where the denominator is zero."""
    undefined = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=np.asarray(denominator) != 0)


def per_class(
    scores: ArrayLike, labels: ArrayLike, n_classes: int, predicted: ArrayLike | None = None
) -> list[dict[str, Any]]:
    """Compute one dict per class, in class order. Arguments as in `evaluate_scores`.

    precision: share of predictions of the class that are right. recall: share of its clips that
    are found. f1: their harmonic mean. ap: average precision. support: number of its clips.
    confused_with: the class most often predicted wrongly for clips in which this class was missed,
    -1 if none; confused_count: how often.

    Undefined values are nan: precision of a class never predicted, recall and ap of a class without
    clips, f1 of a class with neither.
    """
    outcome = Outcome(scores, labels, predicted)
    if outcome.n_classes != n_classes:
        raise ValueError(f"scores have {outcome.n_classes} columns for {n_classes} classes")
    ones = np.ones((outcome.n, 1), dtype=np.int32)
    counts = WeightedCounts(outcome, ones)
    precision = ratio(counts.correct, counts.predicted)[:, 0]
    recall = ratio(counts.correct, counts.positives)[:, 0]
    missed = outcome.positives & ~outcome.predicted
    wrong = outcome.predicted & ~outcome.positives
    confusions = missed.T.astype(np.float64) @ wrong  # (C, C): true class, predicted class
    rows = []
    for c in range(n_classes):
        other = int(confusions[c].argmax())
        n_confused = int(confusions[c, other])
        ranking = outcome.rankings.get(c)
        rows.append({
            "precision": float(precision[c]),
            "recall": float(recall[c]),
            "f1": float(counts.f1[c, 0]),
            "ap": float(ranking.average_precision(ones)[0]) if ranking else np.nan,
            "support": int(counts.positives[c, 0]),
            "confused_with": other if n_confused else -1,
            "confused_count": n_confused,
        })
    return rows


def recall_by_frequency(
    scores: ArrayLike,
    labels: ArrayLike,
    train_counts: ArrayLike,
    predicted: ArrayLike | None = None,
) -> dict[str, float | None]:
    """Compute the mean recall of common (head), less common (middle) and rare classes (tail).

    Each is a third of the classes, by their number of training clips, train_counts (C,). After
    Z. Liu et al., "Large-Scale Long-Tailed Recognition", 2019, which uses fixed bounds. Classes
    without clips in `labels` are left out.

    Returns {"recall_head", "recall_middle", "recall_tail"}; None for a third without clips. Returns
    {} if all classes have the same number of training clips.
    """
    outcome = Outcome(scores, labels, predicted)
    counts = WeightedCounts(outcome, np.ones((outcome.n, 1), dtype=np.int32))
    recall = ratio(counts.correct, counts.positives)[:, 0]
    train_counts = np.asarray(train_counts)
    if (train_counts == train_counts[0]).all():
        return {}
    thirds = np.array_split(np.argsort(-train_counts, kind="stable"), 3)
    means = {}
    for name, classes in zip(("head", "middle", "tail"), thirds, strict=True):
        defined = recall[classes][np.isfinite(recall[classes])]
        means[f"recall_{name}"] = float(defined.mean()) if len(defined) else None
    return means


def confusion(labels: ArrayLike, predictions: ArrayLike, n_classes: int) -> np.ndarray:
    """Count pairs of (n,) true and (n,) predicted class indices -> (C, C); rows are the truth."""
    labels = _check_class_indices(labels, n_classes, "labels")
    predictions = _check_class_indices(predictions, n_classes, "predictions")
    if labels.shape != predictions.shape:
        raise ValueError(f"{len(labels)} labels for {len(predictions)} predictions")
    cells = np.bincount(labels * n_classes + predictions, minlength=n_classes * n_classes)
    return cells.reshape(n_classes, n_classes)


def _check_class_indices(values, n_classes, what, lowest=0):
    values = np.asarray(values)
    if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer) or values.size == 0):
        raise ValueError(f"{what} must be (n,) integers, got {values.shape} {values.dtype}")
    outside = np.flatnonzero((values < lowest) | (values >= n_classes))
    if len(outside):
        row = outside[0]
        raise ValueError(f"row {row} of the {what} is {values[row]}, outside "
                         f"{lowest}..{n_classes - 1}")
    return values.astype(np.int64)


def _check_label_matrix(values, n_classes):
    values = np.asarray(values, dtype=np.float64)
    is_valid = np.isin(values, (0, 1)) | np.isnan(values)
    if values.shape[1] != n_classes or not is_valid.all():
        raise ValueError(
            f"multi-label labels must be (n, {n_classes}) of 0, 1 and nan, got {values.shape}")
    return values
