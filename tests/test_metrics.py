"""Metrics against scikit-learn, the bootstrap against a plain loop over the same resamples."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from core import metrics
from core.metrics import confusion, evaluate_scores, METRICS, per_class, point_metrics, recall_by_frequency


def make(n=200, n_classes=7, seed=0, tied=False, absent=()):
    """Scores better than chance over unequal classes; `tied` leaves five distinct values."""
    rng = np.random.default_rng(seed)
    present = [c for c in range(n_classes) if c not in absent]
    share = 1 / np.arange(1, len(present) + 1)
    labels = rng.choice(present, size=n, p=share / share.sum())
    scores = rng.normal(size=(n, n_classes))
    scores[np.arange(n), labels] += 1.0
    scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return (np.round(scores * 4) / 4 if tied else scores), labels


def reference(scores, labels, weight=None):
    """The same five from scikit-learn, over the classes that carry weight."""
    weight = np.ones(len(labels)) if weight is None else weight
    predicted = scores.argmax(axis=1)
    present = np.unique(labels[weight > 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f1 = [sk.f1_score(labels, predicted, labels=present, average=average,
                          sample_weight=weight, zero_division=0)
              for average in ("macro", "weighted")]
        ap = [sk.average_precision_score(labels == c, scores[:, c], sample_weight=weight)
              for c in present]
        recall = sk.recall_score(labels, predicted, labels=present, average="macro",
                                 sample_weight=weight, zero_division=0)
    accuracy = sk.accuracy_score(labels, predicted, sample_weight=weight)
    return dict(zip(METRICS, (accuracy, recall, *f1, np.mean(ap))))


CASES = {
    "plain": {},
    "tied": {"tied": True},
    "absent": {"absent": (0, 3)},
    "tied and absent": {"tied": True, "absent": (6,)},
    "few clips": {"n": 5, "n_classes": 9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_points_agree_with_sklearn(case, seed):
    scores, labels = make(seed=seed, **CASES[case])
    assert point_metrics(scores, labels) == pytest.approx(reference(scores, labels), abs=1e-12)


def test_balanced_accuracy_is_sklearns_own():
    scores, labels = make(tied=True)
    expected = sk.balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert point_metrics(scores, labels)["balanced_accuracy"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_average_precision_with_integer_weights(tied):
    scores, labels = make(n=60, seed=3, tied=tied)
    weights = np.random.default_rng(4).integers(0, 4, size=(60, 8)).astype(np.int32)
    for index, ranking in metrics._rankings(scores, labels):
        values = metrics._average_precision(ranking, weights)
        for r in range(weights.shape[1]):
            if weights[labels == index, r].sum() == 0:
                assert np.isnan(values[r])
                continue
            expected = sk.average_precision_score(
                labels == index, scores[:, index], sample_weight=weights[:, r])
            assert values[r] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_bootstrap_is_the_slow_loop_over_the_same_resamples(case):
    scores, labels = make(seed=11, **CASES[case])
    result = evaluate_scores(scores, labels, n_boot=40, seed=5)
    (counts,) = metrics.resample_counts(len(labels), 40, 5)
    by_weight, by_index = [], []
    for weight in counts.T:
        by_weight.append(reference(scores, labels, weight))
        again = np.repeat(np.arange(len(labels)), weight)
        by_index.append(reference(scores[again], labels[again]))
    for name in METRICS:
        for loop in (by_weight, by_index):
            expected = np.percentile([values[name] for values in loop], (2.5, 97.5))
            assert result[f"{name}_ci95"] == pytest.approx(list(expected), abs=1e-12)
    assert {k: result[k] for k in METRICS} == pytest.approx(reference(scores, labels), abs=1e-12)


def test_resamples_draw_n_clips_evenly_and_do_not_depend_on_the_block_size(monkeypatch):
    (whole,) = metrics.resample_counts(50, 400, 1)
    assert whole.shape == (50, 400)
    assert (whole.sum(axis=0) == 50).all()
    assert abs(whole.mean(axis=1) - 1).max() < 0.2  # standard error 0.05 for each clip
    assert whole.var() == pytest.approx(1 - 1 / 50, abs=0.05)  # binomial(50, 1/50)
    scores, labels = make(n=50)
    result = evaluate_scores(scores, labels, n_boot=400, seed=1)
    monkeypatch.setattr(metrics, "_BLOCK", 50 * 7)
    blocks = list(metrics.resample_counts(50, 400, 1))
    assert len(blocks) == 58
    assert (np.concatenate(blocks, axis=1) == whole).all()
    assert evaluate_scores(scores, labels, n_boot=400, seed=1) == result


def test_seed_decides_the_interval():
    scores, labels = make()
    first = evaluate_scores(scores, labels, n_boot=50, seed=0)
    assert first == evaluate_scores(scores, labels, n_boot=50, seed=0)
    assert first["map_ci95"] != evaluate_scores(scores, labels, n_boot=50, seed=1)["map_ci95"]


def test_interval_of_accuracy_is_the_binomial_one():
    n = 400
    labels = np.zeros(n, dtype=int)
    scores = np.tile([1.0, 0.0], (n, 1))
    scores[:120] = [0.0, 1.0]  # 70% right
    low, high = evaluate_scores(scores, labels, n_boot=4000)["accuracy_ci95"]
    half = 1.96 * np.sqrt(0.7 * 0.3 / n)
    assert low == pytest.approx(0.7 - half, abs=0.006)
    assert high == pytest.approx(0.7 + half, abs=0.006)


def test_intervals_cover_the_truth():
    # Some 109, 55 and 36 clips to a class: enough for the percentile interval of every metric.
    draws = [make(n=200, n_classes=3, seed=s) for s in range(400)]
    truth = {name: np.mean([point_metrics(*d)[name] for d in draws]) for name in METRICS}
    held = dict.fromkeys(METRICS, 0)
    for scores, labels in draws[:100]:
        result = evaluate_scores(scores, labels, n_boot=200)
        for name in METRICS:
            low, high = result[f"{name}_ci95"]
            held[name] += low <= truth[name] <= high
    assert all(86 <= count <= 100 for count in held.values()), held


def test_result_is_plain_python():
    result = evaluate_scores(*make(n=20), n_boot=10)
    assert list(result) == ["n", *METRICS, *(f"{name}_ci95" for name in METRICS)]
    assert type(result["n"]) is int
    assert all(type(result[name]) is float for name in METRICS)
    for name in METRICS:
        low, high = result[f"{name}_ci95"]
        assert type(low) is float and type(high) is float and low <= high


def test_one_clip_and_one_class():
    result = evaluate_scores([[0.2, 0.8]], [1], n_boot=10)
    assert all(result[name] == 1.0 and result[f"{name}_ci95"] == [1.0, 1.0] for name in METRICS)
    wrong = point_metrics([[0.2, 0.8]], [0])
    assert wrong == {**dict.fromkeys(METRICS, 0.0), "map": 1.0}
    only = evaluate_scores(np.full((6, 1), 0.5), np.zeros(6, dtype=int), n_boot=10)
    assert all(only[name] == 1.0 for name in METRICS)


def test_undefined_is_nan_and_silent():
    # Class 2 has no clips but is predicted once; class 3 has neither; class 1 is never predicted.
    scores = np.array([[9, 0, 1, 0], [8, 0, 1, 0], [7, 1, 0, 0], [0, 2, 5, 0]]) / 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = per_class(scores, [0, 0, 1, 0], 4)
        evaluate_scores(scores, [0, 0, 1, 0], n_boot=50)
    assert rows[0]["precision"] == rows[0]["recall"] == pytest.approx(2 / 3)
    assert (rows[0]["confused_with"], rows[0]["confused_count"]) == (2, 1)
    assert np.isnan(rows[1]["precision"]) and rows[1]["recall"] == 0 and rows[1]["f1"] == 0
    assert rows[1]["ap"] == pytest.approx(0.5) and rows[1]["confused_with"] == 0
    assert rows[2]["precision"] == 0 and rows[2]["f1"] == 0
    assert np.isnan(rows[2]["recall"]) and np.isnan(rows[2]["ap"])
    assert all(np.isnan(rows[3][k]) for k in ("precision", "recall", "f1", "ap"))
    assert (rows[3]["support"], rows[3]["confused_with"], rows[3]["confused_count"]) == (0, -1, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_per_class_agrees_with_sklearn(tied):
    scores, labels = make(tied=tied, absent=(2,))
    predicted = scores.argmax(axis=1)
    rows = per_class(scores, labels, 7)
    expected = sk.precision_recall_fscore_support(
        labels, predicted, labels=range(7), zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1", "support"), expected):
        ours = [row[name] for row in rows]
        assert ours == pytest.approx(list(values), abs=1e-12, nan_ok=True)
    for c, row in enumerate(rows):
        if c == 2:
            continue
        assert row["ap"] == pytest.approx(sk.average_precision_score(labels == c, scores[:, c]))
        wrong = np.bincount(predicted[(labels == c) & (predicted != c)], minlength=7)
        assert row["confused_count"] == wrong.max() == wrong[row["confused_with"]]


def test_confusion_has_truth_in_rows():
    matrix = confusion([0, 0, 2], [1, 1, 2], 4)
    assert matrix.shape == (4, 4) and matrix[0, 1] == 2 and matrix[2, 2] == 1 and matrix.sum() == 3
    scores, labels = make(absent=(1,))
    predicted = scores.argmax(axis=1)
    assert (confusion(labels, predicted, 7)
            == sk.confusion_matrix(labels, predicted, labels=range(7))).all()
    assert confusion([], [], 3).sum() == 0


@pytest.mark.parametrize("scores, labels, message", [
    (np.zeros((0, 3)), [], "no clips"),
    ([[0.5, 0.5], [np.nan, 1.0]], [0, 1], "row 1 of the scores"),
    ([[0.5, np.inf], [0.5, 0.5]], [0, 1], "row 0 of the scores"),
    ([[0.5, 0.5]], [2], "row 0 of the labels is 2"),
    ([[0.5, 0.5]], [-1], "row 0 of the labels is -1"),
    ([[0.5, 0.5]], [0.0], "integers"),
    ([[0.5, 0.5]], [0, 1], "2 labels for 1 rows"),
    ([0.5, 0.5], [0, 1], r"\(n, C\)"),
])
@pytest.mark.parametrize(
    "function", [evaluate_scores, point_metrics, lambda s, y: per_class(s, y, 2)])
def test_bad_input_is_named(function, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        function(scores, labels)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="2 columns for 3 classes"):
        per_class([[0.5, 0.5]], [0], 3)
    with pytest.raises(ValueError, match="n_boot"):
        evaluate_scores([[0.5, 0.5]], [0], n_boot=0)
    with pytest.raises(ValueError, match="2 labels for 1 predictions"):
        confusion([0, 1], [0], 2)


def test_recall_by_frequency_by_hand():
    """Seven classes: by training clips 5, 0 and 3 are the head, 1 and 6 the middle, 2 and 4 the tail; 3 has no test clip."""
    labels = np.array([5, 5, 0, 0, 1, 6, 6, 2, 4, 4])
    guesses = np.array([5, 0, 0, 0, 2, 6, 6, 2, 2, 0])
    scores = np.eye(7)[guesses]
    counts = [40, 20, 2, 30, 1, 50, 10]
    found = recall_by_frequency(scores, labels, counts)
    assert found == {"recall_head": 0.75, "recall_middle": 0.5, "recall_tail": 0.5}
    few = labels < 2
    assert recall_by_frequency(scores[few], labels[few], counts)["recall_tail"] is None
    assert recall_by_frequency(scores, labels, np.full(len(counts), 7)) == {}  # none is frequent, none rare
