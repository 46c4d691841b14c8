"""Splits of manifests made by hand and of many random ones."""
import tracemalloc

import numpy as np
import pytest
from recordings import assert_refused, make_manifest, split_of

from data.load import load_manifest
from data.manifest import SPLITS
from data.splits import assign_splits, audit, drop_rare, split_hash

TRAIN, VAL, TEST = range(3)


def counts_of(manifest):
    """(splits, classes) number of clips."""
    n_classes = len(manifest.classes)
    return np.stack([np.bincount(manifest.labels[manifest.rows(name)], minlength=n_classes)
                     for name in SPLITS])


def units_of(manifest, duplicates):
    """What must stay together, by plain merging: a list of sets of rows."""
    units = [set(np.flatnonzero(manifest.group == g).tolist())
             for g in set(manifest.group.tolist())]
    for rows in duplicates:
        touched = [unit for unit in units if unit & set(rows)]
        units = [unit for unit in units if not unit & set(rows)] + [set().union(*touched)]
    return units


def random_manifest(rng):
    """2 to 8 classes of 2 to 80 clips in uneven groups of one class. -> (manifest, duplicates)."""
    labels, group = [], []
    for c in range(rng.integers(2, 9)):
        n = int(rng.choice([2, 3, 4, 10, 30, 80]))
        labels += [f"class {c}"] * n
        group += (1000 * c + rng.integers(0, rng.integers(1, n + 1), n)).tolist()
    order = rng.permutation(len(labels))
    manifest = make_manifest([labels[i] for i in order], np.array(group)[order])
    duplicates = []
    for c in range(len(manifest.classes)):
        rows = rng.permutation(np.flatnonzero(manifest.labels == c))
        if rng.random() < 0.3 and len(rows) >= 4:
            duplicates.append(sorted(rows[:rng.integers(2, 4)].tolist()))
    return manifest, duplicates


def manifest_with_shared_groups(rng):
    """2 to 11 classes, even or skewed, in groups of several classes, like field recordings."""
    n, n_classes = rng.integers(10, 150), rng.integers(2, 12)
    if rng.random() < 0.5:
        labels = rng.integers(0, n_classes, n)
    else:
        labels = np.minimum(rng.geometric(0.3, n), n_classes) - 1
    group = rng.integers(0, max(2, int(n * rng.uniform(0.1, 0.8))), n)
    is_used = np.bincount(labels)[labels] > 1
    return make_manifest([f"class {label:02d}" for label in labels[is_used]], group[is_used])


# ---- new splits

def test_random_manifests():
    for trial in range(250):
        manifest, duplicates = random_manifest(np.random.default_rng(trial))
        units = units_of(manifest, duplicates)
        val, test = [(0.15, 0.15), (0.1, 0.2), (0.25, 0.25)][trial % 3]
        sizes = [[(manifest.labels[list(rows)] == c).sum() for rows in units]
                 for c in range(len(manifest.classes))]  # clips of each class in each unit
        n_units = [sum(size > 0 for size in of_class) for of_class in sizes]
        if max(n_units) < 2:
            assert_refused("no clips for test", "add recordings",
                           assign_splits, manifest, duplicates, val, test, trial)
            continue
        lines = assign_splits(manifest, duplicates, val, test, seed=trial)
        assert set(manifest.split.tolist()) <= {0, 1, 2} and manifest.split.dtype == np.int8
        for rows in units:
            assert len(set(manifest.split[list(rows)].tolist())) == 1, "a unit is divided"
        assert audit(manifest, duplicates) == []
        counts = counts_of(manifest)
        for c, name in enumerate(manifest.classes):
            assert counts[TRAIN, c] > 0, f"{name} is not in train"
            if n_units[c] > 1:
                assert counts[TEST, c] > 0, f"{name} is not in test"
            else:
                assert counts[VAL:, c].sum() == 0 and "are in one group" in "".join(lines)
            if n_units[c] > 2:
                assert counts[VAL, c] > 0, f"{name} is not in val"
                # Near the target shares: within the largest unit and one clip of rounding.
                for split, share in enumerate((1 - val - test, val, test)):
                    target = share * counts[:, c].sum()
                    assert abs(counts[split, c] - target) < max(sizes[c]) + 1


