"""Folds that the program makes: by group, stratified, the same in every run."""
import numpy as np
import pytest
from recordings import assert_refused, make_manifest, write_wav

from data.folds import NO_FOLD, assign_folds
from data.prepare import prepare
from data.splits import assign_splits, audit


def grouped_manifest(seed=0, n=240, n_classes=4, n_groups=60):
    rng = np.random.default_rng(seed)
    labels = [f"class {c}" for c in rng.integers(0, n_classes, n)]
    return make_manifest(labels, group=rng.integers(0, n_groups, n))


@pytest.mark.parametrize("n_folds", [2, 3, 5, 10])
def test_folds_keep_groups_and_copies_whole_and_are_stratified(n_folds):
    for seed in range(10):
        manifest = grouped_manifest(seed)
        duplicates = [[0, 17, 30], [5, 100]]
        assign_folds(manifest, duplicates, n_folds, seed)
        assert set(manifest.fold.tolist()) == set(range(1, n_folds + 1))
        for rows in [*duplicates, *(np.flatnonzero(manifest.group == g) for g in manifest.group)]:
            assert len(set(manifest.fold[rows].tolist())) == 1
        counts = np.array([np.bincount(manifest.fold[manifest.labels == c], minlength=n_folds + 1)
                           for c in range(4)])[:, 1:]
        largest = np.bincount(manifest.group).max()
        assert np.abs(counts - counts.sum(axis=1, keepdims=True) / n_folds).max() <= 2 * largest


@pytest.mark.parametrize("n_folds", [2, 3, 5])
def test_each_fold_can_be_trained_and_every_clip_is_tested_once(n_folds):
    manifest = grouped_manifest()
    assign_folds(manifest, [], n_folds, 0)
    tested = np.zeros(len(manifest), int)
    for fold in range(1, n_folds + 1):
        run = manifest.select(range(len(manifest)))
        assign_splits(run, [], fold=fold)
        assert audit(run, []) == [] and len(run.rows("val"))
        tested[run.rows("test")] += 1
    assert (tested == 1).all()


def test_classes_in_few_groups_are_always_in_train():
    labels = ["a"] * 30 + ["b"] * 30 + ["rare"] * 4
    manifest = make_manifest(labels, group=[*range(60), 90, 90, 91, 91])
    lines = assign_folds(manifest, [], 5, 0)
    assert (manifest.fold[manifest.labels == 2] == NO_FOLD).all()
    assert any("in train in every fold" in line and "rare" in line for line in lines)
    for fold in range(1, 6):
        assign_splits(manifest, [], fold=fold)
        assert (manifest.split[manifest.labels == 2] == 0).all()
    assert_refused("--fold -1: no such fold", "1, 2, 3, 4, 5", assign_splits, manifest, [], fold=-1)


def test_folds_depend_on_clips_and_seed_alone():
    manifest = grouped_manifest()
    assign_folds(manifest, [], 5, 3)
    fold_of = dict(zip(manifest.paths, manifest.fold.tolist()))
    order = np.random.default_rng(1).permutation(len(manifest))
    shuffled = manifest.select(order)
    shuffled.group += 7  # other codes
    assign_folds(shuffled, [], 5, 3)
    assert dict(zip(shuffled.paths, shuffled.fold.tolist())) == fold_of
    assign_folds(shuffled, [], 5, 4)
    assert dict(zip(shuffled.paths, shuffled.fold.tolist())) != fold_of


def test_splits_of_the_data_are_replaced():
    manifest = make_manifest(["a", "b"] * 20, split=[0, 0, 1, 1] * 10, fold=[1, 2] * 20)
    lines = assign_folds(manifest, [], 4, 0)
    assert "replaced by 4 folds" in lines[0]
    assert (manifest.split == -1).all() and np.bincount(manifest.fold).tolist() == [0] + [10] * 4


def test_too_few_groups():
    manifest = make_manifest(["a", "b"] * 10, group=[0, 1] * 10)
    assert_refused("--folds 5: ", "use fewer folds", assign_folds, manifest, [], 5, 0)


def test_a_file_that_breaks_moves_no_other_clip(tmp_path):
    for i in range(48):
        write_wav(tmp_path / "data" / "ab"[i % 2] / f"{i:02d}.wav", seed=i)

    def folds():
        manifest, _ = prepare(tmp_path / "data", fold=2, n_folds=4, cache_dir=tmp_path / "cache",
                              log=str)
        return dict(zip(manifest.paths, zip(manifest.fold.tolist(), manifest.split.tolist())))

    before = folds()
    (tmp_path / "data/a/04.wav").write_bytes(b"broken")
    after = folds()
    assert before.pop("a/04.wav") and after == before
