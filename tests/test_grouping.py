"""Codes, groupings and their merging."""
import numpy as np

from data.grouping import factorize, indices_by_value, is_repeated, merge_groups


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
