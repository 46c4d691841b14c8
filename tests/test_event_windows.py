"""Windows of annotated recordings against sets of ticks, counted bit by bit."""
import time

import numpy as np
import pytest

from data.annotations.event_windows import windows_of

TICK = 0.05  # seconds


def reference(events, total, length, hop, n_classes, min_overlap, fraction):
    """The same in integer ticks; a stretch of time is an int with one bit per tick.

    fraction: (numerator, denominator). -> [(start, end, present classes, partial classes)]
    """
    bounds, position = [], 0
    while position + length < total:
        bounds.append((position, position + length))
        position += hop
    bounds.append((max(0, total - length), total))
    result = []
    for begin, finish in bounds:
        window = ((1 << finish) - 1) & ~((1 << begin) - 1)
        present, touched = set(), set()
        for c in range(n_classes):
            union = 0
            for start, end, label in events:
                if label != c:
                    continue
                if start == end:
                    if begin <= start < finish or start == finish == total:
                        present.add(c)
                    continue
                start, end = max(start, 0), min(end, total)
                if start >= end:
                    continue
                bits = (1 << end) - (1 << start)
                union |= bits & window
                n_inside = (bits & window).bit_count()
                if n_inside:
                    touched.add(c)
                    if n_inside * fraction[1] >= fraction[0] * (end - start):
                        present.add(c)
            if union and union.bit_count() >= min_overlap:
                present.add(c)
        result.append((begin, finish, present, touched - present))
    return result


def as_reference(windows, tick=TICK):
    """The result of `windows_of` in the form of `reference`."""
    return [
        (round(start / tick), round(end / tick), set(np.flatnonzero(present).tolist()),
         set(np.flatnonzero(partial).tolist()))
        for start, end, present, partial in zip(*windows)
    ]


def random_case(rng):
    total, length = int(rng.integers(1, 60)), int(rng.integers(1, 20))
    hop = int(rng.integers(1, length + 3))
    n_events = int(rng.integers(0, 9))
    start = rng.integers(-3, total + 4, size=n_events)
    end = start + rng.integers(0, rng.choice([2, 8, 40]), size=n_events)
    label = rng.integers(0, 3, size=n_events)
    min_overlap = int(rng.integers(0, 8))
    fraction = (int(rng.integers(1, 26)), 25)
    return start, end, label, total, length, hop, min_overlap, fraction


def call(start, end, label, total, length, hop, min_overlap, fraction, tick=TICK):
    return windows_of(start * tick, end * tick, label, total * tick, length * tick, hop * tick, 3,
                      min_overlap * tick, fraction[0] / fraction[1])


@pytest.mark.parametrize("seed", range(4))
def test_random_intervals_equal_a_count_of_ticks(seed):
    rng = np.random.default_rng(seed)
    n_present = n_partial = 0
    for _ in range(2500):
        case = random_case(rng)
        start, end, label, total, length, hop, min_overlap, fraction = case
        events = list(zip(start.tolist(), end.tolist(), label.tolist()))
        expected = reference(events, total, length, hop, 3, min_overlap, fraction)
        windows = call(*case)
        assert as_reference(windows) == expected, case
        assert not (windows.present & windows.partial).any()
        n_present += windows.present.sum()
        n_partial += windows.partial.sum()
    assert n_present > 5000 and n_partial > 2000  # the cases are not all empty


def test_control_reference_sees_a_strict_comparison():
    # An event of exactly min_overlap seconds in the window.
    assert reference([(4, 14, 0)], 10, 5, 5, 1, 5, (9, 10))[1][2] == {0}
    assert reference([(6, 14, 0)], 10, 5, 5, 1, 5, (9, 10))[1][2] == {0}  # clipped to the end
    assert reference([(3, 9, 0)], 10, 5, 5, 1, 5, (9, 10))[1][2:] == (set(), {0})


# --- windows ---

def starts_of(duration, seconds, hop):
    windows = windows_of([], [], [], duration, seconds, hop, 1)
    return list(zip(windows.starts.tolist(), windows.ends.tolist()))


def test_last_window_ends_with_the_recording():
    assert starts_of(10, 3, 3) == [(0, 3), (3, 6), (6, 9), (7, 10)]
    assert starts_of(9, 3, 3) == [(0, 3), (3, 6), (6, 9)]
    assert starts_of(5, 3, 1.5) == [(0, 3), (1.5, 4.5), (2, 5)]


def test_short_recording_is_one_window():
    assert starts_of(1.25, 3, 3) == [(0, 1.25)]
    windows = windows_of([0.0], [9.0], [0], 0.1, 3, 3, 1)
    assert windows.present.tolist() == [[True]]


