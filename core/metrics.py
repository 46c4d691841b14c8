"""What a run is judged by, from scores and labels alone: the five headline numbers, their
bootstrap intervals, a row per class, the confusion matrix. NumPy only.

Conventions, the same in every function:

* the predicted class is the argmax of the scores, the first one on a tie;
* macro-F1, balanced accuracy and mAP average over the classes that have at least one clip in
  the labels; inside a bootstrap resample, over those present in that resample;
* weighted F1 weighs each class by its number of clips;
* average precision is the step-wise sum over distinct scores, without interpolation, tied
  scores counted together: `sklearn.metrics.average_precision_score`.
"""

import numpy as np

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "map")

# Clips x resamples held at once: small enough to stay in cache, and a bound on memory.
_BLOCK = 1 << 20


def evaluate_scores(scores, labels, n_boot=1000, seed=0):
    """The five metrics of `METRICS` with 95% intervals.

    scores: (n, C) probabilities, or anything that ranks like them. labels: (n,) class indices.
    The interval is the 2.5th to 97.5th percentile over `n_boot` resamples of n clips with
    replacement, not stratified by class, so it holds the spread from which clips were drawn
    and not the one from which seed was trained.

    Read the intervals of macro-F1 and mAP with care where classes have few clips. A positive
    drawn twice lifts its own precision, and a resample misses some rare classes, so both are
    biased (mAP upward) and can even leave out the point value. In simulation at 1200 clips the
    mAP interval held the true value in 80% of trials with 90 equal classes, and in 48% with
    90 long-tailed ones; that of accuracy in 97%.

    Returns {"n", each metric, "<metric>_ci95": [low, high]} as plain Python numbers.
    Raises ValueError on no clips, shapes or labels that do not fit, and non-finite scores.
    """
    scores, labels = _checked(scores, labels)
    if n_boot < 1:
        raise ValueError(f"n_boot must be at least 1, got {n_boot}; point_metrics does without")
    rankings = _rankings(scores, labels)
    blocks = [
        _weighted_metrics(scores, labels, rankings, counts)
        for counts in resample_counts(len(labels), n_boot, seed)
    ]
    result = {"n": len(labels), **_point(scores, labels, rankings)}
    for name in METRICS:
        values = np.concatenate([block[name] for block in blocks])
        result[f"{name}_ci95"] = [float(v) for v in np.percentile(values, (2.5, 97.5))]
    return result


def point_metrics(scores, labels):
    """The five metrics without intervals: {name: float}. Arguments as in `evaluate_scores`."""
    scores, labels = _checked(scores, labels)
    return _point(scores, labels, _rankings(scores, labels))


def per_class(scores, labels, n_classes):
    """One dict per class, in class order: precision, recall, f1, ap, support, and the class its
    clips are most often mistaken for (`confused_with`, -1 if none) with that `confused_count`.

    Undefined is nan: precision of a class never predicted, recall and ap of a class without
    clips, f1 of a class with neither.
    """
    scores, labels = _checked(scores, labels)
    if scores.shape[1] != n_classes:
        raise ValueError(f"scores have {scores.shape[1]} columns for {n_classes} classes")
    matrix = confusion(labels, scores.argmax(axis=1), n_classes)
    hits, support, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    precision = _ratio(hits, predicted)
    recall = _ratio(hits, support)
    f1 = _ratio(2 * hits, support + predicted)
    ap = np.full(n_classes, np.nan)
    ones = np.ones((len(labels), 1), dtype=np.int32)
    for index, ranking in _rankings(scores, labels):
        ap[index] = _average_precision(ranking, ones)[0]
    wrong = matrix - np.diag(hits)
    worst = wrong.argmax(axis=1)
    rows = []
    for i in range(n_classes):
        count = int(wrong[i, worst[i]])
        rows.append({
            "precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]),
            "ap": float(ap[i]), "support": int(support[i]),
            "confused_with": int(worst[i]) if count else -1, "confused_count": count,
        })
    return rows


def recall_by_frequency(scores, labels, train_counts):
    """Mean recall over the third of the classes with the most training clips (head), the middle and the last third
    (tail; Z. Liu et al., "Large-Scale Long-Tailed Recognition", 2019, with thirds for fixed bounds).

    scores (n, C), labels (n,), train_counts (C,). Classes without clips in the labels do not count.
    Returns {"recall_head", "recall_middle", "recall_tail"}; a third without clips is None.
    """
    scores, labels = _checked(scores, labels)
    matrix = confusion(labels, scores.argmax(axis=1), scores.shape[1])
    recall = _ratio(np.diag(matrix), matrix.sum(axis=1))
    thirds = np.array_split(np.argsort(-np.asarray(train_counts), kind="stable"), 3)
    means = {}
    for name, classes in zip(("head", "middle", "tail"), thirds, strict=True):
        there = recall[classes][np.isfinite(recall[classes])]
        means[f"recall_{name}"] = float(there.mean()) if len(there) else None
    return means


