"""Clips with several labels, from the CSV to the test: against scikit-learn, torchvision, float64, and by hand."""
import contextlib
import csv
import html
import json
import os
import re
import signal

import numpy as np
import pytest
import soundfile as sf
import torch
from sklearn import metrics as sk
from torchvision.ops import sigmoid_focal_loss

import evaluate
import predict
import train
from core.scoring import restore
from core.run.checkpoint import load_checkpoint, save_checkpoint
from metrics import metrics_for
from data.augment import Augment
from data.clips import Clips
from data.load import load_manifest
from data.manifest import DataError, Manifest
from data.prepare import prepare
from data.splits import assign_splits, audit, drop_rare, split_hash, write_split
from losses import SIGMOID, build_loss, hits
from report import pictures
from report.compare import CompareError, compare
from tests.faults.harness import outcome, rows, stop_at

HZ = {"low": 300, "mid": 1200, "high": 4000}
SMALL = ["--weights", "none", "--dim", "16", "--depth", "1", "--heads", "2", "--seconds", "0.6", "--device", "cpu", "--amp", "off",
         "--lr-backbone", "3e-3", "--lr-head", "3e-3", "--batch-size", "4", "--effective-batch", "4", "--epochs", "8", "--loss",
         "bce", "--monitor", "val_map"]


# --- the CSV ---

def table(folder, text, name="clips.csv"):
    for line in text.split("\n")[1:]:
        if line:
            (folder / line.split(",")[0]).touch()
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def held(manifest):
    """path -> (labels with the first one first, unknown classes), as names."""
    return {path: tuple([manifest.classes[c] for c in part] for part in manifest.label_sets[i])
            for path, i in zip(manifest.paths, manifest.label_set, strict=True)}


@pytest.mark.parametrize("cells", [("dog;rain", "rain", "dog;cat;rain"), ("dog|rain", " rain ", "dog | rain|cat"),
                                   ("dog;;rain;dog", "rain;", ";dog;rain;cat;rain")])
@pytest.mark.parametrize("column", ["label", "species", "labels"])
def test_several_labels_in_a_cell(tmp_path, cells, column):
    found = load_manifest(table(tmp_path, f"path,{column}\n" + "".join(f"{i}.wav,{cell}\n" for i, cell in enumerate(cells))))
    assert found.classes == ["cat", "dog", "rain"] and found.multi_label
    assert held(found) == {"0.wav": (["dog", "rain"], []), "1.wav": (["rain"], []), "2.wav": (["dog", "cat", "rain"], [])}
    assert found.labels.tolist() == [1, 2, 1] and found.counts().tolist() == [1, 2, 3]
    assert found.targets(np.arange(3)).tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert [found.label_text(row) for row in range(3)] == ["dog; rain", "rain", "dog; cat; rain"]
    assert any("several labels: 2 of 3 clips, 3 at most" in note for note in found.notes)


def test_lists_in_columns_that_are_called_so(tmp_path):
    """FSD50K's commas, the lists of a saved data frame with either quotes, and a comma that is part of a name elsewhere."""
    text = 'fname,labels\na.wav,"Bark,Dog"\nb.wav,"[\'Rain\', ""St. John\'s wren""]"\nc.wav,Dog\nd.wav,"[Rain, Dog]"\n'
    found = held(load_manifest(table(tmp_path, text)))
    assert found == {"a.wav": (["Bark", "Dog"], []), "b.wav": (["Rain", "St. John's wren"], []), "c.wav": (["Dog"], []),
                     "d.wav": (["Rain", "Dog"], [])}
    found = load_manifest(table(tmp_path, 'path,label\na.wav,"Speech, male"\nb.wav,[Rain]\n'))
    assert found.classes == ["Speech, male", "[Rain]"] and not found.multi_label and found.label_sets == []


def test_secondary_labels_are_neither_present_nor_absent(tmp_path):
    text = ("filename,primary_label,secondary_labels,common_name\na.wav,owl,\"['wren', 'tit']\",Owl\nb.wav,wren,[],Wren\n"
            "c.wav,wren,['wren'],Wren\nd.wav,owl,[''],Owl\n")
    found = load_manifest(table(tmp_path, text))
    assert found.classes == ["owl", "wren"]  # no clip has tit as its own
    assert held(found) == {"a.wav": (["owl"], ["wren"]), "b.wav": (["wren"], []), "c.wav": (["wren"], []), "d.wav": (["owl"], [])}
    np.testing.assert_array_equal(found.targets([0, 1]), [[1, np.nan], [0, 1]])
    assert "secondary labels left out, since no clip has them as its own: tit" in found.notes
    known = load_manifest(tmp_path / "clips.csv", known=["owl", "tit", "wren"])
    assert held(known)["a.wav"] == (["owl"], ["tit", "wren"])
    single = found.one_label()
    assert not single.multi_label and single.labels.tolist() == [0, 1, 1, 0] and "not used by a softmax" in single.notes[-1]
    for column in ("unknown", "ignore", "Secondary Labels"):
        found = load_manifest(table(tmp_path, f"path,label,{column}\na.wav,owl;tit,wren;tit\nb.wav,wren,\n"))
        assert held(found) == {"a.wav": (["owl", "tit"], ["wren"]), "b.wav": (["wren"], [])}
    without = load_manifest(table(tmp_path, "path,label,ignore\na.wav,owl,0\nb.wav,wren,1\n"))  # a column of another meaning
    assert not without.multi_label and "left out, since no clip has them as its own: 0, 1" in without.notes[-1]


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    lines = [f"{i}.wav,{'abc'[i % 3]}{';d' * (i % 2)}{';a' * (i % 5 == 0)},{'c' * (i % 4 == 0)}" for i in range(20)]
    one = load_manifest(table(tmp_path, "\n".join(["path,label,unknown", *lines])))
    other = load_manifest(table(tmp_path, "\n".join(["path,label,unknown", *lines[::-1]])))
    assert {**one.to_dict(), "end": 0} == {**other.to_dict(), "end": 0}


