"""Metrics of clips with several labels against scikit-learn and a plain loop."""

import numpy as np
import pytest
from sklearn import metrics as sk

from metrics import (
    evaluate_scores,
    metrics_for,
    per_class,
    point_metrics,
    recall_by_frequency,
    resample_counts,
)

MULTI_LABEL = list(metrics_for(multi_label=True))


def multi_label_data(n=120, classes=6, seed=0, tied=False):
    """Scores better than chance, labels with unknown ones (nan) and no clip of class 5.

    Returns scores, labels and predicted, each (n, classes).
    """
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, classes)) < [0.5, 0.3, 0.2, 0.1, 0.9, 0.0]).astype(float)
    labels[labels.sum(1) == 0, 0] = 1
    scores = 1 / (1 + np.exp(-(rng.normal(size=(n, classes)) + 1.5 * labels - 1)))
    unknown = rng.random((n, classes)) < 0.15
    unknown[np.arange(n), labels.argmax(1)] = False
    labels[unknown] = np.nan
    predicted = scores > rng.uniform(0.3, 0.6, classes)
    return (np.round(scores * 5) / 5 if tied else scores), labels, predicted


def multi_label_reference(scores, labels, predicted, weight):
    """The same metrics from scikit-learn, class by class over the clips in which it is known."""
    ap, f1, balanced, support, pairs = [], [], [], [], []
    for c in range(labels.shape[1]):
        known = ~np.isnan(labels[:, c]) & (weight > 0)
        truth, guess, w = labels[known, c], predicted[known, c], weight[known]
        pairs.append((truth, guess, w))
        if (truth * w).sum() == 0:
            continue
        ap.append(sk.average_precision_score(truth, scores[known, c], sample_weight=w))
        f1.append(sk.f1_score(truth, guess, sample_weight=w, zero_division=0))
        support.append((truth * w).sum())
        score = sk.recall_score if truth.all() else sk.balanced_accuracy_score
        balanced.append(score(truth, guess, sample_weight=w))
    truth, guess, w = (np.concatenate(column) for column in zip(*pairs, strict=True))
    top_correct = []
    for row, label in zip(scores, labels, strict=True):
        known = np.flatnonzero(~np.isnan(label))
        top_correct.append(label[known[row[known].argmax()]] == 1)
    return {
        "accuracy": np.average(top_correct, weights=weight),
        "balanced_accuracy": np.mean(balanced),
        "macro_f1": np.mean(f1),
        "weighted_f1": np.average(f1, weights=support),
        "map": np.mean(ap),
        "micro_f1": sk.f1_score(truth, guess, sample_weight=w),
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_multi_label_metrics_agree_with_sklearn(seed, tied):
    scores, labels, predicted = multi_label_data(seed=seed, tied=tied)
    ones = np.ones(len(labels))
    expected = multi_label_reference(scores, labels, predicted, ones)
    assert point_metrics(scores, labels, predicted) == pytest.approx(expected, abs=1e-12)
    expected = multi_label_reference(scores, labels, scores >= 0.5, ones)
    assert point_metrics(scores, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_multi_label_intervals_equal_a_plain_loop_over_the_same_resamples():
    scores, labels, predicted = multi_label_data(n=25)
    result = evaluate_scores(scores, labels, n_boot=20, seed=3, predicted=predicted)
    weights = np.concatenate(list(resample_counts(25, 20, 3)), axis=1).T
    values = [multi_label_reference(scores, labels, predicted, weight) for weight in weights]
    assert list(result) == ["n", *MULTI_LABEL, *(f"{name}_ci95" for name in MULTI_LABEL)]
    assert result["n"] == 25
    for name in MULTI_LABEL:
        expected = np.percentile([value[name] for value in values], (2.5, 97.5))
        assert result[f"{name}_ci95"] == pytest.approx(expected, abs=1e-12)
        assert type(result[name]) is float


def test_multi_label_per_class_agrees_with_sklearn():
    scores, labels, predicted = multi_label_data()
    rows = per_class(scores, labels, 6, predicted)
    for c, row in enumerate(rows):
        known = ~np.isnan(labels[:, c])
        truth, guess = labels[known, c], predicted[known, c]
        assert row["support"] == truth.sum()
        if c == 5:
            assert np.isnan(row["recall"]) and np.isnan(row["ap"]) and row["precision"] == 0
            continue
        assert row["precision"] == pytest.approx(sk.precision_score(truth, guess))
        assert row["recall"] == pytest.approx(sk.recall_score(truth, guess))
        assert row["f1"] == pytest.approx(sk.f1_score(truth, guess))
        expected = sk.average_precision_score(truth, scores[known, c])
        assert row["ap"] == pytest.approx(expected)
        missed = (labels[:, c] == 1) & ~predicted[:, c]
        wrong = [(predicted[missed, d] & (labels[missed, d] == 0)).sum() for d in range(6)]
        assert row["confused_count"] == max(wrong)
        if max(wrong):
            assert wrong[row["confused_with"]] == max(wrong)
        else:
            assert row["confused_with"] == -1
    assert sum(row["confused_count"] > 0 for row in rows) >= 3


def test_multi_label_recall_by_frequency_is_the_mean_of_the_classes_recall():
    scores, labels, predicted = multi_label_data()
    recall = [row["recall"] for row in per_class(scores, labels, 6, predicted)]
    thirds = recall_by_frequency(scores, labels, [9, 8, 7, 6, 5, 4], predicted)
    assert thirds == {
        "recall_head": pytest.approx(np.mean(recall[:2])),
        "recall_middle": pytest.approx(np.mean(recall[2:4])),
        "recall_tail": pytest.approx(recall[4]),  # class 5 has no clips
    }


@pytest.mark.parametrize("labels, message", [
    ([[1, 2]], "0, 1 and nan"),
    ([[1, 0, 0]], r"\(n, 2\)"),
    ([[0, np.nan]], "no clip has a label"),
    ([[1, 0]] * 2, "2 labels for 1 rows"),
])
def test_error_names_what_is_wrong_with_multi_label_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate_scores([[0.5, 0.5]], labels)


def test_error_names_predictions_of_another_shape():
    with pytest.raises(ValueError, match="predicted"):
        point_metrics([[0.5, 0.5]], [[1, 0]], [[True]])
