"""Metrics against scikit-learn; the bootstrap against a plain loop over the same resamples."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

import metrics
from metrics import (
    HISTORY_COLUMNS,
    METRICS,
    MONITORS,
    confusion,
    evaluate_scores,
    metrics_for,
    per_class,
    point_metrics,
    recall_by_frequency,
    resample_counts,
)
from metrics.classification import Outcome

SINGLE_LABEL = list(metrics_for(multi_label=False))


def single_label_data(n=200, n_classes=7, seed=0, tied=False, absent=()):
    """Scores better than chance over unequal classes; `tied` leaves five distinct values."""
    rng = np.random.default_rng(seed)
    present = [c for c in range(n_classes) if c not in absent]
    share = 1 / np.arange(1, len(present) + 1)
    labels = rng.choice(present, size=n, p=share / share.sum())
    scores = rng.normal(size=(n, n_classes))
    scores[np.arange(n), labels] += 1.0
    scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return (np.round(scores * 4) / 4 if tied else scores), labels


def single_label_reference(scores, labels, weight=None):
    """The same metrics from scikit-learn, over the classes that have weight."""
    weight = np.ones(len(labels)) if weight is None else weight
    predicted = scores.argmax(axis=1)
    present = np.unique(labels[weight > 0])
    options = {"labels": present, "sample_weight": weight, "zero_division": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ap = [sk.average_precision_score(labels == c, scores[:, c], sample_weight=weight)
              for c in present]
        return {
            "accuracy": sk.accuracy_score(labels, predicted, sample_weight=weight),
            "balanced_accuracy": sk.recall_score(labels, predicted, average="macro", **options),
            "macro_f1": sk.f1_score(labels, predicted, average="macro", **options),
            "weighted_f1": sk.f1_score(labels, predicted, average="weighted", **options),
            "map": np.mean(ap),
        }


# --- the table ---

def test_table_gives_history_columns_and_monitors():
    assert list(HISTORY_COLUMNS) == ["val_acc", "val_macro_f1", "val_map"]
    assert list(MONITORS) == [*HISTORY_COLUMNS, "val_loss"]
    assert not MONITORS["val_loss"].higher_is_better
    assert all(metric.higher_is_better for metric in HISTORY_COLUMNS.values())
    assert all(not metric.multi_label_only for metric in HISTORY_COLUMNS.values())
    assert len({metric.column for metric in METRICS.values()}) == len(METRICS)


def test_new_row_in_the_table_is_computed_with_its_interval(monkeypatch):
    error = metrics.Metric("error", "error", "error", lambda c: 1 - c.top_correct / c.clips)
    monkeypatch.setitem(METRICS, "error", error)
    result = evaluate_scores(*single_label_data(), n_boot=20)
    assert result["error"] == 1 - result["accuracy"]
    low, high = result["accuracy_ci95"]
    assert result["error_ci95"] == pytest.approx([1 - high, 1 - low])
    assert "error" in point_metrics([[0.2, 0.8]], [[0, 1]])


# --- one label per clip ---

CASES = {
    "plain": {},
    "tied": {"tied": True},
    "absent": {"absent": (0, 3)},
    "tied and absent": {"tied": True, "absent": (6,)},
    "few clips": {"n": 5, "n_classes": 9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_sklearn(case, seed):
    scores, labels = single_label_data(seed=seed, **CASES[case])
    expected = single_label_reference(scores, labels)
    assert point_metrics(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_balanced_accuracy_agrees_with_sklearns_function_of_that_name():
    scores, labels = single_label_data(tied=True)
    expected = sk.balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert point_metrics(scores, labels)["balanced_accuracy"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_average_precision_with_integer_weights(tied):
    scores, labels = single_label_data(n=60, seed=3, tied=tied)
    weights = np.random.default_rng(4).integers(0, 4, size=(60, 8)).astype(np.int32)
    for c, ranking in Outcome(scores, labels).rankings.items():
        values = ranking.average_precision(weights)
        for r in range(weights.shape[1]):
            if weights[labels == c, r].sum() == 0:
                assert np.isnan(values[r])
                continue
            expected = sk.average_precision_score(
                labels == c, scores[:, c], sample_weight=weights[:, r])
            assert values[r] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_intervals_equal_a_plain_loop_over_the_same_resamples(case):
    scores, labels = single_label_data(seed=11, **CASES[case])
    result = evaluate_scores(scores, labels, n_boot=40, seed=5)
    (counts,) = resample_counts(len(labels), 40, 5)
    by_weight, by_index = [], []
    for weight in counts.T:
        by_weight.append(single_label_reference(scores, labels, weight))
        drawn = np.repeat(np.arange(len(labels)), weight)
        by_index.append(single_label_reference(scores[drawn], labels[drawn]))
    for name in SINGLE_LABEL:
        for loop in (by_weight, by_index):
            expected = np.percentile([values[name] for values in loop], (2.5, 97.5))
            assert result[f"{name}_ci95"] == pytest.approx(list(expected), abs=1e-12)
    expected = single_label_reference(scores, labels)
    assert {name: result[name] for name in SINGLE_LABEL} == pytest.approx(expected, abs=1e-12)


def test_resamples_draw_n_clips_evenly_and_do_not_depend_on_the_block_size(monkeypatch):
    (whole,) = resample_counts(50, 400, 1)
    assert whole.shape == (50, 400)
    assert (whole.sum(axis=0) == 50).all()
    assert abs(whole.mean(axis=1) - 1).max() < 0.2  # standard error 0.05 for each clip
    assert whole.var() == pytest.approx(1 - 1 / 50, abs=0.05)  # binomial(50, 1/50)
    scores, labels = single_label_data(n=50)
    result = evaluate_scores(scores, labels, n_boot=400, seed=1)
    monkeypatch.setattr(metrics, "BLOCK_SIZE", 50 * 7)
    blocks = list(resample_counts(50, 400, 1))
    assert len(blocks) == 58
    assert (np.concatenate(blocks, axis=1) == whole).all()
    assert evaluate_scores(scores, labels, n_boot=400, seed=1) == result


def test_seed_determines_the_interval():
    scores, labels = single_label_data()
    first = evaluate_scores(scores, labels, n_boot=50, seed=0)
    assert first == evaluate_scores(scores, labels, n_boot=50, seed=0)
    assert first["map_ci95"] != evaluate_scores(scores, labels, n_boot=50, seed=1)["map_ci95"]


def test_interval_of_accuracy_is_the_binomial_one():
    n = 400
    labels = np.zeros(n, dtype=int)
    scores = np.tile([1.0, 0.0], (n, 1))
    scores[:120] = [0.0, 1.0]  # 70% correct
    low, high = evaluate_scores(scores, labels, n_boot=4000)["accuracy_ci95"]
    half = 1.96 * np.sqrt(0.7 * 0.3 / n)
    assert low == pytest.approx(0.7 - half, abs=0.006)
    assert high == pytest.approx(0.7 + half, abs=0.006)


def test_intervals_cover_the_true_value():
    # About 109, 55 and 36 clips per class: enough for the percentile interval of every metric.
    datasets = [single_label_data(n=200, n_classes=3, seed=s) for s in range(400)]
    points = [point_metrics(*data) for data in datasets]
    n_covered = dict.fromkeys(SINGLE_LABEL, 0)
    for data in datasets[:100]:
        result = evaluate_scores(*data, n_boot=200)
        for name in SINGLE_LABEL:
            low, high = result[f"{name}_ci95"]
            n_covered[name] += low <= np.mean([point[name] for point in points]) <= high
    assert all(86 <= count <= 100 for count in n_covered.values()), n_covered


def test_result_is_plain_python():
    result = evaluate_scores(*single_label_data(n=20), n_boot=10)
    assert list(result) == ["n", *SINGLE_LABEL, *(f"{name}_ci95" for name in SINGLE_LABEL)]
    assert type(result["n"]) is int
    assert all(type(result[name]) is float for name in SINGLE_LABEL)
    for name in SINGLE_LABEL:
        low, high = result[f"{name}_ci95"]
        assert type(low) is float and type(high) is float and low <= high


def test_one_clip_and_one_class():
    result = evaluate_scores([[0.2, 0.8]], [1], n_boot=10)
    for name in SINGLE_LABEL:
        assert result[name] == 1.0 and result[f"{name}_ci95"] == [1.0, 1.0]
    wrong = point_metrics([[0.2, 0.8]], [0])
    assert wrong == {**dict.fromkeys(SINGLE_LABEL, 0.0), "map": 1.0}
    one_class = evaluate_scores(np.full((6, 1), 0.5), np.zeros(6, dtype=int), n_boot=10)
    assert all(one_class[name] == 1.0 for name in SINGLE_LABEL)


def test_undefined_values_are_nan_without_a_warning():
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
    assert all(np.isnan(rows[3][key]) for key in ("precision", "recall", "f1", "ap"))
    assert rows[3]["support"] == 0
    assert (rows[3]["confused_with"], rows[3]["confused_count"]) == (-1, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_per_class_agrees_with_sklearn(tied):
    scores, labels = single_label_data(tied=tied, absent=(2,))
    predicted = scores.argmax(axis=1)
    rows = per_class(scores, labels, 7)
    expected = sk.precision_recall_fscore_support(
        labels, predicted, labels=range(7), zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
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
    assert matrix.shape == (4, 4) and matrix.sum() == 3
    assert matrix[0, 1] == 2 and matrix[2, 2] == 1
    scores, labels = single_label_data(absent=(1,))
    predicted = scores.argmax(axis=1)
    expected = sk.confusion_matrix(labels, predicted, labels=range(7))
    assert (confusion(labels, predicted, 7) == expected).all()
    assert confusion([], [], 3).sum() == 0


@pytest.mark.parametrize("scores, labels, message", [
    (np.zeros((0, 3)), [], "no clips"),
    ([[0.5, 0.5], [np.nan, 1.0]], [0, 1], "row 1 of the scores"),
    ([[0.5, np.inf], [0.5, 0.5]], [0, 1], "row 0 of the scores"),
    ([[0.5, 0.5]], [2], "row 0 of the labels is 2"),
    ([[0.5, 0.5]], [-2], "row 0 of the labels is -2"),
    ([[0.5, 0.5]], [0.0], "integers"),
    ([[0.5, 0.5]], [0, 1], "2 labels for 1 rows"),
    ([0.5, 0.5], [0, 1], r"\(n, C\)"),
])
@pytest.mark.parametrize("function", [
    evaluate_scores,
    point_metrics,
    lambda scores, labels: per_class(scores, labels, 2),
    lambda scores, labels: recall_by_frequency(scores, labels, [2, 1]),
])
def test_error_names_the_invalid_row_or_shape(function, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        function(scores, labels)


def test_error_names_the_size_that_does_not_fit():
    with pytest.raises(ValueError, match="2 columns for 3 classes"):
        per_class([[0.5, 0.5]], [0], 3)
    with pytest.raises(ValueError, match="n_boot"):
        evaluate_scores([[0.5, 0.5]], [0], n_boot=0)
    with pytest.raises(ValueError, match="2 labels for 1 predictions"):
        confusion([0, 1], [0], 2)


def test_recall_by_frequency_equals_a_result_by_hand():
    # By training clips, classes 5, 0 and 3 are the head, 1 and 6 the middle, 2 and 4 the tail.
    # Class 3 has no test clip.
    labels = np.array([5, 5, 0, 0, 1, 6, 6, 2, 4, 4])
    guesses = np.array([5, 0, 0, 0, 2, 6, 6, 2, 2, 0])
    scores = np.eye(7)[guesses]
    counts = [40, 20, 2, 30, 1, 50, 10]
    expected = {"recall_head": 0.75, "recall_middle": 0.5, "recall_tail": 0.5}
    assert recall_by_frequency(scores, labels, counts) == expected
    few = labels < 2
    assert recall_by_frequency(scores[few], labels[few], counts)["recall_tail"] is None
    assert recall_by_frequency(scores, labels, np.full(len(counts), 7)) == {}


# --- intervals over groups ---

def correlated(n_groups, size, seed):
    """Clips of a group are all right or all wrong: (scores, labels, groups)."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), size)
    labels = rng.integers(0, 2, len(groups))
    is_right = (rng.random(n_groups) < 0.6)[groups]
    return np.eye(2)[np.where(is_right, labels, 1 - labels)], labels, groups