@pytest.mark.parametrize("text, says", [
    ("path,label\na.wav,x;y\nb.wav,\n", "row 3: label is ''; make it the name of a class"),
    ("path,label\na.wav,x;y\nb.wav,; |;\n", "row 3: label is '; |;'; make it the name of a class"),
    ("path,labels\na.wav,x;y\nb.wav,[]\n", "row 3: labels is '[]'; make it the name of a class"),
    ("path,labels\na.wav,x;y\nb.wav,['']\n", "row 3: labels is \"['']\"; make it the name of a class"),
    ("path,label\na.wav,x;x\nb.wav,x\n", "only one class (x)"),
    ("path,label\na.wav,x\nb.wav,y\na.wav,y\n", "one clip with two labels, x and y; take one row out, or name both in one row as x;y"),
    ("path,label\na.wav,x;y\nb.wav,y\na.wav,x\n", "rows 2 and 4: one clip with two labels, x;y and x"),
    ("path,label,ignore\na.wav,x,y\nb.wav,y,\na.wav,x,\n", "rows 2 and 4: one clip with two secondary labels, y and "),
])
def test_tables_that_are_refused(tmp_path, text, says):
    with pytest.raises(DataError) as error:
        load_manifest(table(tmp_path, text))
    assert says in str(error.value) and str(error.value).isprintable()


def test_folders_may_have_any_name(tmp_path):
    for name in ("a;b", "c|d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.wav").touch()
    found = load_manifest(tmp_path)
    assert found.classes == ["a;b", "c|d"] and not found.multi_label


# --- the manifest and the splits ---

