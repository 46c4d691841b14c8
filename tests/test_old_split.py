"""Data that has grown keeps the split of an earlier run."""
import numpy as np
import pytest
from recordings import assert_refused, make_manifest, split_of

from data.old_split import OldRun, extend_split
from data.splits import assign_splits, audit


def made(n, **options):
    """A manifest of n clips of each of two classes; equal rows have equal paths and lengths."""
    manifest = make_manifest(["a", "b"] * n, **options)
    manifest.duration = 1 + np.arange(2 * n, dtype=np.float32) / 7
    return manifest


def old_run(n=40, seed=5, **options):
    manifest = made(n, **options)
    assign_splits(manifest, [], seed=seed)
    return OldRun("--split-from runs/old", manifest, True)


def test_old_clips_keep_their_split_and_new_ones_are_spread():
    old, grown = old_run(), made(60)
    lines = extend_split(grown, [], old, seed=9)
    for path, split in split_of(old.manifest).items():
        assert split_of(grown)[path] == split
    assert np.abs(np.bincount(grown.split) / 120 - [0.7, 0.15, 0.15]).max() < 0.03
    assert "80 clips keep their split, 40 are new, 0 of the run's are gone" in lines[0]
    assert (assign_splits(grown, [], seed=9), audit(grown, []))[1] == []
    assert split_of(old.manifest).items() <= split_of(grown).items()
    again = made(60)
    extend_split(again, [], old, seed=9)
    assert split_of(again) == split_of(grown)


def test_control_another_seed_alone_would_move_old_clips():
    old, grown = old_run(), made(60)
    assign_splits(grown, [], seed=9)
    assert not split_of(old.manifest).items() <= split_of(grown).items()


def test_another_length_or_stretch_is_another_clip():
    old, grown = old_run(), made(40)
    grown.duration[::2] += 0.5  # all of class a: next season's files under the same names
    lines = extend_split(grown, [], old)
    assert "40 clips keep their split, 40 are new, 40 of the run's" in lines[0]
    assert (grown.split[1::2] == old.manifest.split[1::2]).all()
    grown = made(40)
    grown.start[:] = 0.25
    assert_refused("none of its 80 clips", "earlier state", extend_split, grown, [], old)


def test_new_clips_of_old_groups_join_their_split():
    group = [i // 4 for i in range(120)]
    old = old_run(group=group[:80])
    grown = made(60, group=[*group[:80], *group[:40]])
    extend_split(grown, [[3, 101]], old)
    assert audit(grown, [[3, 101]]) == []
    assert (grown.split[80:] == grown.split[:40]).all()


def test_no_old_clip_moves_for_a_class_that_is_only_in_the_test():
    old = old_run()
    test = old.manifest.rows("test")[:4]
    grown = make_manifest(["a", "b"] * 40 + ["new"] * 4, group=[*range(80), *test])
    grown.duration = np.append(old.manifest.duration, [1, 1, 1, 1]).astype(np.float32)
    extend_split(grown, [], old)
    assert (grown.split[:80] == old.manifest.split).all() and (grown.split[80:] == 2).all()
    assert_refused("label in test that is not in train: new", "move some of its clips",
                   assign_splits, grown, [])


def test_an_old_split_that_would_leak_is_refused():
    old, grown = old_run(), made(60)
    train, test = (int(old.manifest.rows(split)[0]) for split in ("train", "test"))
    assert_refused("--split-from runs/old: its split would leak", "new split",
                   extend_split, grown, [[train, test]], old)
    grown.group[[train, test, 100]] = grown.group[100]  # a new clip shows that two are one group
    assert_refused(grown.paths[test], "--split-from", extend_split, grown, [], old)


@pytest.mark.parametrize("is_required", [True, False])
def test_a_run_of_other_data(is_required):
    old = old_run()._replace(is_required=is_required)
    other = made(40, paths=[f"other/{i}.wav" for i in range(80)])
    with_split = made(40, split=[0, 1, 2, 0] * 20)
    if is_required:
        assert_refused("none of its 80 clips", "earlier state", extend_split, other, [], old)
        assert_refused("splits of its own", "leave the flag out",
                       extend_split, with_split, [], old)
    else:
        assert extend_split(other, [], old) == [] and (other.split == -1).all()
        assert extend_split(with_split, [], old) == []
        assert with_split.split.tolist() == [0, 1, 2, 0] * 20