def test_groups_with_several_classes():
    n_testable = n_untested = n_unvalidated = 0
    deviations = []
    for trial in range(500):
        manifest = manifest_with_shared_groups(np.random.default_rng(trial))
        lines = assign_splits(manifest, [], seed=trial)
        assert audit(manifest, []) == []
        counts = counts_of(manifest)
        assert (counts[TRAIN] > 0).all(), "a class is not in train"
        n_groups = np.array([len(set(manifest.group[manifest.labels == c]))
                             for c in range(len(manifest.classes))])
        is_testable = n_groups > 1
        untested = [manifest.classes[c]
                    for c in np.flatnonzero(is_testable & (counts[TEST] == 0))]
        reported = [line.split(": ")[1].split(", ")
                    for line in lines if line.startswith("not in test, since ")]
        assert reported == ([untested] if untested else [])
        n_testable += is_testable.sum()
        n_untested += len(untested)
        n_unvalidated += ((n_groups > 2) & (counts[VAL] == 0)).sum()
        shares = (counts / counts.sum(axis=0))[:, n_groups > 2]
        targets = np.array([[0.7], [0.15], [0.15]])
        deviations += np.abs(shares - targets).mean(axis=0).tolist()
    # Not every class can be in all three splits if groups are shared. These are the figures of
    # this algorithm, with some room.
    assert 0 < n_untested < 0.006 * n_testable and n_unvalidated < 0.01 * n_testable
    assert np.mean(deviations) < 0.08


@pytest.mark.parametrize("sizes", [[1] * 100, [1, 2, 3, 4] * 15, [7, 1, 1, 5, 1, 2, 2] * 8])
def test_shares_per_class(sizes):
    group = np.repeat(np.arange(len(sizes)), sizes)
    labels = ["a"] * len(group) + ["b"] * len(group)
    manifest = make_manifest(labels, np.concatenate([group, group + 1000]))
    assign_splits(manifest, [], 0.15, 0.15)
    shares = counts_of(manifest) / len(group)
    assert np.abs(shares - np.array([[0.7], [0.15], [0.15]])).max() < 0.02


def test_few_clips():
    manifest = make_manifest(["one more"] * 3 + ["two"] * 2 + ["many"] * 20)
    assign_splits(manifest, [])
    assert counts_of(manifest).tolist() == [[14, 1, 1], [3, 1, 0], [3, 1, 1]]
    assert_refused("single clip cannot be trained and tested: rare", "--min-clips 2",
                   assign_splits, make_manifest(["rare"] + ["many"] * 20), [])
    # 1.5 clips of each class for val and for test: the odd clip goes to both equally often.
    manifest = make_manifest([f"class {c:02d}" for c in range(40) for _ in range(10)])
    assign_splits(manifest, [])
    assert counts_of(manifest).sum(axis=1).tolist() == [280, 60, 60]


def test_a_class_without_clips_is_reported():
    manifest = make_manifest(["a"] * 9 + ["b"] * 9 + ["c"] * 2).select(range(18))
    assert "classes without a readable clip: c" in assign_splits(manifest, [])
    assert counts_of(manifest)[:, 2].tolist() == [0, 0, 0]


def test_a_class_in_one_group_goes_to_train():
    manifest = make_manifest(["a"] * 9 + ["b"] * 3, group=[*range(9), 20, 20, 20])
    lines = assign_splits(manifest, [])
    assert counts_of(manifest)[:, 1].tolist() == [3, 0, 0]
    assert "in train only, since all their clips are in one group: b" in lines


def test_no_group_can_be_spared():
    assert_refused("no clips for test: no class has enough groups (column group)",
                   "add recordings", assign_splits,
                   make_manifest(["a", "a", "b", "b"], group=[0, 0, 1, 1]), [])
    assert_refused("no clips for test", "column group",
                   assign_splits, make_manifest(["a", "a", "b", "b"]), [[0, 1], [2, 3]])
    pairs = make_manifest(["a", "a", "b", "b"])
    assert "no clips for val" in assign_splits(pairs, [])[0]
    assert counts_of(pairs).tolist() == [[1, 1], [0, 0], [1, 1]]


def test_duplicates_stay_together():
    for seed in range(20):
        manifest = make_manifest(["a"] * 12 + ["b"] * 12, group=[*range(10), 9, 9, *range(20, 32)])
        assign_splits(manifest, [[0, 1], [2, 9], [3, 14, 20]], seed=seed)
        for rows in ([0, 1], [2, 9, 10, 11], [3, 14, 20]):
            assert len(set(manifest.split[rows])) == 1