def drawn(n=400, classes=8, seed=0):
    """A manifest of clips with 1 to 3 labels of unequal classes; class 7 is never a first label. -> (manifest, (n, classes))."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1)
    sets = []
    for _ in range(n):
        labels = rng.choice(classes, rng.integers(1, 4), replace=False, p=share / share.sum()).tolist()
        labels = sorted(labels, key=lambda c: c == 7)
        sets.append((tuple(labels if labels[0] != 7 else [0, 7]), tuple({int(rng.integers(classes))} - set(labels)) * int(
            rng.random() < 0.2)))
    zeros = np.zeros(n, np.int32)
    found = Manifest("m", "/", [f"c{i}" for i in range(classes)], [f"{i:03d}.wav" for i in range(n)], zeros,
                     zeros.astype(np.float32), np.full(n, np.nan, np.float32), np.arange(n, dtype=np.int32) // 2, "column group",
                     np.full(n, -1, np.int8), None, []).with_sets(sets)
    truth = np.zeros((n, classes))
    for row, (labels, unknown) in enumerate(sets):
        truth[row, list(unknown)] = np.nan
        truth[row, list(labels)] = 1
    return found, truth


def test_targets_counts_and_rows():
    found, truth = drawn()
    np.testing.assert_array_equal(found.targets(np.arange(400)), truth)
    rows = np.array([7, 3, 399])
    np.testing.assert_array_equal(found.take(rows).targets(np.arange(3)), truth[rows])
    assert found.counts().tolist() == (truth == 1).sum(0).tolist()
    assert found.having(np.arange(8) == 7).tolist() == (truth[:, 7] == 1).tolist()
    assert found.take([]).counts().tolist() == [0] * 8 and found.take([]).targets(np.zeros(0, int)).shape == (0, 8)


def test_every_class_is_split_by_its_share_wherever_it_stands_in_the_cell():
    found, truth = drawn()
    assign_splits(found, [])
    for split, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        got = (truth[found.rows(split)] == 1).sum(0) / (truth == 1).sum(0)
        assert np.abs(got - share).max() < 0.07, (split, got)
    assert not [line for line in audit(found, []) if "groups" in line]


def test_a_class_without_training_clips_is_seen_behind_the_first_label(tmp_path):
    text = "path,label,split\na.wav,x,train\nb.wav,y,train\nc.wav,x;z,test\n"
    with pytest.raises(DataError, match="label in test that is not in train: z"):
        assign_splits(load_manifest(table(tmp_path, text)), [])
    found = load_manifest(table(tmp_path, "path,label,split\na.wav,x;z,train\nb.wav,y,train\nc.wav,z,test\n"))
    assert assign_splits(found, [], val=0)  # z stands in train, behind x
    single = load_manifest(table(tmp_path, "path,label\na.wav,x;z\nb.wav,y;x\nc.wav,y\n"))
    with pytest.raises(DataError, match="single clip.*: z;"):
        assign_splits(single, [])


def test_rare_classes_leave_the_sets(tmp_path):
    found = load_manifest(table(tmp_path, "path,label,unknown\n" + "".join(f"{i}.wav,{cell}\n" for i, cell in enumerate(
        ["a;r,b", "b,r", "r;b,a", "s,", "a,s", "b;a,"]))))
    smaller, lines = drop_rare(found, 3)
    assert held(smaller) == {"0.wav": (["a"], ["b"]), "1.wav": (["b"], []), "2.wav": (["b"], ["a"]), "4.wav": (["a"], []),
                             "5.wav": (["b", "a"], [])}
    assert smaller.classes == ["a", "b"] and smaller.labels.tolist() == [0, 1, 1, 0, 1]
    assert "r (2), s (1)" in lines[0] and "1 clips in all" in lines[0]
    assert found.having(found.counts() >= 3).tolist() == [True, True, True, False, True, True]


def test_split_csv_can_be_read_again(tmp_path):
    found, truth = drawn(60)
    found = found.relabelled(found.classes, np.arange(8))  # with_sets again: the same
    assign_splits(found, [])
    write_split(found, tmp_path / "split.csv")
    for path in found.paths:
        (tmp_path / path).touch()
    again = load_manifest(tmp_path / "split.csv")
    np.testing.assert_array_equal(again.targets(np.arange(60)), truth)
    assert again.labels.tolist() == found.labels.tolist() and again.split.tolist() == found.split.tolist()
    assert split_hash(again) == split_hash(found)
    again.label_sets[0] = (again.label_sets[0][0], tuple({0, 1, 2, 3} - set(again.label_sets[0][0]) - set(again.label_sets[0][1])))
    assert split_hash(again) != split_hash(found)


def test_equal_files_with_other_labels_are_told(tmp_path):
    found = load_manifest(table(tmp_path, "path,label,split\na.wav,x;y,train\nb.wav,x,train\nc.wav,x;y,train\nd.wav,y,train\n"))
    assert audit(found, [[0, 2]]) == []
    assert "with two labels, e.g. a.wav (x; y) and b.wav (x)" in audit(found, [[0, 1]])[0]


def test_dict_and_back():
    found, truth = drawn(30)
    again = Manifest.from_dict(json.loads(json.dumps(found.to_dict())))  # lists for tuples
    assert again.label_sets == found.label_sets and again.label_set.dtype == np.int32
    np.testing.assert_array_equal(again.targets(np.arange(30)), truth)
    older = {name: value for name, value in found.to_dict().items() if not name.startswith("label_set")}
    assert not Manifest.from_dict(older).multi_label


# --- losses, augmentation ---

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3
HARD = (torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.4).float()
SOFT = torch.rand(6, 5, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("alpha", [None, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 2.0, 1.5])
def test_focal_bce_is_torchvisions(alpha, gamma):
    logits, other = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    loss = build_loss("focal-bce", gamma, alpha)(logits, HARD)
    want = sigmoid_focal_loss(other, HARD, -1 if alpha is None else alpha, gamma).mean(1)
    torch.testing.assert_close(loss, want)
    loss.sum().backward(), want.sum().backward()
    torch.testing.assert_close(logits.grad, other.grad)


def test_focal_bce_of_soft_labels_by_its_formula_in_float64():
    p, t = LOGITS.double().sigmoid(), SOFT.double()
    want = -(0.3 * t * (1 - p) ** 2 * p.log() + 0.7 * (1 - t) * p**2 * (1 - p).log()).mean(1)
    torch.testing.assert_close(build_loss("focal-bce", 2.0, 0.3)(LOGITS, SOFT).double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(build_loss("focal-bce", 0.0)(LOGITS, SOFT), build_loss("bce")(LOGITS, SOFT))
    index = torch.tensor([0, 1, 2, 3, 4, 0])
    torch.testing.assert_close(build_loss("focal-bce")(LOGITS, index), build_loss("focal-bce")(LOGITS, torch.eye(5)[index]))


@pytest.mark.parametrize("name", SIGMOID)
def test_unknown_labels_change_neither_loss_nor_gradient(name):
    target = HARD.clone()
    target[0, :2] = target[3, 4] = torch.nan
    target[5] = torch.nan
    logits = LOGITS.clone().requires_grad_()
    loss = build_loss(name)(logits, target)
    loss.sum().backward()
    for clip in range(5):  # the same as the loss over its known classes alone
        known = ~target[clip].isnan()
        torch.testing.assert_close(loss[clip:clip + 1], build_loss(name)(LOGITS[clip:clip + 1, known], target[clip:clip + 1, known]))
    assert loss[5] == 0 and (logits.grad[target.isnan()] == 0).all() and (logits.grad[~target.isnan()] != 0).all()
    moved = torch.where(target.isnan(), LOGITS + 50, LOGITS)
    assert torch.equal(build_loss(name)(moved, target), loss.detach())


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16, requires_grad=True)
    for target in (torch.tensor([[0.0, 1.0, torch.nan]]), torch.tensor([[1.0, 0.0, 1.0]])):
        loss = build_loss("focal-bce", 2.0, 0.25)(logits, target)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and loss.dtype == torch.float32 and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("alpha", [[0.5, 0.5], -0.1, 1.5, "balanced", float("nan")])
def test_alpha_of_focal_bce(alpha):
    with pytest.raises(ValueError, match="alpha of focal-bce"):
        build_loss("focal-bce", alpha=alpha)
    with pytest.raises(ValueError, match="softmax"):
        build_loss("focal-bce", tau=1.0, frequency=[1, 2])


def test_hits():
    nan = torch.nan
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3], [3, 2, 1]])
    target = torch.tensor([[1.0, 1, 0], [0, 1, 1], [nan, 1, 0], [0.3, 0.7, 0.7], [0.4, 0.6, 1]])
    assert hits(logits, target).tolist() == [True, False, True, True, False]
    index = torch.tensor([0, 1, 2, 2, 0])
    assert hits(logits, index).tolist() == (logits.argmax(1) == index).tolist()


def test_mixup_keeps_what_is_unknown_in_either_and_leaves_the_others_alone():
    augment, n = Augment(mixup_alpha=0.4, mixup_p=0.6, seed=1), 400
    rng = np.random.default_rng(0)
    target = torch.from_numpy(rng.choice([0.0, 1.0, np.nan], (n, 3), p=[0.5, 0.3, 0.2])).float()
    share = augment.mixup(torch.eye(n), torch.eye(n), 5, np.arange(n))[1].diagonal()
    _, mixed = augment.mixup(torch.eye(n), target, 5, np.arange(n))
    other, alone = target.roll(-1, 0), share == 1
    assert 100 < alone.sum() < 300
    assert torch.equal(mixed[alone].nan_to_num(-1), target[alone].nan_to_num(-1))
    assert torch.equal(mixed[~alone].isnan(), (target.isnan() | other.isnan())[~alone])
    both = ~alone[:, None] & ~target.isnan() & ~other.isnan()
    torch.testing.assert_close(mixed[both], (share[:, None] * target + (1 - share[:, None]) * other)[both])


# --- the program ---

def record(folder, i, names, seed=0, prefix=""):
    rng = np.random.default_rng([seed, i])
    t = np.arange(int(0.6 * 16000)) / 16000
    wave = sum(0.15 * np.sin(2 * np.pi * HZ[name] * rng.uniform(0.97, 1.03) * t + rng.uniform(0, 6)) for name in names)
    sf.write(folder / f"{prefix}{i}.wav", (wave + 0.02 * rng.standard_normal(len(t))).astype(np.float32), 16000)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """A folder of 90 clips that hold 1 to 3 of three tones, with clips.csv (path,label,fold)."""
    folder, rng, lines = tmp_path_factory.mktemp("mixtures"), np.random.default_rng(0), ["path,label,fold"]
    for i in range(90):
        names = rng.permutation(list(HZ))[:rng.integers(1, 4)].tolist()
        record(folder, i, names)
        lines.append(f"{i}.wav,{';'.join(names)},{i % 3}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    (folder / "mixed.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in lines) + "\n")  # without folds
    return folder


def go(script, *flags, prepare=None):
    """The script's main in this process -> exit code as of the process; signal handlers are put back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        if prepare:
            prepare(patch)
        try:
            return script.main(list(map(str, flags))) or 0
        except script.INPUT_ERRORS as error:
            return script.fail(error)
        except SystemExit as stop:
            return stop.code
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


