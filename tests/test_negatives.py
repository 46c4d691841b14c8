"""Negatives: recordings that contain none of the classes, from the data to the losses."""
import numpy as np
import pytest
import torch

import flag_checks
import flags
from data.clips import Clips, CropKey, TrainLoader
from data.load import load_manifest
from data.manifest import DataError, LabelSet, Manifest
from data.negatives import cut_into_windows
from data.prepare import prepare
from data.sampling import epoch_size
from losses import LOSSES, build_loss, has_label, is_correct
from tests.recordings import touch, write_table, write_wav


def negatives_of(manifest):
    return {path for path, negative in zip(manifest.paths, manifest.is_negative) if negative}


# ---- where they come from

@pytest.mark.parametrize("name", ["noise", "Noise", "background", "silence", "negative", "no_call",
                                  "_background_noise_", "No-Call", "Negatives"])
def test_folders_with_usual_names_are_negatives(tmp_path, name):
    touch(tmp_path, "dog/a.wav", "dog/b.wav", "cat/c.wav", f"{name}/x.wav", f"{name}/deep/y.wav")
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ["cat", "dog"] and not manifest.multi_label
    assert negatives_of(manifest) == {f"{name}/x.wav", f"{name}/deep/y.wav"}
    assert any(f"2 recordings in {name}" in note for note in manifest.notes)


def test_real_class_named_noise_stays_a_class(tmp_path):
    touch(tmp_path, "dog/a.wav", "noise/x.wav", "silence/y.wav")
    manifest = load_manifest(tmp_path, real_classes=["noise"])
    assert manifest.classes == ["dog", "noise"]
    assert negatives_of(manifest) == {"silence/y.wav"}


def test_checkpoint_with_a_class_named_noise_reads_it_as_that_class(tmp_path):
    touch(tmp_path, "dog/a.wav", "noise/x.wav")
    manifest = load_manifest(tmp_path, known_classes=["dog", "noise"])
    assert manifest.classes == ["dog", "noise"] and not negatives_of(manifest)