def test_row_order_does_not_matter_but_the_seed_does():
    rng = np.random.default_rng(5)
    manifest, duplicates = random_manifest(rng)
    assign_splits(manifest, duplicates, seed=3)
    expected = split_of(manifest)
    for _ in range(10):
        order = rng.permutation(len(manifest))
        shuffled = manifest.select(order)
        shuffled.split[:] = -1
        shuffled.group = rng.permutation(10**5)[shuffled.group].astype(np.int32)  # other codes
        new_row = np.argsort(order)
        assign_splits(shuffled, [new_row[rows].tolist() for rows in duplicates][::-1], seed=3)
        assert split_of(shuffled) == expected
    hashes = {split_hash(manifest)}
    for seed in range(5, 10):
        manifest.split[:] = -1
        assign_splits(manifest, duplicates, seed=seed)
        hashes.add(split_hash(manifest))
    assert len(hashes) == 6


def test_adding_clips_moves_few_of_the_others():
    """Random keys belong to paths, so a larger data set mostly has the same split."""
    small = make_manifest(["a", "b"] * 100)
    large = make_manifest(["a", "b"] * 105)
    assign_splits(small, [])
    assign_splits(large, [])
    assert (small.split != large.split[:200]).mean() < 0.2  # by chance about half would move


def test_memory_while_splits_are_made():
    n = 4000
    manifest = make_manifest([f"{i % 20:02d}" for i in range(n)])
    tracemalloc.start()
    assign_splits(manifest, [])
    assert audit(manifest, []) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / n < 100


def test_shares_that_are_refused():
    for val, test in ((0.5, 0.5), (-0.1, 0.1), (0.1, -0.1), (0, 1), (float("nan"), 0.1)):
        assert_refused("leave nothing for training", "below 1",
                       assign_splits, make_manifest(["a"] * 9 + ["b"] * 9), [], val, test)
    manifest = make_manifest(["a"] * 9 + ["b"] * 9)
    assign_splits(manifest, [], val=0, test=0.2)
    assert len(manifest.rows("val")) == 0 and len(manifest.rows("test")) == 4


# ---- splits and folds of the data

def manifest_with_folds(*folds):
    return make_manifest(["a", "b"] * 5 * len(folds), fold=np.repeat(folds, 10))


def folds_of(manifest):
    """The folds in train, val and test."""
    return [set(manifest.fold[manifest.rows(name)]) for name in SPLITS]


def test_folds():
    manifest = manifest_with_folds(1, 2, 3, 5)
    lines = assign_splits(manifest, [], fold=2)
    assert folds_of(manifest) == [{1, 5}, {3}, {2}]
    assert "fold 2 is the test" in lines[0] and "fold 3 the validation" in lines[0]
    assign_splits(manifest, [], fold=3)
    assert folds_of(manifest) == [{1, 2}, {5}, {3}]  # there is no fold 4
    assign_splits(manifest, [], fold=5)
    assert folds_of(manifest) == [{2, 3}, {1}, {5}]  # after the last fold comes the first
    manifest = manifest_with_folds(7, 3, 4)
    assert "--fold is not given: fold 3 is the test" in assign_splits(manifest, [])[0]
    assert folds_of(manifest) == [{7}, {4}, {3}]


def test_two_folds():
    manifest = manifest_with_folds(1, 2)
    assign_splits(manifest, [], fold=2)
    assert folds_of(manifest) == [{1}, {1}, {2}]


def test_folds_that_are_refused():
    assert_refused("--fold 4: no such fold", "give one of 1, 2, 3",
                   assign_splits, manifest_with_folds(1, 2, 3), [], fold=4)
    assert_refused("--fold 1: the data has no folds", "leave --fold out",
                   assign_splits, make_manifest(["a", "b"]), [], fold=1)
    assert_refused("--fold 1 is the only fold", "leave the column fold out",
                   assign_splits, manifest_with_folds(1), [])
    manifest = make_manifest(["a", "b", "a", "b", "a", "c"], fold=[1, 1, 2, 2, 3, 1])
    assert_refused("label in test that is not in train: b, c", "move some of its clips to train",
                   assign_splits, manifest, [], fold=1)