@contextlib.contextmanager
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("schedule", "batch", "curves"):
            patch.setattr(pictures, name, lambda *_, **__: None)
        patch.setattr(pictures, "confusion", lambda *_, **__: pytest.fail("a confusion matrix of several labels"))
        patch.setattr(train, "write_report", lambda *_: "")
        yield patch


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home for the cache of all runs of this file."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def trained(mixtures, home):
    """The folder of a finished run over the mixtures."""
    assert go(train, "--data", mixtures / "mixed.csv", *SMALL, "--run-dir", home / "run") == 0
    return home / "run"


def figures(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_tiny_model_learns_the_mixtures(trained):
    found = figures(trained / "test")
    assert found["map"] > 0.9 and found["micro_f1"] > 0.8 and found["accuracy"] > 0.9
    assert set("accuracy balanced_accuracy macro_f1 weighted_f1 map n micro_f1_ci95 ece recall_head".split()) <= found.keys()
    assert json.loads((trained / "run.json").read_text())["multi_label"] is True
    assert sorted(path.name for path in (trained / "test").iterdir()) == ["metrics.json", "per_class.csv", "predictions.csv", "scores.npz"]
    assert list(rows(trained / "history.csv", ())[0])[:7] == "epoch train_loss train_acc val_loss val_acc val_macro_f1 val_map".split()


def test_the_figures_from_the_files_alone(trained, mixtures):
    """predictions.csv against the CSV of the data, and both against metrics.json, with scikit-learn."""
    with open(mixtures / "mixed.csv", newline="") as file:
        wanted = {row["path"]: set(row["label"].split(";")) for row in csv.DictReader(file)}
    classes = sorted(HZ)
    predictions = rows(trained / "test" / "predictions.csv")
    assert all(set(row["label"].split("; ")) == wanted[row["path"]] for row in predictions)
    truth, said = (np.array([[name in row[column].split("; ") for name in classes] for row in predictions]) for column in (
        "label", "prediction"))
    top = [row["top5"].split("; ")[0].split(" ")[0] in wanted[row["path"]] for row in predictions]
    found = figures(trained / "test")
    assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, said, average="macro", zero_division=0))
    assert found["micro_f1"] == pytest.approx(sk.f1_score(truth, said, average="micro"))
    assert found["accuracy"] == pytest.approx(np.mean(top))
    with np.load(trained / "test" / "scores.npz") as file:
        assert file["labels"].tolist() == truth.astype(float).tolist() and file["said"].tolist() == said.tolist()
        assert found["map"] == pytest.approx(sk.average_precision_score(truth, file["scores"], average="macro"))
    state = load_checkpoint(trained / "best.pt")
    per = rows(trained / "test" / "per_class.csv")
    assert [float(row["threshold"]) for row in per] == pytest.approx(state["calibration"]["thresholds"], abs=1e-6)
    assert [int(row["support"]) for row in per] == truth.sum(0).tolist()


