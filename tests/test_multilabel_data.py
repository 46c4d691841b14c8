"""Clips with several labels: tables, manifests, splits, losses and mixup."""
import json

import numpy as np
import pytest
import torch
from recordings import assert_refused, touch, write_table
from torchvision.ops import sigmoid_focal_loss

from data.augment import Augment
from data.load import load_manifest
from data.manifest import DataError, LabelSet, Manifest
from data.splits import assign_splits, audit, drop_rare, split_hash, write_split
from losses import SIGMOID_LOSSES, build_loss, is_correct


def write_clips(folder, text):
    """Write clips.csv and an empty file for each of its rows -> its path."""
    touch(folder, *(line.split(",")[0] for line in text.splitlines()[1:]))
    return write_table(folder, text)


def load_clips(folder, text):
    return load_manifest(write_clips(folder, text))


def labels_of(manifest):
    """{path: (names of its labels, names of its unknown classes)}."""
    def names(classes):
        return [manifest.classes[c] for c in classes]

    label_sets = [manifest.label_sets[i] for i in manifest.label_set]
    return {path: (names(label_set.present), names(label_set.unknown))
            for path, label_set in zip(manifest.paths, label_sets, strict=True)}


# --- tables ---

@pytest.mark.parametrize("cells", [
    ("dog;rain", "rain", "dog;cat;rain"),
    ("dog|rain", " rain ", "dog | rain|cat"),
    ("dog;;rain;dog", "rain;", ";dog;rain;cat;rain"),
])
@pytest.mark.parametrize("column", ["label", "species", "labels"])
def test_a_cell_may_have_several_labels(tmp_path, cells, column):
    lines = [f"path,{column}", *(f"{i}.wav,{cell}" for i, cell in enumerate(cells))]
    manifest = load_clips(tmp_path, "\n".join(lines) + "\n")
    assert manifest.classes == ["cat", "dog", "rain"] and manifest.multi_label
    assert labels_of(manifest) == {
        "0.wav": (["dog", "rain"], []),
        "1.wav": (["rain"], []),
        "2.wav": (["dog", "cat", "rain"], [])}
    assert manifest.labels.tolist() == [1, 2, 1] and manifest.counts().tolist() == [1, 2, 3]
    assert manifest.targets(np.arange(3)).tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    texts = [manifest.label_text(row) for row in range(3)]
    assert texts == ["dog; rain", "rain", "dog; cat; rain"]
    assert any("2 of 3 clips" in note for note in manifest.notes)


def test_a_column_of_lists_may_separate_labels_by_commas(tmp_path):
    """FSD50K separates by commas; a saved data frame has lists with either kind of quotes."""
    text = ('fname,labels\na.wav,"Bark,Dog"\nb.wav,"[\'Rain\', ""St. John\'s wren""]"\nc.wav,Dog\n'
            'd.wav,"[Rain, Dog]"\n')
    assert labels_of(load_clips(tmp_path, text)) == {
        "a.wav": (["Bark", "Dog"], []),
        "b.wav": (["Rain", "St. John's wren"], []),
        "c.wav": (["Dog"], []),
        "d.wav": (["Rain", "Dog"], [])}


def test_in_other_columns_commas_and_brackets_belong_to_the_name(tmp_path):
    manifest = load_clips(tmp_path, 'path,label\na.wav,"Speech, male"\nb.wav,[Rain]\n')
    assert manifest.classes == ["Speech, male", "[Rain]"]
    assert not manifest.multi_label and manifest.label_sets == []


BIRDCLEF = ("filename,primary_label,secondary_labels,common_name\n"
            "a.wav,owl,\"['wren', 'tit']\",Owl\n"
            "b.wav,wren,[],Wren\n"
            "c.wav,wren,['wren'],Wren\n"
            "d.wav,owl,[''],Owl\n")


