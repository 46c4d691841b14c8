"""Event-level scores against loops, and matchings against all permutations."""
import itertools
import json

import numpy as np
import pytest

from metrics import resample_counts
from metrics.events import Events, join_all_windows, join_windows, match_events, score_events


def events(*rows):
    """Events from (recording, start, end, label) tuples."""
    columns = zip(*rows) if rows else ([], [], [], [])
    return Events(*(np.array(list(column)) for column in columns))


def random_events(rng, n, n_recordings=2, n_classes=2):
    start = rng.integers(0, 12, n)
    end = start + rng.integers(0, 8, n)
    return Events(rng.integers(0, n_recordings, n), start * 0.5, end * 0.5,
                  rng.integers(0, n_classes, n))


def fits(true, predicted, i, j, min_share, min_iou):
    """Whether two events fit; times are multiples of half a second."""
    if true.recording[i] != predicted.recording[j] or true.label[i] != predicted.label[j]:
        return False
    ticks_true = set(range(round(2 * true.start[i]), round(2 * true.end[i])))
    ticks = set(range(round(2 * predicted.start[j]), round(2 * predicted.end[j])))
    if not ticks_true or not ticks:  # a point
        inside = (true.start[i] <= predicted.end[j] and predicted.start[j] <= true.end[i])
        return inside and min_iou == 0
    shared = len(ticks_true & ticks)
    return (shared > 0 and shared >= min_share * min(len(ticks_true), len(ticks))
            and shared >= min_iou * len(ticks_true | ticks))


def largest_matching(graph):
    """Size of the largest matching of a bool matrix; tries all permutations."""
    graph = graph if graph.shape[0] <= graph.shape[1] else graph.T
    rows = range(graph.shape[0])
    return max(sum(graph[i, j] for i, j in zip(rows, columns))
               for columns in itertools.permutations(range(graph.shape[1]), graph.shape[0]))


# --- joining windows ---

@pytest.mark.parametrize("active, expected", [
    ("-----", []),
    ("11111", [(0, 15)]),
    ("1-1--", [(0, 3), (6, 9)]),
    ("-11-1", [(3, 9), (12, 15)]),
    ("----1", [(12, 15)]),
])
def test_runs_of_windows(active, expected):
    starts = np.arange(5) * 3.0
    assert join_windows(starts, starts + 3, [a == "1" for a in active]) == expected


def test_overlapping_windows_join_and_gaps_do_not():
    assert join_windows([0, 1, 2], [3, 4, 5], [1, 1, 1]) == [(0, 5)]
    assert join_windows([0, 1, 2], [3, 4, 5], [1, 0, 1]) == [(0, 3), (2, 5)]
    assert join_windows([0, 4, 8], [3, 7, 11], [1, 1, 1]) == [(0, 3), (4, 7), (8, 11)]
    assert join_windows([0, 0.1 * 3], [0.3, 0.6], [1, 1]) == [(0, 0.6)]  # 0.1 * 3 > 0.3
    assert join_windows([], [], []) == []


def test_windows_out_of_order_are_refused():
    for starts, ends in (([3, 0], [6, 3]), ([0, 1], [6, 3])):
        with pytest.raises(ValueError):
            join_windows(starts, ends, [1, 1])


def test_all_classes_and_recordings_join_as_each_alone():
    rng = np.random.default_rng(0)
    recording = np.repeat([0, 1, 2], [5, 1, 7])
    starts = np.concatenate([np.arange(n) * 2.0 for n in (5, 1, 7)])
    active = rng.random((13, 4)) < 0.6
    active[:, 2] = False
    joined = join_all_windows(recording, starts, starts + 2, active)
    expected = []
    for c, r in itertools.product(range(4), range(3)):
        rows = recording == r
        runs = join_windows(starts[rows], starts[rows] + 2, active[rows, c])
        expected += [(r, *run, c) for run in runs]
    assert list(zip(*(values.tolist() for values in joined))) == expected
    assert len(join_all_windows(recording, starts, starts + 2, active & False).start) == 0


# --- matching ---

@pytest.mark.parametrize("min_share, min_iou", [(0.5, 0), (0, 0), (1, 0), (0, 0.3), (0.25, 0.5)])
def test_matching_is_the_largest_there_is(min_share, min_iou):
    rng = np.random.default_rng(3)
    n_matched = 0
    for _ in range(150):
        true = random_events(rng, int(rng.integers(0, 7)))
        predicted = random_events(rng, int(rng.integers(0, 7)))
        graph = np.array([[fits(true, predicted, i, j, min_share, min_iou)
                           for j in range(len(predicted.start))] for i in range(len(true.start))],
                         dtype=bool).reshape(len(true.start), len(predicted.start))
        match, is_met, hits = match_events(true, predicted, min_share, min_iou)
        pairs = [(i, j) for i, j in enumerate(match) if j >= 0]
        assert all(graph[pair] for pair in pairs)
        assert len({j for _, j in pairs}) == len(pairs)
        assert len(pairs) == largest_matching(graph)
        assert is_met.tolist() == graph.any(axis=1).tolist()
        assert hits.tolist() == graph.any(axis=0).tolist()
        n_matched += len(pairs)
    assert n_matched > 20


def test_matching_is_not_greedy():
    # In order, the first event takes the only one that fits the second.
    true, predicted = events((0, 0, 4, 0), (0, 0, 1, 0)), events((0, 0, 2, 0), (0, 2, 4, 0))
    match, _, _ = match_events(true, predicted)
    assert match.tolist() == [1, 0]