def test_the_report_of_several_labels(trained, tmp_path):
    """report.html against predictions.csv: what was found, what was said, and each pair of a miss and a false alarm. Of the
    training clips: of these some are wrong."""
    assert go(evaluate, "--ckpt", trained / "best.pt", "--device", "cpu", "--amp", "off", "--split", "train", "--out", tmp_path) == 0
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    words = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", source)))
    predictions = rows(tmp_path / "predictions.csv")
    for row in predictions:  # the confidence is that of what is said, where anything is
        scores = {name: float(score) for name, score in (part.rsplit(" ", 1) for part in row["top5"].split("; "))}
        assert float(row["confidence"]) == pytest.approx(max(
            score for name, score in scores.items() if not row["prediction"] or name in row["prediction"].split("; ")), abs=1e-4)
    sets = [tuple({name for name in row[column].split("; ") if name} for column in ("label", "prediction")) for row in predictions]
    held, said, hits = (sum(map(len, part)) for part in zip(*((a, b, a & b) for a, b in sets)))
    assert f"Of the {held} labels of {len(sets)} training clips {hits / held:.1%} are found, and {hits / said:.1%} of the labels given are right." in words
    cells = json.loads(re.search(r'id="clips">(.*?)</script>', source)[1])
    names, wanted = sorted(HZ), {}
    for row, (truth, answer) in zip(predictions, sets):
        pairs = [(name, name) for name in truth & answer]
        if truth != answer:
            pairs += [(a, b) for a in truth - answer or {"(none)"} for b in answer - truth or {"(none)"}]
        for pair in pairs:
            wanted.setdefault(pair, []).append(row["path"])
    place = {name: i for i, name in enumerate([*names, "(none)"])}
    found = {cell: sorted(clip[0] for clip in clips) for cell, clips in cells["cells"].items()}
    assert cells["names"] == [*names, "(none)"]
    assert found == {f"{place[a]},{place[b]}": sorted(paths)[:50] for (a, b), paths in wanted.items() if len(paths) <= 50} | {
        cell: paths for cell, paths in found.items() if len(paths) == 50}
    assert len({pair for pair in wanted if pair[0] != pair[1]}) > 1
    drawn = {cell: int(n) for cell, n in re.findall(r'data-cell="([\d,]+)"[^>]*aria-label="[^"]*: (\d+) of', source)}
    assert drawn == {f"{place[a]},{place[b]}": len(paths) for (a, b), paths in wanted.items()}
    assert "threshold" in words and "Of the clips to which it gives a class 80%" in words and source.count('class="card"') > 6


def test_a_split_without_clips_of_several_labels_is_told(mixtures, tmp_path):
    lines = (mixtures / "mixed.csv").read_text().splitlines()[1:]
    single, several = ([line for line in lines if (";" in line) == more] for more in (False, True))
    assert len(single) > 12 and len(several) > 3
    for tests_have, wanted in ((False, "no clip with several labels in test: the figures there say nothing of such clips"), (True, None)):
        splits = ["test"] * 9 + ["train"] * (len(single) - 9)
        rows_ = [f"{line},{split}" for line, split in zip(single, splits)] + [f"{line},{split}" for line, split in zip(
            several, ["val", "train", "test" if tests_have else "val", *["train"] * 99])]
        (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows_]) + "\n")
        said = []
        prepare(tmp_path / "t.csv", mixtures, cache_dir=tmp_path, say=said.append, several=True)
        found = [line.strip() for part in said for line in str(part).splitlines() if "no clip with several" in line]
        assert found == ([wanted] if wanted else []), said