def test_interval_over_groups_contains_the_truth_and_the_one_over_clips_does_not():
    hits = {"groups": 0, "clips": 0}
    for seed in range(100):
        scores, labels, groups = correlated(30, 20, seed)
        for over, given in (("groups", groups), ("clips", None)):
            result = evaluate_scores(scores, labels, n_boot=200, groups=given)
            assert result.get("interval_over", "clips") == over
            low, high = result["accuracy_ci95"]
            hits[over] += low <= 0.6 <= high
    assert hits["groups"] >= 86
    assert hits["clips"] <= 60


def test_interval_over_groups_equals_a_loop_over_drawn_groups():
    scores, labels, groups = correlated(7, 3, 0)
    codes = np.array([50, 3, 8, 91, 4, 7, 1])[groups]  # any numbers
    result = evaluate_scores(scores, labels, n_boot=60, seed=3, groups=codes)
    rng, correct, accuracies = np.random.default_rng(3), scores.argmax(1) == labels, []
    by_group = [correct[codes == code] for code in np.unique(codes)]
    for _ in range(60):
        drawn = rng.integers(0, 7, 7)
        accuracies.append(np.concatenate([by_group[i] for i in drawn]).mean())
    assert result["accuracy_ci95"] == pytest.approx(np.percentile(accuracies, (2.5, 97.5)))
    assert result["groups"] == 7


def test_interval_without_shared_groups_is_the_one_over_clips_to_the_last_bit():
    scores, labels = single_label_data(n=30)
    plain = evaluate_scores(scores, labels, n_boot=50)
    for groups in (np.arange(30)[::-1], np.zeros(30, int)):  # all their own, all the same
        result = evaluate_scores(scores, labels, n_boot=50, groups=groups)
        assert result.pop("groups") == len(set(groups)) and result.pop("interval_over") == "clips"
        assert result == plain
