"""False alarms per hour against loops; their intervals against simulations with a known rate."""
import json
import math

import numpy as np
import pytest
from scipy import stats

from metrics.false_alarms import (
    false_alarms,
    false_alarms_at_recall,
    poisson_interval,
    recall_at,
)

HOUR = 1 / 3600  # a window of one second, in hours


def data(seed, n=60, m=90, n_classes=4, multi_label=False, tied=False, dtype=np.float64):
    """Scores and labels of n clips, scores of m negatives; `tied` leaves eleven values."""
    rng = np.random.default_rng(seed)
    scores, negatives = rng.random((n, n_classes)), rng.random((m, n_classes))
    if multi_label:
        labels = rng.choice([0, 0, 1, np.nan], size=(n, n_classes))
    else:
        labels = rng.integers(0, n_classes - 1, size=n)  # the last class has no clips
    if tied:
        scores, negatives = scores.round(1), negatives.round(1)
    return scores.astype(dtype), labels, negatives.astype(dtype)


def is_candidate(row, c, top_k):
    """Whether class c is among the top_k of a row; a loop."""
    if top_k is None:
        return True
    higher = sum(row[other] > row[c] or (row[other] == row[c] and other < c)
                 for other in range(len(row)))
    return higher < top_k


def fires(row, c, threshold, top_k):
    return row[c] >= threshold and is_candidate(row, c, top_k)


def positives_of(labels, c):
    return np.flatnonzero(labels[:, c] == 1 if labels.ndim == 2 else labels == c)


# --- counts and rates ---