def test_evaluate_repeats_the_test_and_the_validation(trained, tmp_path, capsys):
    assert go(evaluate, "--ckpt", trained / "best.pt", "--device", "cpu", "--amp", "off", "--out", tmp_path / "test") == 0
    assert "confusion" not in capsys.readouterr().out
    assert figures(tmp_path / "test") == figures(trained / "test")
    assert go(evaluate, "--ckpt", trained / "best.pt", "--device", "cpu", "--amp", "off", "--split", "val", "--out", tmp_path / "val") == 0
    found, epochs = figures(tmp_path / "val"), rows(trained / "history.csv")
    best = epochs[load_checkpoint(trained / "best.pt")["progress"]["best_epoch"] - 1]
    for column, name in (("val_map", "map"), ("val_macro_f1", "macro_f1"), ("val_acc", "accuracy"), ("val_loss", "loss")):
        assert found[name] == pytest.approx(float(best[column]), abs=1e-6), name


def test_predict_says_of_a_recording_what_evaluate_says_of_the_clip(trained, mixtures, tmp_path):
    """The same labels with the same scores, from the same file by either way."""
    assert go(predict, "--ckpt", trained / "best.pt", "--device", "cpu", "--amp", "off", "--out", tmp_path / "p", mixtures) == 0
    found = {}
    for row in rows(tmp_path / "p" / "files.csv"):
        found.setdefault(os.path.basename(row["path"]), {})[row["label"]] = float(row["score"])
    several = 0
    for row in rows(trained / "test" / "predictions.csv"):
        scores = dict(part.rsplit(" ", 1) for part in row["top5"].split("; "))
        said = {name for name in row["prediction"].split("; ") if name}
        assert {name for name in found[row["path"]] if name} == said
        assert all(abs(found[row["path"]][name] - float(scores[name])) < 1e-3 for name in said)
        several += len(said) > 1
    assert several > 3


def test_interrupted_and_resumed_equals_uninterrupted(mixtures, home, tmp_path):
    flags = ["--data", mixtures / "mixed.csv", *SMALL, "--epochs", 2, "--mixup-alpha", 0.4, "--loss", "focal-bce", "--alpha", 0.4]
    with no_pictures():
        assert go(train, *flags, "--run-dir", tmp_path / "a") == 0
        assert go(train, *flags, "--run-dir", tmp_path / "b", prepare=stop_at(20)) == 143
        assert 0 < load_checkpoint(tmp_path / "b" / "last.pt")["progress"]["step"] < 32
        assert go(train, "--resume", "--run-dir", tmp_path / "b") == 0
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert figures(tmp_path / "a" / "test") == figures(tmp_path / "b" / "test")


def test_other_data(trained, tmp_path, capsys):
    """Clips with several labels, with one each, with unknown ones; a class that the checkpoint does not know."""
    names = [["low", "mid"], ["high"], ["mid", "high", "low"], ["low"], ["mid"], ["high", "low"]]
    for i, held in enumerate(names):
        record(tmp_path, i, held, 5, "other")

    def evaluated(cells):
        (tmp_path / "c.csv").write_text("path,label,secondary_labels\n" + "".join(f"other{i}.wav,{cell}\n" for i, cell in enumerate(cells)))
        code = go(evaluate, "--ckpt", trained / "best.pt", "--device", "cpu", "--data", tmp_path / "c.csv", "--out", tmp_path / "out")
        return code or np.load(tmp_path / "out" / "scores.npz")["labels"].tolist()
    assert evaluated([";".join(held) + "," for held in names]) == [[float(name in held) for name in sorted(HZ)] for held in names]
    assert figures(tmp_path / "out")["n"] == 6 and figures(tmp_path / "out")["map"] > 0.8
    assert evaluated(["low,", "high,", "mid,", "low,", "mid,", "high,"])[:3] == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    found = np.array(evaluated(["low,['mid']", "high,", "high,\"['mid', 'low', 'owl']\"", "low,", "low,", "high,low"]))
    np.testing.assert_array_equal(found[[0, 2, 5]], [[0, 1, np.nan], [1, np.nan, np.nan], [1, np.nan, 0]])  # mid: known to the model
    capsys.readouterr()
    assert evaluated(["low,", "purple;low,"] + ["mid,"] * 4) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --data: classes that the checkpoint does not know: purple") and error.count("\n") == 1


def test_scores_are_sigmoids_of_the_models_own_logits(trained):
    state = load_checkpoint(trained / "best.pt")
    model, frontend = restore(state, torch.device("cpu"))
    model.eval()
    data = Manifest.from_dict(state["manifest"])
    with np.load(trained / "test" / "scores.npz") as file, torch.inference_mode():
        for row, scores in zip(file["rows"][:4], file["scores"], strict=False):
            logits = model(frontend(Clips(data, 22050, 13230).batch([(int(row), 0)]).wave))[0].double().numpy()
            np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), atol=2e-4)  # the run's clips are rounded to 16 bits