def test_secondary_labels_are_unknown(tmp_path):
    manifest = load_clips(tmp_path, BIRDCLEF)
    assert manifest.classes == ["owl", "wren"]  # tit is not the label of any clip
    assert labels_of(manifest) == {
        "a.wav": (["owl"], ["wren"]),
        "b.wav": (["wren"], []),
        "c.wav": (["wren"], []),
        "d.wav": (["owl"], [])}
    np.testing.assert_array_equal(manifest.targets([0, 1]), [[1, np.nan], [0, 1]])
    assert any("tit" in note for note in manifest.notes)


def test_secondary_labels_may_name_known_classes_that_no_clip_has(tmp_path):
    table = write_clips(tmp_path, BIRDCLEF)
    manifest = load_manifest(table, known_classes=["owl", "tit", "wren"])
    assert labels_of(manifest)["a.wav"] == (["owl"], ["tit", "wren"])


def test_single_label_drops_secondary_labels_with_a_note(tmp_path):
    manifest = load_clips(tmp_path, BIRDCLEF)
    single = manifest.single_label()
    assert not single.multi_label and single.labels.tolist() == [0, 1, 1, 0]
    assert len(single.notes) == len(manifest.notes) + 1 and "softmax" in single.notes[-1]


@pytest.mark.parametrize("column", ["unknown", "ignore", "Secondary Labels"])
def test_secondary_labels_in_columns_of_other_names(tmp_path, column):
    text = f"path,label,{column}\na.wav,owl;tit,wren;tit\nb.wav,wren,\n"
    assert labels_of(load_clips(tmp_path, text)) == {
        "a.wav": (["owl", "tit"], ["wren"]), "b.wav": (["wren"], [])}


def test_a_column_ignore_without_class_names_is_not_used(tmp_path):
    manifest = load_clips(tmp_path, "path,label,ignore\na.wav,owl,0\nb.wav,wren,1\n")
    assert not manifest.multi_label and "0, 1" in manifest.notes[-1]


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    lines = []
    for i in range(20):
        label = "abc"[i % 3]
        if i % 2:
            label += ";d"
        if i % 5 == 0:
            label += ";a"
        lines.append(f"{i}.wav,{label},{'c' if i % 4 == 0 else ''}")
    forwards, backwards = (
        load_clips(tmp_path, "\n".join(["path,label,unknown", *ordered]) + "\n").to_dict()
        for ordered in (lines, lines[::-1]))
    del forwards["end"], backwards["end"]  # nan is not equal to itself
    assert forwards == backwards


@pytest.mark.parametrize("text, problem, culprit", [
    ("path,label\na.wav,x;y\nb.wav,; |;\n", "row 3", "label is '; |;'"),
    ("path,label\na.wav,x;x\nb.wav,x\n", "one class", "(x)"),
    ("path,label\na.wav,x\nb.wav,y\na.wav,y\n", "rows 2 and 4", "x;y"),
    ("path,label\na.wav,x;y\nb.wav,y\na.wav,x\n", "rows 2 and 4", "x;y and x"),
    ("path,label,ignore\na.wav,x,y\nb.wav,y,\na.wav,x,\n", "rows 2 and 4", "secondary label"),
])
def test_tables_that_are_refused(tmp_path, text, problem, culprit):
    assert_refused(problem, culprit, load_manifest, write_clips(tmp_path, text))


def test_class_folders_may_have_separators_in_their_names(tmp_path):
    touch(tmp_path, "a;b/x.wav", "c|d/x.wav")
    manifest = load_manifest(tmp_path)
    assert manifest.classes == ["a;b", "c|d"] and not manifest.multi_label


# --- the manifest ---

N_CLASSES = 8
NEVER_FIRST = 7  # a class that is in many clips, but never their first label