def test_short_call_in_a_window_is_found():
    true, predicted = events((0, 1, 1.3, 0)), events((0, 0, 3, 0))
    assert match_events(true, predicted)[0].tolist() == [0]
    assert match_events(true, predicted, min_iou=0.3)[0].tolist() == [-1]
    # Only a third of the call is in the window.
    assert match_events(events((0, 2.9, 3.2, 0)), predicted)[0].tolist() == [-1]


def test_same_times_in_another_class_or_recording_do_not_fit():
    for row in ((1, 0, 3, 0), (0, 0, 3, 1)):
        assert match_events(events((0, 0, 3, 0)), events(row))[0].tolist() == [-1]


def test_predicted_events_may_overlap():
    short = [(0, t, t + 1, 0) for t in range(1, 40, 2)]
    predicted = events((0, 0, 100, 0), *short)
    assert match_events(events((0, 80, 81, 0)), predicted)[0].tolist() == [0]
    # Each of the short ones fits two: itself and the long one.
    match, is_met, hits = match_events(events(*short), predicted)
    assert (match >= 0).all() and is_met.all() and hits.all()


# --- scores ---

def small_example():
    true = events((0, 1, 2, 0), (0, 5, 6, 0), (1, 1, 2, 0), (1, 1, 2, 1))
    predicted = events((0, 0, 3, 0), (1, 0, 3, 0), (1, 6, 9, 0), (2, 0, 3, 0))
    return true, predicted


def test_counts_and_ratios():
    result = score_events(*small_example(), n_classes=3, n_recordings=3)
    row = result["per_class"][0]
    assert (row["found"], row["missed"], row["false"]) == (2, 1, 2)
    assert (row["precision"], row["recall"]) == (2 / 4, 2 / 3)
    assert row["f1"] == pytest.approx(4 / 7)
    row = result["per_class"][1]
    assert (row["precision"], row["recall"], row["f1"]) == (None, 0, 0)
    row = result["per_class"][2]
    assert (row["precision"], row["recall"], row["f1"], row["f1_ci95"]) == (None,) * 4
    micro, macro = result["micro"], result["macro"]
    assert (micro["found"], micro["missed"], micro["false"]) == (2, 2, 2)
    assert (micro["precision"], micro["recall"]) == (0.5, 0.5)
    assert (macro["recall"], macro["precision"]) == (pytest.approx(1 / 3), 0.5)
    json.dumps(result, allow_nan=False)


def test_mean_over_classes_leaves_out_classes_without_events():
    result = score_events(events((0, 0, 1, 0)), events((0, 0, 1, 0), (0, 0, 1, 1)), 2, 1)
    assert result["per_class"][1]["precision"] == 0
    assert (result["macro"]["precision"], result["micro"]["precision"]) == (1, 0.5)


def test_series_of_calls_in_one_predicted_event():
    true = events(*((0, 2 * i, 2 * i + 1, 0) for i in range(5)))
    row = score_events(true, events((0, 0, 12, 0)), 1, 1)["micro"]
    assert (row["recall"], row["recall_any"]) == (0.2, 1)
    assert (row["precision"], row["precision_any"]) == (1, 1)
    row = score_events(events((0, 0, 12, 0)), true, 1, 1)["micro"]
    assert (row["precision"], row["precision_any"], row["recall_any"]) == (0.2, 1, 1)


def test_intervals_equal_a_loop_over_recordings():
    rng = np.random.default_rng(5)
    true, predicted = random_events(rng, 60, 8, 3), random_events(rng, 50, 8, 3)
    result = score_events(true, predicted, 3, 8, n_boot=200, seed=7)
    weights = np.concatenate(list(resample_counts(8, 200, 7)), axis=1).T
    match = match_events(true, predicted)[0]
    recalls, macros = [], []
    for weight in weights:
        n_true = [sum(weight[true.recording[true.label == c]]) for c in range(3)]
        n_found = [sum(weight[true.recording[(true.label == c) & (match >= 0)]]) for c in range(3)]
        recalls.append(sum(n_found) / sum(n_true))
        macros.append(np.mean([f / n for f, n in zip(n_found, n_true) if n]))
    assert result["micro"]["recall_ci95"] == pytest.approx(np.percentile(recalls, (2.5, 97.5)))
    assert result["macro"]["recall_ci95"] == pytest.approx(np.percentile(macros, (2.5, 97.5)))
    low, high = result["micro"]["recall_ci95"]
    assert low < result["micro"]["recall"] < high


def test_one_recording_has_no_interval():
    result = score_events(events((0, 0, 1, 0)), events((0, 0, 1, 0)), 1, 1)
    assert (result["micro"]["f1"], result["micro"]["f1_ci95"]) == (1, None)


def test_no_events_at_all():
    result = score_events(events(), events(), 2, 3)
    assert result["micro"]["found"] == 0
    assert result["micro"]["recall"] is result["macro"]["f1"] is None


@pytest.mark.parametrize("row", [(0, 0, 1, 2), (0, 0, 1, -1), (3, 0, 1, 0), (0, 2, 1, 0),
                                 (0, 0, np.nan, 0)])
def test_bad_events_are_refused(row):
    with pytest.raises(ValueError):
        score_events(events(row), events(), 2, 3)
    with pytest.raises(ValueError):
        score_events(events(), events(row), 2, 3)