def test_rare_classes_are_left_out_by_all_their_clips(mixtures, tmp_path):
    """One class behind the first label of five clips, one of two; two of the files are the same."""
    lines = (mixtures / "mixed.csv").read_text().rstrip().split("\n")
    extra = {1: ";some", 2: ";some", 3: ";some", 4: ";some", 5: ";some", 6: ";few", 7: ";few"}
    copy = lines[10].replace(".wav", "_copy.wav")
    (tmp_path / "c.csv").write_text("\n".join(line + extra.get(i, "") for i, line in enumerate(lines)) + f"\n{copy}\n00few.wav,few\n")
    for path in mixtures.glob("*.wav"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / copy.split(",")[0]).symlink_to(mixtures / "9.wav")
    record(tmp_path, 9, ["low"], 7, "few")
    (tmp_path / "few9.wav").rename(tmp_path / "00few.wav")
    found, _ = prepare(tmp_path / "c.csv", min_clips=4, cache_dir=tmp_path / "cache", say=lambda line: None, several=True)
    assert found.classes == ["high", "low", "mid", "some"] and len(found) == 91 and found.counts()[3] == 5
    one, other = found.paths.index("9.wav"), found.paths.index("9_copy.wav")
    assert found.split[one] == found.split[other]  # the same file stays in one split, though a row before it is gone


def test_birdclef_secondary_labels_stay_out_of_the_negatives(mixtures, home, tmp_path, capsys):
    """Each clip's other tones given as secondary labels. Multi-label under a sigmoid loss; under a softmax, not used, and said."""
    with open(mixtures / "mixed.csv", newline="") as file:
        cells = [(row["path"], row["label"].split(";")) for row in csv.DictReader(file)]
    (mixtures / "train.csv").write_text("primary_label,secondary_labels,filename\n" + "".join(
        f'{first},"{rest!r}",{path}\n' for path, (first, *rest) in cells))
    flags = ["--data", mixtures / "train.csv", *SMALL, "--epochs", 1]
    with no_pictures() as patch:
        assert go(train, *flags, "--run-dir", tmp_path / "a") == 0
        state = load_checkpoint(tmp_path / "a" / "best.pt")
        manifest = Manifest.from_dict(state["manifest"])
        clips = Clips(manifest, 22050, 13230)
        batch = clips.batch([(row, 0) for row in range(90)])
        want = dict(cells)
        for row, target in zip(batch.rows, batch.target, strict=True):
            names = want[manifest.paths[row]]
            assert target.nan_to_num(-1).tolist() == [1.0 if c == names[0] else -1.0 if c in names else 0.0 for c in manifest.classes]
        patch.setattr(pictures, "confusion", lambda *_, **__: None)
        assert go(train, *flags, "--loss", "focal", "--monitor", "val_acc", "--run-dir", tmp_path / "b") == 0
    assert "secondary labels are not used by a softmax loss" in capsys.readouterr().out
    assert not Manifest.from_dict(load_checkpoint(tmp_path / "b" / "best.pt")["manifest"]).multi_label
    record(tmp_path, 0, ["low", "mid"], prefix="other")  # several labels for a checkpoint of single ones
    record(tmp_path, 1, ["high"], prefix="other")
    (tmp_path / "c.csv").write_text("path,label\nother0.wav,low;mid\nother1.wav,high\n")
    assert go(evaluate, "--ckpt", tmp_path / "b" / "best.pt", "--device", "cpu", "--data", tmp_path / "c.csv") == 2
    error = capsys.readouterr().err
    assert "has learnt that a clip has one" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags, says", [
    (["--loss", "focal"], "60 of 90 clips have several labels, such as"),
    (["--loss", "ce"], "use --loss bce or focal-bce"),
    (["--loss", "focal-bce", "--logit-adjust", 1], "--logit-adjust: belongs to a softmax loss"),
    (["--loss", "focal-bce", "--alpha", "balanced"], "--alpha balanced: with --loss focal-bce none, or a number in 0 to 1"),
    (["--loss", "focal-bce", "--alpha", 2], "--alpha 2.0"),
    (["--loss", "focal-bce", "--alpha", "nan"], "--alpha nan"),
])
def test_flags_that_do_not_fit(flags, says, mixtures, home, tmp_path, capsys):
    several = sum(";" in line for line in (mixtures / "mixed.csv").read_text().split("\n"))
    capsys.readouterr()
    assert go(train, "--data", mixtures / "mixed.csv", *SMALL, *flags, "--run-dir", tmp_path / "r") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says.replace("60", str(several)) in error
    assert not (tmp_path / "r").exists()


def test_all_folds_and_their_pooled_figures(mixtures, home, tmp_path):
    with no_pictures():
        assert go(train, "--data", mixtures / "clips.csv", *SMALL, "--epochs", 1, "--folds", "all", "--run-dir", tmp_path / "r") == 0
    found = json.loads((tmp_path / "r" / "folds.json").read_text())
    parts = [np.load(tmp_path / "r" / f"fold{i}" / "test" / "scores.npz") for i in range(3)]
    truth, said, scores = (np.concatenate([part[name] for part in parts]) for name in ("labels", "said", "scores"))
    assert found["pooled"]["n"] == 90 and set(found["over_folds"]) == set(metrics_for(multi_label=True))
    assert found["pooled"]["micro_f1"] == pytest.approx(sk.f1_score(truth, said, average="micro"))
    assert found["pooled"]["map"] == pytest.approx(sk.average_precision_score(truth, scores, average="macro"))