def random_manifest(n=400, seed=0):
    """Clips with 1 to 3 labels of unequal classes, some with an unknown class.

    -> (manifest, (n, classes) of 1, 0 and nan)
    """
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, N_CLASSES + 1)
    sets, truth = [], np.zeros((n, N_CLASSES))
    for row in range(n):
        n_labels = rng.integers(1, 4)
        labels = rng.choice(N_CLASSES, n_labels, replace=False, p=frequency / frequency.sum())
        present = sorted(labels.tolist(), key=lambda c: c == NEVER_FIRST)
        if present[0] == NEVER_FIRST:
            present = [0, NEVER_FIRST]
        unknown, has_unknown = {int(rng.integers(N_CLASSES))}, rng.random() < 0.2
        unknown = unknown - set(present) if has_unknown else set()
        sets.append((tuple(present), tuple(unknown)))
        truth[row, list(unknown)] = np.nan
        truth[row, present] = 1
    zeros = np.zeros(n, np.int32)
    manifest = Manifest(
        name="random", root="/", classes=[f"c{i}" for i in range(N_CLASSES)],
        paths=[f"{i:03d}.wav" for i in range(n)], labels=zeros, start=zeros.astype(np.float32),
        end=np.full(n, np.nan, np.float32), group=np.arange(n, dtype=np.int32) // 2,
        group_source="column group", split=np.full(n, -1, np.int8), fold=None, notes=[])
    return manifest.with_label_sets(sets), truth


def test_targets_counts_and_selections():
    manifest, truth = random_manifest()
    np.testing.assert_array_equal(manifest.targets(np.arange(400)), truth)
    rows = np.array([7, 3, 399])
    np.testing.assert_array_equal(manifest.select(rows).targets(np.arange(3)), truth[rows])
    assert manifest.counts().tolist() == (truth == 1).sum(axis=0).tolist()
    has_class = manifest.rows_with(np.arange(N_CLASSES) == NEVER_FIRST)
    assert has_class.tolist() == (truth[:, NEVER_FIRST] == 1).tolist()
    empty = manifest.select([])
    assert empty.counts().tolist() == [0] * N_CLASSES
    assert empty.targets(np.zeros(0, int)).shape == (0, N_CLASSES)


def test_plain_form_and_back():
    manifest, truth = random_manifest(30)
    plain = manifest.to_dict()
    restored = Manifest.from_dict(json.loads(json.dumps(plain)))  # JSON turns tuples into lists
    assert restored.label_sets == manifest.label_sets and restored.label_set.dtype == np.int32
    np.testing.assert_array_equal(restored.targets(np.arange(30)), truth)


def test_the_plain_form_of_older_checkpoints_has_no_label_sets():
    plain = random_manifest(30)[0].to_dict()
    del plain["label_set"], plain["label_sets"]
    assert not Manifest.from_dict(plain).multi_label


# --- splits ---

def test_every_class_is_split_by_its_share_at_any_place_in_the_cell():
    manifest, truth = random_manifest()
    assign_splits(manifest, [])
    for split, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        n_clips = (truth[manifest.rows(split)] == 1).sum(axis=0)
        shares = n_clips / (truth == 1).sum(axis=0)
        assert np.abs(shares - share).max() < 0.07, (split, shares)
    assert not [line for line in audit(manifest, []) if "groups" in line]


def test_a_class_needs_training_clips_also_if_it_is_never_a_first_label(tmp_path):
    text = "path,label,split\na.wav,x,train\nb.wav,y,train\nc.wav,x;z,test\n"
    with pytest.raises(DataError, match=r"test .*train: z\b"):
        assign_splits(load_clips(tmp_path, text), [])
    text = "path,label,split\na.wav,x;z,train\nb.wav,y,train\nc.wav,z,test\n"
    assert assign_splits(load_clips(tmp_path, text), [], val=0)
    text = "path,label\na.wav,x;z\nb.wav,y;x\nc.wav,y\n"
    with pytest.raises(DataError, match=r": z;"):
        assign_splits(load_clips(tmp_path, text), [])