def test_times_that_floats_cannot_hold_are_exact():
    # 0.1 * 3 is not 0.3 in floats; a window that ends at 0.3 does not contain such a point.
    windows = windows_of([0.1 * 3], [0.1 * 3], [0], 0.9, 0.3, 0.3, 1)
    assert windows.present[:, 0].tolist() == [False, True, False]
    assert windows.starts.tolist() == [0, 0.3, 0.6]
    assert int(2.01 * 1e6) < 2_010_000
    windows = windows_of([2.01], [2.01], [0], 4, 2.01, 2.01, 1)
    assert windows.present[:, 0].tolist() == [False, True]
    # 14 of 25 parts are 0.56, though 0.56 * 25 > 14 in floats.
    windows = windows_of([0.86], [1.11], [0], 2, 1, 1, 1, min_overlap=5, min_fraction=0.56)
    assert windows.present[:, 0].tolist() == [True, False]


# --- events ---

def labels_of(events, **options):
    """"p" present, "?" partial, "-" absent, in four windows of 3 s; events of one class."""
    start, end = zip(*events)
    windows = windows_of(start, end, [0] * len(start), 12, 3, 3, 1, **options)
    return "".join("p" if present else "?" if partial else "-"
                   for present, partial in zip(windows.present[:, 0], windows.partial[:, 0]))


@pytest.mark.parametrize("events, expected", [
    ([(1, 2)], "p---"),
    ([(2.75, 4)], "pp--"),  # exactly 0.25 s
    ([(2.8, 4)], "?p--"),
    ([(2.9, 3.1)], "pp--"),  # half of it in each
    ([(2.95, 3.1)], "?p--"),
    ([(1, 1.01)], "p---"),  # short, but it lies within
    ([(3, 6)], "-p--"),  # it touches the neighbours without reaching into them
    ([(0, 12)], "pppp"),
    ([(3, 3)], "-p--"),  # a point belongs to the window that begins there
    ([(12, 12)], "---p"),  # except at the end
    ([(12.1, 12.1), (13, 14), (-2, -1)], "----"),
    ([(2.9, 4), (0, 0.15)], "pp--"),  # 0.1 s in the first is not enough, but a whole event is
    ([(-1, 0.15), (2.85, 4)], "pp--"),  # 0.3 s together
    ([(2.8, 4), (2.85, 5)], "?p--"),  # 0.2 s together: overlaps count once
    ([(11.9, 13)], "---p"),  # all of it that is in the recording
])
def test_events(events, expected):
    assert labels_of(events) == expected


def test_options():
    assert labels_of([(2.8, 4)], min_overlap=0.2) == "pp--"
    assert labels_of([(2.9, 3.1)], min_fraction=1) == "??--"
    assert labels_of([(2.5, 4)], min_overlap=1, min_fraction=0.6) == "?p--"
    assert labels_of([(2.5, 4)], min_overlap=0) == "pp--"


def test_with_half_of_it_every_event_counts_somewhere():
    rng = np.random.default_rng(0)
    for length in (0.01, 0.1, 0.3, 2.0):
        for start in rng.uniform(0, 12 - length, 200):
            assert "p" in labels_of([(start, start + length)], min_overlap=2.5)


def test_order_and_repeats_of_events_change_nothing():
    rng = np.random.default_rng(1)
    start, end, label, *rest = random_case(np.random.default_rng(12))
    expected = call(start, end, label, *rest)
    order = rng.permutation(np.repeat(np.arange(len(start)), 2))
    windows = call(start[order], end[order], label[order], *rest)
    assert as_reference(windows) == as_reference(expected)
    assert len(start) > 2


def test_no_events():
    windows = windows_of([], [], [], 10, 3, 3, 5)
    assert windows.present.shape == windows.partial.shape == (4, 5)
    assert not windows.present.any() and not windows.partial.any()


# --- size ---

def test_many_events_take_seconds():
    rng = np.random.default_rng(2)
    begin = time.process_time()
    for _ in range(200):  # a tenth of 2,000 recordings of ten minutes with 100 events each
        start = rng.uniform(0, 600, 100)
        windows_of(start, start + rng.exponential(1, 100), rng.integers(0, 50, 100), 600, 3, 3, 50)
    assert time.process_time() - begin < 2


# --- bad input ---

@pytest.mark.parametrize("change", [
    {"duration": 0}, {"seconds": 0}, {"hop": 0}, {"min_overlap": -1}, {"min_fraction": 0},
    {"min_fraction": 1.5}, {"events_end": [0.5]}, {"events_end": [np.nan]},
    {"events_class": [2]}, {"events_class": [-1]}, {"events_class": [0, 1]},
])
def test_bad_input_is_refused(change):
    arguments = {"events_start": [1], "events_end": [2], "events_class": [0], "duration": 10,
                 "seconds": 3, "hop": 3, "n_classes": 2}
    windows_of(**arguments)
    with pytest.raises(ValueError):
        windows_of(**{**arguments, **change})