@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_a_loop(top_k, tied):
    scores = data(1, tied=tied)[2]
    thresholds = np.array([0.5, 0.9, 0.3, 2.0])
    result = false_alarms(scores, thresholds, 3 * HOUR, np.arange(90) // 10, top_k)
    alarms = [[fires(row, c, thresholds[c], top_k) for c in range(4)] for row in scores]
    hours = 90 * 3 / 3600
    assert result["hours"] == pytest.approx(hours, rel=1e-12)
    assert result["recordings"] == 9
    assert result["windows_with_alarm"] == sum(map(any, alarms)) > 0
    assert result["per_hour"] == pytest.approx(sum(map(any, alarms)) / hours)
    for c, row in enumerate(result["per_class"]):
        count = sum(alarm[c] for alarm in alarms)
        assert (row["count"], row["per_hour"]) == (count, pytest.approx(count / hours))
        low, high = row["per_hour_ci95"]
        assert 0 <= low <= row["per_hour"] < high
    assert result["per_class"][3]["count"] == 0


def test_windows_may_differ_in_length():
    hours = np.array([0.5, 0.25, 0.25])
    result = false_alarms([[0.9], [0.1], [0.9]], [0.5], hours, [0, 0, 1])
    assert (result["hours"], result["per_hour"]) == (1.0, 2.0)


def test_float32_score_equal_to_its_threshold_is_an_alarm():
    score = np.array([[0.7]], dtype=np.float32)
    assert score.astype(np.float64)[0, 0] < 0.7  # after rounding
    assert false_alarms(score, [0.7], 1.0, [0])["windows_with_alarm"] == 1


def test_results_are_plain_numbers():
    scores, labels, negatives = data(2, dtype=np.float32)
    groups = np.arange(90) % 7
    for result in (
        false_alarms(negatives, np.full(4, 0.5, np.float32), 1.0, groups, 1),
        recall_at(scores, labels, negatives, 1.0),
        false_alarms_at_recall(scores, labels, negatives, 1.0, top_k=1),
    ):
        json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("top_k", [1, 3])
def test_first_of_tied_classes_are_the_top_ones(top_k):
    result = false_alarms(np.full((1, 100), 0.9), np.full(100, 0.5), 1.0, [0], top_k)
    assert [row["count"] for row in result["per_class"]] == [1] * top_k + [0] * (100 - top_k)


def test_several_top_classes_are_not_counted_twice_per_hour():
    result = false_alarms([[0.9, 0.8], [0.1, 0.2]], [0.5, 0.5], 1.0, [0, 0])
    assert result["windows_with_alarm"] == 1
    assert [row["count"] for row in result["per_class"]] == [1, 1]


# --- intervals ---

def test_interval_without_overdispersion_is_the_exact_poisson_one():
    for count in (0, 1, 2, 10, 500):
        low, high = poisson_interval(count)
        assert high == pytest.approx(stats.chi2.ppf(0.975, 2 * count + 2) / 2)
        assert low == pytest.approx(stats.chi2.ppf(0.025, 2 * count) / 2 if count else 0)


def test_no_alarm_has_a_positive_upper_bound():
    result = false_alarms(np.zeros((1200, 2)), [0.5, 0.5], 3 * HOUR, np.arange(1200) // 100)
    low, high = result["per_hour_ci95"]
    assert (low, result["per_hour"]) == (0, 0)
    assert high == pytest.approx(-math.log(0.025))  # 3.7 in one hour
    assert result["per_class"][1]["per_hour_ci95"] == result["per_hour_ci95"]


def alarms_of(counts, n_windows):
    """Scores of one class: `counts[g]` alarms among the windows of recording g."""
    scores = np.zeros((len(counts), n_windows))
    for row, count in zip(scores, counts):
        row[:int(count)] = 1
    groups = np.repeat(np.arange(len(counts)), n_windows)
    return scores.reshape(-1, 1), groups


def test_interval_over_one_recording_takes_windows():
    scores, _ = alarms_of([10], 100)
    one = false_alarms(scores, [0.5], 0.01, np.zeros(100))
    assert (one["interval_over"], one["recordings"]) == ("windows", 1)
    assert one["per_hour_ci95"] == pytest.approx([float(v) for v in poisson_interval(10)])
    even = false_alarms(scores, [0.5], 0.01, np.arange(100) % 10)  # one alarm in each recording
    assert even["interval_over"] == "recordings"
    assert even["per_hour_ci95"] == pytest.approx(one["per_hour_ci95"])


def test_alarms_in_few_recordings_widen_the_interval():
    counts = [[4] * 10, [40] + [0] * 9]
    widths = []
    for per_recording in counts:
        scores, groups = alarms_of(per_recording, 50)
        low, high = false_alarms(scores, [0.5], 1.0, groups)["per_hour_ci95"]
        widths.append(high - low)
    assert widths[1] > 4 * widths[0]
    # All alarms as one event: the interval of one event, forty alarms each.
    assert high * 500 == pytest.approx(40 * poisson_interval(1)[1])


def test_dispersion_equals_pearson_of_a_loop():
    counts, hours = np.array([9, 1, 4, 0, 12, 2]), np.array([1.0, 2, 1, 0.5, 3, 2])
    scores, groups = alarms_of(counts, 20)
    result = false_alarms(scores, [0.5], hours[groups] / 20, groups)
    expected = counts.sum() * hours / hours.sum()
    phi = sum((counts - expected) ** 2 / expected) / 5
    phi *= (stats.t.ppf(0.975, 5) / stats.norm.ppf(0.975)) ** 2
    assert 1 < phi < counts.sum()
    low, high = poisson_interval(counts.sum(), phi)
    assert result["per_hour_ci95"] == pytest.approx([low / hours.sum(), high / hours.sum()])


def coverage(shape, n_recordings, expected, n_trials=400, seed=0):
    """How often the interval contains the true rate; rates of recordings are gamma or equal."""
    rng = np.random.default_rng([seed, n_recordings, expected])
    hours = rng.uniform(0.5, 2, n_recordings)
    hours /= hours.sum()
    n_inside = 0
    for _ in range(n_trials):
        rate = rng.gamma(shape, 1 / shape, n_recordings) if shape else 1.0
        counts = rng.poisson(expected * hours * rate)
        n_windows = max(1, int(counts.max()))
        scores, groups = alarms_of(counts, n_windows)
        result = false_alarms(scores, [0.5], hours[groups] / n_windows, groups)
        low, high = result["per_hour_ci95"]
        n_inside += low <= expected <= high
    return n_inside / n_trials


@pytest.mark.parametrize("shape", [None, 2, 1])
@pytest.mark.parametrize("n_recordings, expected", [(6, 5), (6, 50), (15, 20), (30, 100)])
def test_interval_contains_the_true_rate(shape, n_recordings, expected):
    assert coverage(shape, n_recordings, expected) >= 0.90


def test_control_plain_poisson_misses_the_rate_of_uneven_recordings(monkeypatch):
    monkeypatch.setattr("metrics.false_alarms._dispersion", lambda *args: np.ones(1))
    assert coverage(1, 15, 50) < 0.75


# --- recall at a rate of false alarms ---

def lowest_threshold(negatives, c, allowed, candidates, top_k):
    """The lowest of the candidates with at most `allowed` alarms; a loop."""
    for threshold in sorted(candidates):
        if sum(fires(row, c, threshold, top_k) for row in negatives) <= allowed:
            return threshold
    raise AssertionError("no candidate is high enough")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_recall_at_equals_brute_force(seed, multi_label, top_k):
    dtype = [np.float64, np.float32][seed % 2]
    scores, labels, negatives = data(seed, multi_label=multi_label, tied=seed > 1, dtype=dtype)
    rates = (0.5, 1, 7, 49.5, 1000)  # 49.5: all negatives but one
    result = recall_at(scores, labels, negatives, 0.02, rates, top_k)  # 1.8 hours
    assert result["at"][0]["recall"] is None  # half an alarm per hour needs two hours
    for rate, row in zip(rates[1:], result["at"][1:]):
        recalls = []
        for c in range(4):
            own = positives_of(labels, c)
            between = np.concatenate([scores[:, c], negatives[:, c], [9.0]])
            threshold = lowest_threshold(negatives, c, rate * 1.8, between, top_k)
            found = [fires(scores[i], c, threshold, top_k) for i in own]
            recalls.append(np.mean(found) if len(own) else None)
            assert 0 <= row["thresholds"][c] <= 1.01
            # The threshold of the result keeps the promise, also after JSON.
            stored = dtype(json.loads(json.dumps(row["thresholds"][c])))
            assert sum(fires(r, c, stored, top_k) for r in negatives) <= rate * 1.8
            assert [fires(scores[i], c, stored, top_k) for i in own] == found
        assert row["per_class"] == pytest.approx(recalls)
        assert row["recall"] == pytest.approx(np.mean([r for r in recalls if r is not None]))


def test_a_rate_needs_as_many_hours():
    scores, labels, negatives = data(3)
    row = recall_at(scores, labels, negatives, 9.9 / 90)["at"]
    assert [r["recall"] is None for r in row] == [True, False, False]
    row = recall_at(scores, labels, negatives, 10 / 90)["at"]
    assert [r["recall"] is None for r in row] == [False, False, False]
    assert [r["allowed"] for r in row] == [1, 10, 100]


def test_rounding_does_not_cost_an_alarm():
    assert 0.29 * 100 < 29
    result = recall_at([[1.0]], [0], np.zeros((120000, 1)), 3 / 3600, rates=(0.29,))
    assert result["at"][0]["allowed"] == 29


def test_perfect_scores_have_full_recall():
    result = recall_at(np.eye(3), [0, 1, 2], np.zeros((100, 3)), 1.0)
    assert [row["recall"] for row in result["at"]] == [1, 1, 1]


# --- false alarms at equal recall ---

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("top_k", [None, 2])
def test_false_alarms_at_recall_equal_brute_force(seed, multi_label, top_k):
    scores, labels, negatives = data(seed, multi_label=multi_label, tied=seed > 1)
    recall = 0.3 if top_k else 0.9
    result = false_alarms_at_recall(scores, labels, negatives, 0.1, recall, top_k)
    thresholds, n_not_reached = {}, 0
    for c in range(4):
        own = positives_of(labels, c)
        enough = [t for t in scores[:, c]
                  if len(own) and np.mean([fires(scores[i], c, t, top_k) for i in own]) >= recall]
        if enough:
            thresholds[c] = max(enough)
        n_not_reached += bool(len(own) and not enough)
        row = result["per_class"][c]
        assert row["threshold"] == thresholds.get(c)
        if enough:
            count = sum(fires(r, c, thresholds[c], top_k) for r in negatives)
            assert row["per_hour"] == pytest.approx(count / 9)
        else:
            assert row["per_hour"] is None
    windows = sum(any(fires(r, c, t, top_k) for c, t in thresholds.items()) for r in negatives)
    assert result["per_hour"] == pytest.approx(windows / 9)
    assert result["not_reached"] == n_not_reached


def test_recall_out_of_reach_is_counted():
    scores = np.array([[0.9, 0.1], [0.9, 0.2], [0.1, 0.8]])
    result = false_alarms_at_recall(scores, [0, 1, 1], [[0.1, 0.9]], 1.0, 0.9, top_k=1)
    assert result["not_reached"] == 1
    assert [row["threshold"] for row in result["per_class"]] == [0.9, None]


def test_recall_is_not_rounded_up():
    assert 0.56 * 25 > 14
    scores = np.arange(1, 26)[:, None] / 25
    result = false_alarms_at_recall(scores, np.zeros(25, int), [[0.0]], 1.0, recall=0.56)
    assert result["per_class"][0]["threshold"] == 12 / 25  # 14 of 25 clips


# --- bad input ---

@pytest.mark.parametrize("arguments", [
    (np.zeros((0, 2)), [0.5, 0.5], 1.0, []),
    (np.full((3, 2), np.nan), [0.5, 0.5], 1.0, [0, 0, 0]),
    (np.zeros((3, 2)), [0.5], 1.0, [0, 0, 0]),
    (np.zeros((3, 2)), [0.5, np.nan], 1.0, [0, 0, 0]),
    (np.zeros((3, 2)), [0.5, 0.5], [1.0, 1.0], [0, 0, 0]),
    (np.zeros((3, 2)), [0.5, 0.5], 0.0, [0, 0, 0]),
    (np.zeros((3, 2)), [0.5, 0.5], 1.0, [0, 0]),
    (np.zeros((3, 2)), [0.5, 0.5], 1.0, [0, 0, 0], 0),
])
def test_bad_input_is_refused(arguments):
    with pytest.raises(ValueError):
        false_alarms(*arguments)


@pytest.mark.parametrize("labels, negatives", [
    ([0, 1], np.zeros((4, 2))), ([0, 1, 1], np.zeros((4, 3))), ([0, 1, 1], np.zeros((0, 2))),
])
def test_sides_that_do_not_fit_are_refused(labels, negatives):
    with pytest.raises(ValueError):
        recall_at(np.zeros((3, 2)), labels, negatives, 1.0)
    with pytest.raises(ValueError):
        false_alarms_at_recall(np.zeros((3, 2)), labels, negatives, 1.0)