def test_rare_classes_are_taken_out_of_the_label_sets(tmp_path):
    text = ("path,label,unknown\n0.wav,a;r,b\n1.wav,b,r\n2.wav,r;b,a\n3.wav,s,\n4.wav,a,s\n"
            "5.wav,b;a,\n")
    manifest = load_clips(tmp_path, text)
    frequent, lines = drop_rare(manifest, 3)
    assert labels_of(frequent) == {
        "0.wav": (["a"], ["b"]),
        "1.wav": (["b"], []),
        "2.wav": (["b"], ["a"]),
        "4.wav": (["a"], []),
        "5.wav": (["b", "a"], [])}
    assert frequent.classes == ["a", "b"] and frequent.labels.tolist() == [0, 1, 1, 0, 1]
    assert "r (2), s (1)" in lines[0] and "1 clip " in lines[0]
    has_frequent = manifest.rows_with(manifest.counts() >= 3)
    assert has_frequent.tolist() == [True, True, True, False, True, True]


def test_split_csv_can_be_loaded_as_data(tmp_path):
    manifest, truth = random_manifest(60)
    assign_splits(manifest, [])
    write_split(manifest, tmp_path / "split.csv")
    touch(tmp_path, *manifest.paths)
    loaded = load_manifest(tmp_path / "split.csv")
    np.testing.assert_array_equal(loaded.targets(np.arange(60)), truth)
    assert loaded.labels.tolist() == manifest.labels.tolist()
    assert loaded.split.tolist() == manifest.split.tolist()
    assert split_hash(loaded) == split_hash(manifest)


def test_split_hash_depends_on_the_unknown_classes():
    manifest, _ = random_manifest(60)
    assign_splits(manifest, [])
    before = split_hash(manifest)
    present, unknown = manifest.label_sets[0]
    others = {0, 1, 2, 3} - set(present) - set(unknown)
    manifest.label_sets[0] = LabelSet(present, tuple(others))
    assert split_hash(manifest) != before


def test_with_the_same_classes_the_label_sets_stay():
    manifest, truth = random_manifest(60)
    same = manifest.with_classes(manifest.classes, np.arange(N_CLASSES))
    assert same.labels.tolist() == manifest.labels.tolist()
    np.testing.assert_array_equal(same.targets(np.arange(60)), truth)


def test_audit_reports_equal_files_with_different_labels(tmp_path):
    text = "path,label,split\na.wav,x;y,train\nb.wav,x,train\nc.wav,x;y,train\nd.wav,y,train\n"
    manifest = load_clips(tmp_path, text)
    assert audit(manifest, [[0, 2]]) == []
    (line,) = audit(manifest, [[0, 1]])
    assert "a.wav (x; y)" in line and "b.wav (x)" in line


# --- losses ---

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3
HARD = (torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.4).float()
SOFT = torch.rand(6, 5, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("alpha", [None, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 2.0, 1.5])
def test_focal_bce_agrees_with_torchvision(alpha, gamma):
    logits, their_logits = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    loss = build_loss("focal-bce", gamma, alpha)(logits, HARD)
    their_alpha = -1 if alpha is None else alpha
    expected = sigmoid_focal_loss(their_logits, HARD, their_alpha, gamma).mean(dim=1)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad, their_logits.grad)