def test_splits_of_the_data_are_used():
    given = [TRAIN] * 8 + [VAL] * 4 + [TEST] * 4
    manifest = make_manifest(["a", "b"] * 8, split=given, fold=[1, 2, 3, 4] * 4)
    assign_splits(manifest, [])
    assert manifest.split.tolist() == given  # they come before folds that nobody asked for
    assign_splits(manifest, [], fold=1)
    assert np.array_equal(manifest.split == TEST, manifest.fold == 1)


@pytest.mark.parametrize("missing", [[VAL], [TEST], [VAL, TEST]])
def test_a_missing_split_is_made_out_of_train(missing):
    given = np.array([TRAIN] * 80 + [VAL] * 20 + [TEST] * 20)
    given = given[~np.isin(given, missing)]
    group = np.arange(len(given)) // 4
    manifest = make_manifest(["a", "b"] * (len(given) // 2), split=given, group=group)
    lines = assign_splits(manifest, [])
    assert any("made out of train with seed 0" in line for line in lines)
    assert (manifest.split[given != TRAIN] == given[given != TRAIN]).all()
    for split in missing:
        assert (manifest.split == split).sum() == 12  # 15% of 80
    pairs = set(zip(manifest.group.tolist(), manifest.split.tolist()))
    assert len(pairs) == len(set(manifest.group.tolist()))  # no group is divided


def test_splits_of_the_data_that_are_refused():
    assert_refused("label in test that is not in train: c", "remove the class", assign_splits,
                   make_manifest(["a", "b", "a", "b", "a", "c"], split=[0, 0, 1, 1, 2, 2]), [])
    assert_refused("label in val that is not in train: b", "move some", assign_splits,
                   make_manifest(["a", "a", "b"], split=[TRAIN, TEST, VAL]), [])
    assert_refused("splits are val, test, without train", "mark the clips", assign_splits,
                   make_manifest(["a", "b", "a", "b"], split=[VAL, VAL, TEST, TEST]), [])


# ---- leaks and rare classes

def test_audit():
    manifest = make_manifest(["a", "b"] * 4, split=[0, 0, 0, 0, 1, 1, 2, 2],
                             group=[0, 1, 2, 3, 0, 5, 6, 3])
    paths = manifest.paths
    assert audit(manifest, []) == [
        f"2 groups (column group) in two splits, e.g. {paths[0]} (train) and {paths[4]} (val)"]
    manifest.group = np.arange(8, dtype=np.int32)
    assert audit(manifest, []) == audit(manifest, [[0, 2]]) == []
    assert audit(manifest, [[0, 2, 6], [4, 0]]) == [
        f"2 sets of byte-identical files in two splits, e.g. {paths[0]} (train) and {paths[6]} "
        "(test)"]
    assert audit(manifest, [[2, 3]]) == [
        f"1 set of byte-identical files with two labels, e.g. {paths[2]} (a) and {paths[3]} (b)"]
    manifest.start[3] = 1.0  # another stretch of the same recording may have another class
    assert audit(manifest, [[2, 3]]) == []


def test_drop_rare():
    manifest = make_manifest(["a"] * 3 + ["b"] * 2 + ["c"] + ["d"] * 4, split=[0] * 10)
    assert drop_rare(manifest, 1) == (manifest, [])
    smaller, lines = drop_rare(manifest, 3)
    assert smaller.classes == ["a", "d"] and smaller.labels.tolist() == [0] * 3 + [1] * 4
    assert smaller.labels.dtype == np.int32
    assert smaller.paths == manifest.paths[:3] + manifest.paths[6:]
    assert len(lines) == 1 and "2 of 4 classes" in lines[0]
    assert "(3 clips in all): b (2), c (1)" in lines[0]
    assert manifest.classes == ["a", "b", "c", "d"] and len(manifest) == 10
    assert_refused("--min-clips 4 leaves 1 of 4 classes", "smaller number", drop_rare, manifest, 4)


def test_real_recordings(esc10):
    manifest = load_manifest(esc10)
    for fold in range(1, 6):
        assign_splits(manifest, [], fold=fold)
        assert counts_of(manifest).tolist() == [[24] * 10, [8] * 10, [8] * 10]
        assert audit(manifest, []) == []
    manifest.split[:] = -1
    manifest.fold = None
    assign_splits(manifest, [])
    assert counts_of(manifest).tolist() == [[28] * 10, [6] * 10, [6] * 10]
    assert audit(manifest, []) == []