def confusion(labels, predictions, n_classes):
    """(n,) true and (n,) predicted class indices -> (C, C) counts; rows are the truth."""
    labels = _class_indices(labels, n_classes, "labels")
    predictions = _class_indices(predictions, n_classes, "predictions")
    if labels.shape != predictions.shape:
        raise ValueError(f"{len(labels)} labels for {len(predictions)} predictions")
    cells = np.bincount(labels * n_classes + predictions, minlength=n_classes * n_classes)
    return cells.reshape(n_classes, n_classes)


def resample_counts(n, n_boot, seed):
    """Yields (n, r) int32 blocks, r summing to `n_boot`: how often each resample drew each clip.

    A resample as counts, not indices, so that one ranking of the clips serves all of them.
    The block size does not change what is drawn.
    """
    rng = np.random.default_rng(seed)
    width = max(1, _BLOCK // n)
    for start in range(0, n_boot, width):
        r = min(width, n_boot - start)
        drawn = rng.integers(0, n, size=(r, n)) + n * np.arange(r)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=r * n).reshape(r, n)
        yield np.ascontiguousarray(counts.T, dtype=np.int32)


def _checked(scores, labels):
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must be (n, C), got {scores.shape}")
    if len(scores) == 0:
        raise ValueError("no clips to evaluate")
    labels = _class_indices(labels, scores.shape[1], "labels")
    if len(labels) != len(scores):
        raise ValueError(f"{len(labels)} labels for {len(scores)} rows of scores")
    broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(broken):
        raise ValueError(f"row {broken[0]} of the scores is not finite ({len(broken)} such rows)")
    return scores, labels


def _class_indices(values, n_classes, what):
    values = np.asarray(values)
    if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer) or values.size == 0):
        raise ValueError(f"{what} must be (n,) integers, got {values.shape} {values.dtype}")
    outside = np.flatnonzero((values < 0) | (values >= n_classes))
    if len(outside):
        row = outside[0]
        raise ValueError(f"row {row} of the {what} is {values[row]}, outside 0..{n_classes - 1}")
    return values.astype(np.int64)


def _point(scores, labels, rankings):
    ones = np.ones((len(labels), 1), dtype=np.int32)
    values = _weighted_metrics(scores, labels, rankings, ones)
    return {name: float(values[name][0]) for name in METRICS}


def _weighted_metrics(scores, labels, rankings, weights):
    """The five metrics of R weightings of the clips: weights (n, R) ints -> {name: (R,)}."""
    predictions = scores.argmax(axis=1)
    n_classes = scores.shape[1]
    right = predictions == labels
    support = _sum_by_class(weights, labels, n_classes)
    predicted = _sum_by_class(weights, predictions, n_classes)
    hits = _sum_by_class(weights[right], labels[right], n_classes)
    total = weights.sum(axis=0)
    f1 = _ratio(2 * hits, support + predicted)
    ap = np.stack([_average_precision(ranking, weights) for _, ranking in rankings])
    return {
        "accuracy": hits.sum(axis=0) / total,
        "balanced_accuracy": np.nanmean(_ratio(hits, support), axis=0),
        "macro_f1": np.nanmean(np.where(support > 0, f1, np.nan), axis=0),
        "weighted_f1": np.nansum(f1 * support, axis=0) / total,
        "map": np.nanmean(ap, axis=0),
    }


def _sum_by_class(weights, index, n_classes):
    """weights (m, R) summed over the clips of each class -> (C, R)."""
    one_hot = index == np.arange(n_classes)[:, None]
    return one_hot.astype(np.float64) @ weights


def _ratio(numerator, denominator):
    """numerator / denominator, nan where the denominator is zero."""
    undefined = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator != 0)


def _rankings(scores, labels):
    """[(class, ranking)] of the classes that have clips; what `_average_precision` needs of the
    scores, sorted once and used for every resample."""
    rankings = []
    for index in np.unique(labels):
        key = -scores[:, index].astype(np.float64)
        order = np.argsort(key, kind="stable")
        key = key[order]
        positive = labels[order] == index
        # Precision counts only at scores that a positive has, and there it counts the whole tie:
        # `ends` is how many clips score at least that much, `first` its first positive.
        thresholds, first = np.unique(key[positive], return_index=True)
        ends = np.searchsorted(key, thresholds, side="right")
        rankings.append((index, (order[:ends[-1]], ends, order[positive], first)))
    return rankings


def _average_precision(ranking, weights):
    """One class's average precision under R weightings: weights (n, R) ints -> (R,).

    nan where no positive has any weight.
    """
    order, ends, positives, first = ranking
    starts = np.concatenate(([0], ends[:-1]))
    retrieved = np.add.reduceat(weights[order], starts, axis=0).cumsum(axis=0)  # (thresholds, R)
    gained = np.add.reduceat(weights[positives], first, axis=0)
    found = gained.cumsum(axis=0)
    # Nothing retrieved means nothing gained, so 1 only stands in for a division by zero.
    precision = found / np.maximum(retrieved, 1)
    return _ratio((gained * precision).sum(axis=0), found[-1])