def test_focal_bce_of_soft_labels_agrees_with_its_formula_in_float64():
    p, t = LOGITS.double().sigmoid(), SOFT.double()
    positive = 0.3 * t * (1 - p) ** 2 * p.log()
    negative = 0.7 * (1 - t) * p**2 * (1 - p).log()
    loss = build_loss("focal-bce", 2.0, 0.3)(LOGITS, SOFT)
    expected = -(positive + negative).mean(dim=1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


def test_focal_bce_with_gamma_0_is_bce():
    focal, bce = build_loss("focal-bce", 0.0), build_loss("bce")
    torch.testing.assert_close(focal(LOGITS, SOFT), bce(LOGITS, SOFT))


def test_focal_bce_takes_class_indices():
    index, loss = torch.tensor([0, 1, 2, 3, 4, 0]), build_loss("focal-bce")
    torch.testing.assert_close(loss(LOGITS, index), loss(LOGITS, torch.eye(5)[index]))


@pytest.mark.parametrize("name", SIGMOID_LOSSES)
def test_unknown_classes_change_neither_loss_nor_gradient(name):
    target = HARD.clone()
    target[0, :2] = target[3, 4] = torch.nan
    target[5] = torch.nan
    loss_fn, logits = build_loss(name), LOGITS.clone().requires_grad_()
    loss = loss_fn(logits, target)
    loss.sum().backward()
    for clip in range(5):
        known = ~target[clip].isnan()
        expected = loss_fn(LOGITS[clip:clip + 1, known], target[clip:clip + 1, known])
        torch.testing.assert_close(loss[clip:clip + 1], expected)
    assert loss[5] == 0
    assert (logits.grad[target.isnan()] == 0).all() and (logits.grad[~target.isnan()] != 0).all()
    other_logits = torch.where(target.isnan(), LOGITS + 50, LOGITS)
    assert torch.equal(loss_fn(other_logits, target), loss.detach())


@pytest.mark.parametrize("target", [[0.0, 1.0, torch.nan], [1.0, 0.0, 1.0]])
def test_extreme_fp16_logits_give_finite_losses_and_gradients(target):
    logits = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16, requires_grad=True)
    loss = build_loss("focal-bce", 2.0, 0.25)(logits, torch.tensor([target]))
    loss.sum().backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("alpha", [[0.5, 0.5], -0.1, 1.5, "balanced", float("nan")])
def test_focal_bce_refuses_other_alphas_than_none_and_numbers_from_0_to_1(alpha):
    with pytest.raises(ValueError, match="alpha"):
        build_loss("focal-bce", alpha=alpha)


def test_focal_bce_refuses_logit_adjustment():
    with pytest.raises(ValueError, match="logit adjustment"):
        build_loss("focal-bce", tau=1.0, frequency=[1, 2])


def test_a_prediction_is_correct_if_the_highest_known_class_is_a_label():
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3], [3, 2, 1]])
    target = torch.tensor(
        [[1.0, 1, 0], [0, 1, 1], [torch.nan, 1, 0], [0.3, 0.7, 0.7], [0.4, 0.6, 1]])
    assert is_correct(logits, target).tolist() == [True, False, True, True, False]
    index = torch.tensor([0, 1, 2, 2, 0])
    assert is_correct(logits, index).tolist() == (logits.argmax(dim=1) == index).tolist()


def test_mixup_makes_classes_unknown_that_are_unknown_in_one_of_the_two_clips():
    n, rng = 400, np.random.default_rng(0)
    augment = Augment(mixup_alpha=0.4, mixup_p=0.6, seed=1)
    target = torch.from_numpy(rng.choice([0.0, 1.0, np.nan], (n, 3), p=[0.5, 0.3, 0.2])).float()
    identity, clip_ids = torch.eye(n), np.arange(n)
    share = augment.mixup(identity, identity, 5, clip_ids)[1].diagonal()  # of each clip itself
    _, mixed = augment.mixup(identity, target, 5, clip_ids)
    next_target, is_mixed = target.roll(-1, 0), share < 1
    assert 100 < (~is_mixed).sum() < 300
    assert torch.equal(mixed[~is_mixed].nan_to_num(-1), target[~is_mixed].nan_to_num(-1))
    is_unknown = target.isnan() | next_target.isnan()
    assert torch.equal(mixed[is_mixed].isnan(), is_unknown[is_mixed])
    expected = share[:, None] * target + (1 - share[:, None]) * next_target
    is_known = is_mixed[:, None] & ~is_unknown
    torch.testing.assert_close(mixed[is_known], expected[is_known])