def test_rows_without_a_label_are_negatives(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav", "d.wav")
    table = write_table(tmp_path, "path,label\na.wav,dog\nb.wav,\nc.wav,cat\nd.wav, \n")
    manifest = load_manifest(table)
    assert manifest.labels.tolist() == [1, -1, 0, -1]
    assert [manifest.label_text(row) for row in range(4)] == ["dog", "", "cat", ""]
    table = write_table(tmp_path, "path,labels\na.wav,dog;cat\nb.wav,[]\nc.wav,cat\nd.wav,noise\n")
    manifest = load_manifest(table)
    assert manifest.multi_label and negatives_of(manifest) == {"b.wav", "d.wav"}
    assert manifest.targets([0, 1, 2, 3]).tolist() == [[1, 1], [0, 0], [1, 0], [0, 0]]


def test_negatives_flag_takes_a_folder_or_a_table(tmp_path):
    touch(tmp_path, "data/dog/a.wav", "data/cat/b.wav", "season/x.wav", "season/deep/y.wav")
    manifest = load_manifest(tmp_path / "data", negatives=tmp_path / "season")
    assert manifest.root == tmp_path
    assert negatives_of(manifest) == {"season/x.wav", "season/deep/y.wav"}
    assert all(manifest.file(row).exists() for row in range(len(manifest)))
    assert manifest.paths == sorted(manifest.paths)
    table = write_table(tmp_path / "season", "path\nx.wav\n")
    manifest = load_manifest(tmp_path / "data", negatives=table)
    assert negatives_of(manifest) == {"season/x.wav"}


def test_recording_with_a_label_among_the_negatives_is_refused(tmp_path):
    touch(tmp_path, "dog/a.wav", "cat/b.wav")
    with pytest.raises(DataError, match=r"dog/a\.wav has a label and is among"):
        load_manifest(tmp_path, negatives=tmp_path / "dog")


@pytest.mark.parametrize("given", ["none", "dog/a.wav", "empty"])
def test_negatives_that_are_none_are_one_line(tmp_path, given):
    touch(tmp_path, "dog/a.wav", "cat/b.wav")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--negatives"):
        load_manifest(tmp_path, negatives=tmp_path / given)


def test_folder_named_minus_class_is_negative_for_that_class_alone(tmp_path):
    touch(tmp_path, "dog/a.wav", "cat/b.wav", "cow/c.wav", "-dog/x.wav")
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ["cat", "cow", "dog"] and not manifest.is_negative.any()
    row = manifest.paths.index("-dog/x.wav")
    assert manifest.label_sets[manifest.label_set[row]] == LabelSet((), (0, 1))
    np.testing.assert_array_equal(manifest.targets([row]), [[np.nan, np.nan, 0]])
    single = manifest.single_label()
    assert "-dog/x.wav" not in single.paths and len(single) == 3


def test_control_name_with_a_minus_of_no_class_is_a_class(tmp_path):
    touch(tmp_path, "dog/a.wav", "-40C/b.wav")
    assert load_manifest(tmp_path).classes == ["-40C", "dog"]


def test_folders_of_birdnet(tmp_path):
    touch(tmp_path, "Parus major_Great Tit/a.wav", "Strix aluco_Tawny Owl/b.wav", "Other/c.wav",
          "Parus major_Great Tit, Strix aluco_Tawny Owl/d.wav", "-Strix aluco_Tawny Owl/e.wav")
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ["Parus major_Great Tit", "Strix aluco_Tawny Owl"]
    assert negatives_of(manifest) == {"Other/c.wav"}
    targets = dict(zip(manifest.paths, manifest.targets(range(5)).tolist()))
    assert targets["Parus major_Great Tit, Strix aluco_Tawny Owl/d.wav"] == [1, 1]
    assert np.isnan(targets["-Strix aluco_Tawny Owl/e.wav"][0])
    assert targets["-Strix aluco_Tawny Owl/e.wav"][1] == 0


def test_control_folder_named_other_beside_ordinary_names_is_a_class(tmp_path):
    touch(tmp_path, "dog/a.wav", "other/b.wav")
    assert load_manifest(tmp_path).classes == ["dog", "other"]


def test_one_class_and_negatives_are_a_question_of_yes_or_no(tmp_path):
    touch(tmp_path, "koala/a.wav", "koala/b.wav", "noise/c.wav")
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ["koala"] and manifest.multi_label
    assert manifest.targets([0, 1, 2]).tolist() == [[1], [1], [0]]


# ---- windows and splits

def test_long_negatives_are_cut_into_windows_that_cover_them(tmp_path):
    seconds = np.array([0.5, 4.0, 5.9, 6.0, 9.9, 10.0, 40.0], np.float32)
    n = len(seconds)
    manifest = Manifest(
        name="x", root=tmp_path, classes=["a", "b"], paths=[f"{i}.wav" for i in range(n)],
        labels=np.full(n, -1, np.int32), start=np.zeros(n, np.float32),
        end=np.full(n, np.nan, np.float32), group=np.arange(n, dtype=np.int32), group_source="",
        split=np.full(n, -1, np.int8), fold=None, notes=[], duration=seconds)
    manifest.labels[6] = 1  # a labelled clip of 40 s stays whole
    cut, rows = cut_into_windows(manifest, 4.0)
    for row, length in enumerate(seconds.tolist()):
        own = np.flatnonzero(rows == row)
        if row == 6 or length < 6:  # less than half a window is left over
            assert len(own) == 1 and np.isnan(cut.end[own[0]])
            continue
        starts, ends = cut.start[own].tolist(), cut.end[own].tolist()
        assert starts == [4.0 * k for k in range(len(own))]
        assert ends[:-1] == starts[1:] and 0 <= length - ends[-1] <= 2
        np.testing.assert_allclose(cut.duration[own], np.array(ends) - starts)
        assert (cut.group[own] == row).all()


@pytest.fixture
def recordings(tmp_path):
    """12 clips of two classes, and 8 negatives of 8.5 s."""
    for c, name in enumerate(("dog", "cat")):
        for i in range(6):
            write_wav(tmp_path / "data" / name / f"{name}{i}.wav", 10 * c + i, 16000)
    for i in range(8):
        write_wav(tmp_path / "data" / "noise" / f"n{i}.wav", 20 + i, round(8.5 * 16000))
    return tmp_path


def prepared(folder, **options):
    return prepare(folder / "data", cache_dir=folder / "cache", log=lambda line: None,
                   multi_label=None, seconds=2.0, **options)[0]


def test_negatives_are_split_by_recording(recordings):
    manifest = prepared(recordings)
    assert manifest.is_negative.sum() == 8 * 4
    for split in ("train", "val", "test"):
        rows = manifest.rows(split)
        assert manifest.is_negative[rows].any() and manifest.has_label[rows].any()
    split_of_path = {}
    for path, split in zip(manifest.paths, manifest.split.tolist()):
        assert split_of_path.setdefault(path, split) == split
    counts = np.bincount([split_of_path[path] for path in negatives_of(manifest)], minlength=3)
    assert counts.tolist() == [4, 1, 3]  # of 8: near 50%, 15%, 35%


def test_negatives_join_the_split_of_their_group(recordings):
    rows = ["path,label,site"]
    for name in ("dog", "cat"):
        rows += [f"{name}/{name}{i}.wav,{name},site{i}" for i in range(6)]
    rows += [f"noise/n{i}.wav,,site{i}" for i in range(8)]  # sites 6 and 7 have no clip of a class
    write_table(recordings / "data", "\n".join(rows) + "\n")
    manifest = prepare(recordings / "data" / "clips.csv", cache_dir=recordings / "cache",
                       log=lambda line: None, multi_label=None, seconds=2.0)[0]
    split_of_site = {}
    for path, split in zip(manifest.paths, manifest.split.tolist()):
        site = path[-5]
        assert split_of_site.setdefault(site, split) == split


def test_negatives_without_a_split_are_spread_if_the_classes_have_splits(recordings):
    for split, i in (("train", 0), ("val", 1), ("test", 2)):
        for name in ("dog", "cat"):
            source = recordings / "data" / name
            target = recordings / "given" / split / name
            target.mkdir(parents=True)
            (source / f"{name}{i}.wav").rename(target / f"{name}.wav")
    (recordings / "data" / "noise").rename(recordings / "noise")
    (recordings / "data" / "dog").rename(recordings / "dog")
    (recordings / "given").rename(recordings / "data" / "x")
    manifest = prepare(recordings / "data" / "x", cache_dir=recordings / "cache", seconds=2.0,
                       log=lambda line: None, multi_label=None,
                       negatives=recordings / "noise")[0]
    assert (manifest.split >= 0).all()
    assert all(manifest.is_negative[manifest.rows(split)].any() for split in ("train", "test"))
    labelled = [path for path, has in zip(manifest.paths, manifest.has_label) if has]
    assert len(labelled) == 6


def test_share_of_negatives_in_an_epoch(recordings):
    manifest = prepared(recordings)
    train = manifest.rows("train")
    n_labelled, n_negative = manifest.has_label[train].sum(), manifest.is_negative[train].sum()
    clips = Clips(manifest, 16000, 32000)
    seen = set()
    for epoch in range(12):
        loader = TrainLoader(clips, train, 4, 4, negative_share=0.25)
        order = loader.order(epoch)
        drawn = order[manifest.is_negative[order]]
        assert len(drawn) == round(n_labelled / 3) < n_negative
        assert sorted(order[manifest.has_label[order]]) == sorted(train[manifest.has_label[train]])
        assert len(order) == loader.clips_per_epoch == epoch_size(manifest, train, 0.25)
        seen.update(drawn.tolist())
    assert seen == set(train[manifest.is_negative[train]].tolist())  # they take turns
    assert epoch_size(manifest, train, 1.0) == len(train)
    balanced = TrainLoader(clips, train, 4, 4, negative_share=0.25, sampler="balanced").order(0)
    rows = balanced % len(manifest)
    counts = np.bincount(manifest.labels[rows[manifest.has_label[rows]]])
    assert counts.max() - counts.min() <= 1 and manifest.is_negative[rows].sum() == len(drawn)


def test_batches_have_targets_of_zeros_for_negatives(recordings):
    manifest = prepared(recordings)
    rows = [int(np.flatnonzero(manifest.is_negative)[0]), int(np.flatnonzero(manifest.labels)[0])]
    batch = Clips(manifest, 16000, 32000).batch([CropKey(row, 0) for row in rows])
    np.testing.assert_array_equal(batch.target.numpy(), manifest.targets(rows))
    assert batch.target[0].sum() == 0


# ---- losses

@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_a_negative_is_least_for_what_it_should_answer(name):
    """Minimise it: sigmoids go to 0, a softmax becomes uniform."""
    torch.manual_seed(0)
    logits = torch.randn(1, 5, requires_grad=True)
    loss_fn = build_loss(name)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        loss_fn(logits, torch.zeros(1, 5)).sum().backward()
        optimizer.step()
    if getattr(loss_fn, "sigmoid", False):
        assert logits.sigmoid().max() < 0.1
    else:
        torch.testing.assert_close(logits.softmax(1), torch.full((1, 5), 0.2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["focal", "ce"])
def test_a_softmax_loss_of_a_mixed_negative_is_the_mix_of_the_losses(name):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, generator=generator)
    target = torch.nn.functional.one_hot(torch.tensor([2, 0, 1]), 4).float()
    loss_fn, share = build_loss(name), 0.7
    mixed = loss_fn(logits, share * target)
    parts = share * loss_fn(logits, target) + (1 - share) * loss_fn(logits, torch.zeros(3, 4))
    torch.testing.assert_close(mixed, parts)


def test_a_negative_is_neither_correct_nor_counted():
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [torch.nan, 0.0]])
    assert is_correct(logits, target).tolist() == [True, False, False, False]
    assert has_label(target, 2).tolist() == [True, False, True, False]


# ---- flags

def test_the_loss_follows_the_data_unless_it_is_given(recordings):
    args, _ = flags.parse(["--data", "x"])
    assert args.loss is None
    flag_checks.choose_loss(args, needs_sigmoids=prepared(recordings).needs_sigmoids)
    assert args.loss == "focal-bce"
    args, _ = flags.parse(["--data", "x"])
    flag_checks.choose_loss(args, needs_sigmoids=False)
    assert args.loss == "focal"
    args, _ = flags.parse(["--data", "x", "--loss", "ce"])
    flag_checks.choose_loss(args, needs_sigmoids=True)
    assert args.loss == "ce"


def test_flags_of_a_softmax_loss_beside_negatives_are_refused():
    args, _ = flags.parse(["--data", "x", "--logit-adjust", "1"])
    with pytest.raises(DataError, match="--logit-adjust"):
        flag_checks.choose_loss(args, needs_sigmoids=True)