def test_two_runs_side_by_side(trained, mixtures, home, tmp_path):
    with no_pictures():
        assert go(train, "--data", mixtures / "mixed.csv", *SMALL, "--epochs", 1, "--run-dir", tmp_path / "other") == 0
    text = compare(trained, tmp_path / "other", tmp_path / "out.png")
    for line, name in zip([line for line in text if line.startswith(("  accuracy", "  macro_f1"))], ("accuracy", "macro_f1"), strict=True):
        a, b = figures(trained / "test")[name], figures(tmp_path / "other" / "test")[name]
        assert f"a {a:.3f}   b {b:.3f}   b - a {b - a:+.3f}" in line
    same = "\n".join(compare(trained, trained, tmp_path / "out.png"))
    assert same.count("b - a +0.000   (95% interval +0.000 to +0.000)\n") == 2
    run = json.loads((tmp_path / "other" / "run.json").read_text())
    (tmp_path / "other" / "run.json").write_text(json.dumps({**run, "multi_label": False}))
    with pytest.raises(CompareError, match="several labels in one run alone"):
        compare(trained, tmp_path / "other", tmp_path / "out.png")


def test_smoke(mixtures, home, tmp_path, capsys):
    assert go(train, "--data", mixtures / "mixed.csv", *SMALL, "--smoke", "--run-dir", tmp_path / "r") == 0
    out = capsys.readouterr().out
    assert "smoke: passed" in out and "100% correct" in out


# --- hostile checkpoints ---

def sets(edit):
    """-> edit of a state: its manifest's label_sets as lists, changed in place."""
    def change(state):
        found = [[list(part) for part in both] for both in state["manifest"]["label_sets"]]
        edit(found)
        state["manifest"]["label_sets"] = found
    return change


def manifest(**changes):
    return lambda state: state["manifest"].update({name: value(state["manifest"][name]) if callable(value) else value
                                                   for name, value in changes.items()})


EDITS = {
    "class too high": sets(lambda found: found[0][0].append(99)),
    "class too low": sets(lambda found: found[0][0].append(-1)),
    "class of 10 ** 30": sets(lambda found: found[0][1].append(10**30)),
    "class a fraction": sets(lambda found: found[0][1].append(0.5)),
    "class NaN": sets(lambda found: found[0][0].append(float("nan"))),
    "class true": sets(lambda found: found[0][1].append(True)),
    "class a text": sets(lambda found: found[0][0].append("low")),
    "class a list": sets(lambda found: found[0][0].append([1])),
    "a class twice": sets(lambda found: found[0][0].append(found[0][0][0])),
    "present and unknown": sets(lambda found: found[0][1].append(found[0][0][0])),
    "no class": sets(lambda found: found[0][0].clear()),
    "three parts": sets(lambda found: found[0].append([])),
    "one part": sets(lambda found: found[0].pop()),
    "other first labels": sets(lambda found: found.reverse()),
    "sets missing": manifest(label_sets=[]),
    "sets a text": manifest(label_sets="low"),
    "sets a number": manifest(label_sets=7),
    "set too high": manifest(label_set=lambda values: [99, *values[1:]]),
    "set too low": manifest(label_set=lambda values: [-1, *values[1:]]),
    "set of 10 ** 10": manifest(label_set=lambda values: [10**10, *values[1:]]),
    "set of text": manifest(label_set=lambda values: ["low", *values[1:]]),
    "column too short": manifest(label_set=lambda values: values[1:]),
    "column a number": manifest(label_set=3),
    "first label of another set": manifest(labels=lambda values: [(values[0] + 1) % 3, *values[1:]]),
    "a softmax loss": lambda state: state["loss"].update(name="focal"),
    "alpha of many": lambda state: state["loss"].update(name="focal-bce", alpha=[1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_altered_checkpoint(kind, trained, tmp_path, capsys, recwarn):
    state = dict(load_checkpoint(trained / "best.pt"))
    EDITS[kind](state)
    state.pop("version"), state.pop("format")
    save_checkpoint(tmp_path / "x.pt", state)
    assert go(evaluate, "--ckpt", tmp_path / "x.pt", "--device", "cpu", "--amp", "off", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/x.pt: does not say what train.py writes") and error.count("\n") == 1
    assert not recwarn.list and not (tmp_path / "out").exists()
    if kind in ("class too high", "set too high", "sets missing"):
        assert go(train, "--resume", tmp_path / "x.pt", "--run-dir", tmp_path / "r") == 2


def test_a_resumed_run_whose_flags_name_a_softmax(trained, tmp_path, capsys):
    state = dict(load_checkpoint(trained / "best.pt"))
    state["flags"]["loss"] = "focal"
    state.pop("version"), state.pop("format")
    save_checkpoint(tmp_path / "x.pt", state)
    assert go(train, "--resume", tmp_path / "x.pt", "--run-dir", tmp_path / "r") == 2
    assert "several labels a clip, which its loss cannot learn" in capsys.readouterr().err
