"""Codes, groupings and their merging."""
import numpy as np
import pytest

from data.grouping import factorize, group_by_name, indices_by_value, is_repeated, merge_groups


def as_sets(codes):
    """The grouping as a set of sets of rows."""
    return {frozenset(np.flatnonzero(codes == code).tolist()) for code in codes}


def merge_plainly(first, second):
    """The same as `merge_groups` by merging sets of rows one by one."""
    sets = [{row} for row in range(len(first))]
    for column in (first, second):
        for value in set(column.tolist()):
            rows = set(np.flatnonzero(column == value).tolist())
            touched = [group for group in sets if group & rows]
            sets = [group for group in sets if not group & rows] + [set().union(*touched)]
    return set(map(frozenset, sets))


def test_factorize():
    assert factorize(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]
    assert factorize([]).dtype == np.int32


def test_indices_by_value():
    groups = indices_by_value(np.array([5, 2, 5, 9]))
    assert [group.tolist() for group in groups] == [[1], [0, 2], [3]]
    assert indices_by_value(np.array([])) == []


def test_is_repeated():
    assert is_repeated(np.array([3, 1, 3, 2])).tolist() == [True, False, True, False]
    assert is_repeated(np.array([], np.int64)).tolist() == []


def test_merge_groups_of_known_cases():
    merged = merge_groups(np.array([0, 1, 2, 3]), np.array([0, 0, 1, 2]))
    assert merged.tolist() == [0, 0, 1, 2]
    merged = merge_groups(np.array([0, 1, 1, 2, 5]), np.array([7, 7, 3, 3, 0]))
    assert len(set(merged.tolist())) == 2
    first = np.array([1, 0, 1, 2])
    assert merge_groups(first, np.array([3, 0, 2, 1])).tolist() == first.tolist()


def test_merge_groups_against_plain_merging():
    rng = np.random.default_rng(1)
    for _ in range(50):
        first, second = rng.integers(0, 12, 15), rng.integers(0, 20, 15)
        assert as_sets(merge_groups(first, second)) == merge_plainly(first, second)


# ---- numbers in file names that are no times

def source_of(names, n_classes=2):
    """-> (groups, where they come from, notes) of such files in classes by turns."""
    notes = []
    paths = sorted(f"{'abcd'[i % n_classes]}/{name}.wav" for i, name in enumerate(names))
    labels = np.array(["abcd".index(path[0]) for path in paths])
    group, source = group_by_name(paths, np.arange(len(paths)), labels, notes)
    return group, source, notes


def test_a_running_index_is_no_time_range():
    names = [f"{word}_{person}_{i:03d}" for word in ("cough", "breath")
             for person in (1, 2, 3) for i in range(10, 40)]
    group, source, notes = source_of(names)
    assert source == "each file alone" and len(set(group.tolist())) == len(names)
    assert "the ranges overlap" in notes[0] and "column group" in notes[0]


def test_numbers_of_actors_are_no_time_range_but_named():
    names = [f"03-01-{emotion:02d}-01-{text:02d}-01-{actor:02d}"
             for actor in range(1, 13) for text in (1, 2) for emotion in (1, 2, 3, 4)]
    _, source, notes = source_of(names, n_classes=4)
    assert source == "each file alone"
    assert any("part 7 has 12 values such as 01" in note and "column group" in note
               for note in notes)


def test_one_group_of_most_clips_is_refused():
    names = [f"take_{4 * i}_{4 * i + 4}" for i in range(30)] + ["x_0_4", "y_0_4"]
    _, source, notes = source_of(names)
    assert source == "each file alone" and "most clips into one group" in notes[0]


@pytest.mark.parametrize("ranges", [
    [(0, 4), (2, 6), (4, 8), (6, 10)],  # overlapping windows of one length
    [(0, 1.5), (1.5, 7), (9, 12.25), (13, 14)],  # events of several lengths
])
def test_control_time_ranges_are_grouped(ranges):
    names = [f"rec{r}_{first:g}_{last:g}" for r in range(5) for first, last in ranges]
    group, source, notes = source_of(names)
    assert source == "file name (time range)" and notes == []
    assert np.bincount(group).tolist() == [4] * 5
