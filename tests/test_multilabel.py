"""Clips with several labels: training, evaluation, prediction, report and altered checkpoints.

test_multilabel_data.py has the parts below the program: tables, manifests, splits and losses.
"""
import contextlib
import html
import json
import os
import re
import shutil

import numpy as np
import pytest
import soundfile as sf
import torch
from sklearn import metrics as sk

import evaluate
import predict
import train
from core.run.checkpoint import load_checkpoint, save_checkpoint
from core.scoring import restore
from data.clips import Clips
from data.manifest import Manifest
from data.prepare import prepare
from metrics import metrics_for
from report import pictures
from report.compare import CompareError, compare
from tests.faults.harness import exit_code, outcome, rows, stop_at

HZ = {"low": 300, "mid": 1200, "high": 4000}
CLASSES = sorted(HZ)
ON_CPU = ["--device", "cpu", "--amp", "off"]
SMALL = ["--weights", "none", "--dim", "16", "--depth", "1", "--heads", "2", "--seconds", "0.6",
         "--lr-backbone", "3e-3", "--lr-head", "3e-3", "--batch-size", "4",
         "--effective-batch", "4", "--epochs", "8", "--loss", "bce", "--monitor", "val_map",
         *ON_CPU]


def write_tones(path, names, seed):
    """Write 0.6 s of these tones together, in noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(0.6 * 16000)) / 16000
    waves = []
    for name in names:
        hz, phase = HZ[name] * rng.uniform(0.97, 1.03), rng.uniform(0, 6)
        waves.append(0.15 * np.sin(2 * np.pi * hz * t + phase))
    wave = sum(waves) + 0.02 * rng.standard_normal(len(t))
    sf.write(path, wave.astype(np.float32), 16000)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """A folder of 90 clips with 1 to 3 tones each; folds.csv has path, label and fold.

    clips.csv is the same table without folds.
    """
    folder, rng, lines = tmp_path_factory.mktemp("mixtures"), np.random.default_rng(0), []
    for i in range(90):
        names = rng.permutation(list(HZ))[:rng.integers(1, 4)].tolist()
        write_tones(folder / f"{i}.wav", names, [0, i])
        lines.append(f"{i}.wav,{';'.join(names)}")
    (folder / "clips.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    lines = [f"{line},{i % 3}" for i, line in enumerate(lines)]
    (folder / "folds.csv").write_text("\n".join(["path,label,fold", *lines]) + "\n")
    return folder


def labels_in(folder):
    """{path: names of its labels, the first one first} in clips.csv."""
    return {row["path"]: row["label"].split(";") for row in rows(folder / "clips.csv")}


@contextlib.contextmanager
def without_pictures():
    """No pictures and no report; a confusion matrix fails the test."""
    def fail(*_, **__):
        pytest.fail("a confusion matrix of clips with several labels")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("schedule", "batch", "curves"):
            patch.setattr(pictures, name, lambda *_, **__: None)
        patch.setattr(pictures, "confusion", fail)
        patch.setattr(train, "write_report", lambda *_: "")
        yield patch


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with the cache of all runs of this file."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def trained(mixtures, home):
    """The folder of a finished run over the mixtures."""
    flags = ["--data", mixtures / "clips.csv", *SMALL, "--run-dir", home / "run"]
    assert exit_code(train.main, *flags) == 0
    return home / "run"


def run_evaluate(ckpt, out, *flags):
    """-> exit code"""
    return exit_code(evaluate.main, "--ckpt", ckpt, "--out", out, *ON_CPU, *flags)


def metrics_in(folder):
    return json.loads((folder / "metrics.json").read_text())


def names_in(cell):
    """The class names in a cell of predictions.csv."""
    return {name for name in cell.split("; ") if name}


def scores_in(cell):
    """{class: score} in a cell of the column top5."""
    pairs = [text.rsplit(" ", 1) for text in cell.split("; ")]
    return {name: float(score) for name, score in pairs}


# --- results ---

def test_a_tiny_model_learns_the_mixtures(trained):
    metrics = metrics_in(trained / "test")
    assert metrics["map"] > 0.9 and metrics["micro_f1"] > 0.8 and metrics["accuracy"] > 0.9


def test_result_files_of_several_labels(trained):
    names = {"accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "map", "n",
             "micro_f1_ci95", "ece", "recall_head"}
    assert names <= metrics_in(trained / "test").keys()
    assert json.loads((trained / "run.json").read_text())["multi_label"] is True
    files = sorted(path.name for path in (trained / "test").iterdir())
    assert files == ["metrics.json", "per_class.csv", "predictions.csv", "scores.npz"]
    columns = list(rows(trained / "history.csv", without=())[0])
    assert columns[:7] == ["epoch", "train_loss", "train_acc", "val_loss", "val_acc",
                           "val_macro_f1", "val_map"]


def test_metrics_follow_from_the_files_by_scikit_learn(trained, mixtures):
    """predictions.csv against the table of the data, metrics.json against both."""
    labels, table = labels_in(mixtures), rows(trained / "test" / "predictions.csv")
    assert all(names_in(row["label"]) == set(labels[row["path"]]) for row in table)
    truth, predicted = (
        np.array([[name in names_in(row[column]) for name in CLASSES] for row in table])
        for column in ("label", "prediction"))
    best = [next(iter(scores_in(row["top5"]))) for row in table]
    is_correct = [name in labels[row["path"]] for name, row in zip(best, table)]
    metrics = metrics_in(trained / "test")
    assert metrics["macro_f1"] == pytest.approx(
        sk.f1_score(truth, predicted, average="macro", zero_division=0))
    assert metrics["micro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="micro"))
    assert metrics["accuracy"] == pytest.approx(np.mean(is_correct))
    with np.load(trained / "test" / "scores.npz") as file:
        assert file["labels"].tolist() == truth.astype(float).tolist()
        assert file["predicted"].tolist() == predicted.tolist()
        assert metrics["map"] == pytest.approx(
            sk.average_precision_score(truth, file["scores"], average="macro"))
    per_class = rows(trained / "test" / "per_class.csv")
    calibration = load_checkpoint(trained / "best.pt")["calibration"]
    thresholds = [float(row["threshold"]) for row in per_class]
    assert thresholds == pytest.approx(calibration["thresholds"], abs=1e-6)
    assert [int(row["support"]) for row in per_class] == truth.sum(axis=0).tolist()


def test_scores_are_sigmoids_of_the_models_logits(trained):
    checkpoint = load_checkpoint(trained / "best.pt")
    model, frontend = restore(checkpoint, torch.device("cpu"))
    model.eval()
    clips = Clips(Manifest.from_dict(checkpoint["manifest"]), 22050, 13230)
    with np.load(trained / "test" / "scores.npz") as file, torch.inference_mode():
        for row, scores in zip(file["rows"][:4], file["scores"]):
            wave = clips.batch([(int(row), 0)]).wave
            logits = model(frontend(wave))[0].double().numpy()
            # The run's clips are rounded to 16 bits in its cache.
            np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), atol=2e-4)


def test_evaluate_repeats_test_and_validation(trained, tmp_path, capsys):
    assert run_evaluate(trained / "best.pt", tmp_path / "test") == 0
    assert "confusion" not in capsys.readouterr().out
    assert metrics_in(tmp_path / "test") == metrics_in(trained / "test")
    assert run_evaluate(trained / "best.pt", tmp_path / "val", "--split", "val") == 0
    metrics, history = metrics_in(tmp_path / "val"), rows(trained / "history.csv")
    best_epoch = load_checkpoint(trained / "best.pt")["progress"]["best_epoch"]
    for column, name in (("val_map", "map"), ("val_macro_f1", "macro_f1"),
                         ("val_acc", "accuracy"), ("val_loss", "loss")):
        expected = float(history[best_epoch - 1][column])
        assert metrics[name] == pytest.approx(expected, abs=1e-6), name


def test_predictions_of_recordings_are_those_of_evaluate(trained, mixtures, tmp_path):
    """The same labels with the same scores for the same file."""
    flags = ["--ckpt", trained / "best.pt", "--out", tmp_path / "p", *ON_CPU]
    assert exit_code(predict.main, *flags, mixtures) == 0
    predicted = {}
    for row in rows(tmp_path / "p" / "files.csv"):
        labels = predicted.setdefault(os.path.basename(row["path"]), {})
        if row["label"]:
            labels[row["label"]] = float(row["score"])
    n_several = 0
    for row in rows(trained / "test" / "predictions.csv"):
        labels, scores = names_in(row["prediction"]), scores_in(row["top5"])
        assert predicted[row["path"]].keys() == labels
        for name in labels:
            assert abs(predicted[row["path"]][name] - scores[name]) < 1e-3
        n_several += len(labels) > 1
    assert n_several > 3


# --- the report ---

@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    """(rows of predictions.csv, source of report.html) of the training clips.

    Some of them are classified wrongly.
    """
    folder = tmp_path_factory.mktemp("report")
    assert run_evaluate(trained / "best.pt", folder, "--split", "train") == 0
    source = (folder / "report.html").read_text(encoding="utf-8")
    return rows(folder / "predictions.csv"), source


def text_of(source):
    """The text of HTML, with single spaces."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", source)))


def test_confidence_is_the_highest_score_of_the_predicted_classes(report):
    table, _ = report
    for row in table:
        scores = scores_in(row["top5"])
        answers = names_in(row["prediction"]) or scores.keys()
        expected = max(scores[name] for name in answers)
        assert float(row["confidence"]) == pytest.approx(expected, abs=1e-4)


def test_the_title_has_recall_and_precision(report):
    table, source = report
    pairs = [(names_in(row["label"]), names_in(row["prediction"])) for row in table]
    n_labels = sum(len(labels) for labels, _ in pairs)
    n_predicted = sum(len(predicted) for _, predicted in pairs)
    n_correct = sum(len(labels & predicted) for labels, predicted in pairs)
    title = text_of(re.search(r"<h1>(.*?)</h1>", source, re.S)[1])
    assert re.findall(r"\d+(?:\.\d+%)?", title) == [
        f"{n_correct / n_labels:.1%}", str(n_labels), str(len(table)),
        f"{n_correct / n_predicted:.1%}"]


def outcome_pairs(labels, predicted):
    """[(true, predicted)]: each label that is found, and each pair of a miss and a false alarm."""
    missed, false_alarms = labels - predicted, predicted - labels
    pairs = [(name, name) for name in labels & predicted]
    if missed or false_alarms:
        pairs += [(true, wrong) for true in missed or {"(none)"}
                  for wrong in false_alarms or {"(none)"}]
    return pairs


def test_the_matrix_has_every_pair_of_a_miss_and_a_false_alarm(report):
    table, source = report
    paths = {}  # of each pair
    for row in table:
        for pair in outcome_pairs(names_in(row["label"]), names_in(row["prediction"])):
            paths.setdefault(pair, []).append(row["path"])
    assert len([pair for pair in paths if pair[0] != pair[1]]) > 1
    names = [*CLASSES, "(none)"]
    expected = {f"{names.index(true)},{names.index(predicted)}": pair_paths
                for (true, predicted), pair_paths in paths.items()}
    clips = json.loads(re.search(r'id="clips">(.*?)</script>', source)[1])
    assert clips["names"] == names and clips["cells"].keys() == expected.keys()
    for cell, listed in clips["cells"].items():
        listed_paths = {clip[0] for clip in listed}
        assert len(listed_paths) == len(listed) == min(50, len(expected[cell]))
        assert listed_paths <= set(expected[cell])
    counts = re.findall(r'data-cell="([\d,]+)"[^>]*aria-label="[^"]*: (\d+) of', source)
    assert {cell: int(n) for cell, n in counts} == {
        cell: len(cell_paths) for cell, cell_paths in expected.items()}


def test_the_report_has_thresholds_confidences_and_examples(report):
    _, source = report
    text = text_of(source)
    assert "threshold" in text and " 80% " in text
    assert source.count('class="card"') > 6


# --- preparation ---

@pytest.mark.parametrize("in_test", [False, True])
def test_a_split_without_clips_of_several_labels_is_reported(mixtures, tmp_path, in_test):
    lines = (mixtures / "clips.csv").read_text().splitlines()[1:]
    single = [line for line in lines if ";" not in line]
    several = [line for line in lines if ";" in line]
    assert len(single) > 12 and len(several) > 3
    table = ["path,label,split"]
    table += [f"{line},test" for line in single[:9]]
    table += [f"{line},train" for line in single[9:]]
    splits = ["val", "train", "test" if in_test else "val"]
    splits += ["train"] * (len(several) - 3)
    table += [f"{line},{split}" for line, split in zip(several, splits, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(table) + "\n")
    manifest, _ = prepare(tmp_path / "t.csv", mixtures, cache_dir=tmp_path, multi_label=True,
                          log=lambda line: None)
    notes = [note for note in manifest.notes if "no clip with several labels" in note]
    if in_test:
        assert notes == []
    else:
        (note,) = notes
        assert re.findall(r"\b(train|val|test)\b", note) == ["test"]


def test_rare_classes_are_counted_at_any_place_in_the_cell(mixtures, tmp_path):
    """Class `some` is the second label of five clips, `few` of two; two files are identical."""
    head, *lines = (mixtures / "clips.csv").read_text().splitlines()
    copied = lines[9]
    lines[:7] = [line + (";some" if i < 5 else ";few") for i, line in enumerate(lines[:7])]
    lines += [copied.replace(".wav", "_copy.wav"), "00few.wav,few"]
    (tmp_path / "c.csv").write_text("\n".join([head, *lines]) + "\n")
    for path in mixtures.glob("*.wav"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "9_copy.wav").symlink_to(mixtures / "9.wav")
    write_tones(tmp_path / "00few.wav", ["low"], [7, 9])
    manifest, _ = prepare(tmp_path / "c.csv", min_clips=4, cache_dir=tmp_path / "cache",
                          multi_label=True, log=lambda line: None)
    assert manifest.classes == ["high", "low", "mid", "some"]
    assert len(manifest) == 91 and manifest.counts()[3] == 5
    # Identical files stay in one split, though a row before them is left out.
    original, copy = manifest.paths.index("9.wav"), manifest.paths.index("9_copy.wav")
    assert manifest.split[original] == manifest.split[copy]


# --- other data ---

class OtherClips:
    """Six clips outside the training data, whose labels are rewritten for each evaluation."""
    names = (["low", "mid"], ["high"], ["mid", "high", "low"], ["low"], ["mid"], ["high", "low"])

    def __init__(self, folder, ckpt):
        self.folder, self.ckpt = folder, ckpt
        for i, names in enumerate(self.names):
            write_tones(folder / f"other{i}.wav", names, [5, i])

    def evaluate(self, *cells):
        """cells: labels and secondary labels of each clip, as in the CSV -> exit code."""
        lines = [f"other{i}.wav,{cell}" for i, cell in enumerate(cells)]
        table = "\n".join(["path,label,secondary_labels", *lines]) + "\n"
        (self.folder / "c.csv").write_text(table)
        return run_evaluate(self.ckpt, self.folder / "out", "--data", self.folder / "c.csv")

    def labels(self):
        """(n, classes) that the last evaluation used."""
        return np.load(self.folder / "out" / "scores.npz")["labels"]


@pytest.fixture
def other_clips(trained, tmp_path):
    return OtherClips(tmp_path, trained / "best.pt")


def test_other_data_with_several_labels(other_clips):
    assert other_clips.evaluate(*(";".join(names) + "," for names in other_clips.names)) == 0
    expected = [[float(name in names) for name in CLASSES] for names in other_clips.names]
    assert other_clips.labels().tolist() == expected
    metrics = metrics_in(other_clips.folder / "out")
    assert metrics["n"] == 6 and metrics["map"] > 0.8


def test_other_data_with_one_label_per_clip(other_clips):
    assert other_clips.evaluate("low,", "high,", "mid,", "low,", "mid,", "high,") == 0
    assert other_clips.labels()[:3].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_other_data_with_unknown_classes(other_clips):
    """mid is no label of these clips, but the checkpoint knows it; owl is left out."""
    cells = ["low,['mid']", "high,", "high,\"['mid', 'low', 'owl']\"", "low,", "low,", "high,low"]
    assert other_clips.evaluate(*cells) == 0
    expected = [[0, 1, np.nan], [1, np.nan, np.nan], [1, np.nan, 0]]
    np.testing.assert_array_equal(other_clips.labels()[[0, 2, 5]], expected)


def test_other_data_with_a_class_that_the_checkpoint_does_not_know(other_clips, capsys):
    capsys.readouterr()
    assert other_clips.evaluate("low,", "purple;low,", *["mid,"] * 4) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --data") and error.count("\n") == 1 and "purple" in error


# --- training ---

def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(mixtures, home, tmp_path):
    flags = ["--data", mixtures / "clips.csv", *SMALL, "--epochs", 2, "--mixup-alpha", 0.4,
             "--loss", "focal-bce", "--alpha", 0.4]
    a, b = tmp_path / "a", tmp_path / "b"
    with without_pictures() as patch:
        assert exit_code(train.main, *flags, "--run-dir", a) == 0
        with patch.context() as stopping:
            stop_at(20)(stopping)
            assert exit_code(train.main, *flags, "--run-dir", b) == 143
        assert 0 < load_checkpoint(b / "last.pt")["progress"]["step"] < 32
        assert exit_code(train.main, "--resume", "--run-dir", b) == 0
    assert outcome(a) == outcome(b)
    assert metrics_in(a / "test") == metrics_in(b / "test")


@pytest.fixture(scope="module")
def birdclef(mixtures):
    """The mixtures as a table of BirdCLEF: all labels but the first are secondary labels."""
    lines = ["primary_label,secondary_labels,filename"]
    lines += [f'{first},"{others!r}",{path}'
              for path, (first, *others) in labels_in(mixtures).items()]
    (mixtures / "birdclef.csv").write_text("\n".join(lines) + "\n")
    return mixtures / "birdclef.csv"


def test_secondary_labels_are_unknown_under_a_sigmoid_loss(birdclef, mixtures, home, tmp_path):
    flags = ["--data", birdclef, *SMALL, "--epochs", 1, "--run-dir", tmp_path / "run"]
    with without_pictures():
        assert exit_code(train.main, *flags) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")
    manifest = Manifest.from_dict(checkpoint["manifest"])
    batch = Clips(manifest, 22050, 13230).batch([(row, 0) for row in range(90)])
    labels = labels_in(mixtures)
    for row, target in zip(batch.rows, batch.target, strict=True):
        first, *others = labels[manifest.paths[row]]
        expected = {name: 0.0 for name in manifest.classes}
        expected |= {name: torch.nan for name in others} | {first: 1.0}
        np.testing.assert_array_equal(target, list(expected.values()))


@pytest.fixture(scope="module")
def softmax_run(birdclef, home):
    """The folder of a run over the BirdCLEF table with a softmax loss."""
    flags = ["--data", birdclef, *SMALL, "--epochs", 1, "--loss", "focal", "--monitor", "val_acc"]
    with without_pictures() as patch:
        patch.setattr(pictures, "confusion", lambda *_, **__: None)
        assert exit_code(train.main, *flags, "--run-dir", home / "softmax") == 0
    return home / "softmax"


def test_secondary_labels_are_dropped_under_a_softmax_loss_with_a_note(softmax_run):
    manifest = Manifest.from_dict(load_checkpoint(softmax_run / "best.pt")["manifest"])
    assert not manifest.multi_label
    assert any("secondary labels" in note and "softmax" in note for note in manifest.notes)


def test_a_softmax_checkpoint_refuses_clips_with_several_labels(softmax_run, tmp_path, capsys):
    write_tones(tmp_path / "other0.wav", ["low", "mid"], [0, 0])
    write_tones(tmp_path / "other1.wav", ["high"], [0, 1])
    (tmp_path / "c.csv").write_text("path,label\nother0.wav,low;mid\nother1.wav,high\n")
    capsys.readouterr()
    flags = ["--data", tmp_path / "c.csv"]
    assert run_evaluate(softmax_run / "best.pt", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --data") and error.count("\n") == 1


@pytest.mark.parametrize("flags, culprit", [
    (["--loss", "focal"], "{n} of 90 clips"),
    (["--loss", "ce"], "--loss bce or focal-bce"),
    (["--loss", "focal-bce", "--logit-adjust", 1], "--logit-adjust"),
    (["--loss", "focal-bce", "--alpha", "balanced"], "--alpha balanced"),
    (["--loss", "focal-bce", "--alpha", 2], "--alpha 2"),
    (["--loss", "focal-bce", "--alpha", "nan"], "--alpha"),
])
def test_flags_that_do_not_suit_several_labels_are_refused(
        flags, culprit, mixtures, home, tmp_path, capsys):
    n_several = sum(len(labels) > 1 for labels in labels_in(mixtures).values())
    words = ["--data", mixtures / "clips.csv", *SMALL, *flags, "--run-dir", tmp_path / "run"]
    capsys.readouterr()
    assert exit_code(train.main, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert culprit.format(n=n_several) in error
    assert not (tmp_path / "run").exists()


def test_all_folds_have_pooled_metrics(mixtures, home, tmp_path):
    folder = tmp_path / "run"
    flags = ["--data", mixtures / "folds.csv", *SMALL, "--epochs", 1, "--folds", "all"]
    with without_pictures():
        assert exit_code(train.main, *flags, "--run-dir", folder) == 0
    folds = [np.load(folder / f"fold{i}" / "test" / "scores.npz") for i in range(3)]
    truth, predicted, scores = (np.concatenate([fold[name] for fold in folds])
                                for name in ("labels", "predicted", "scores"))
    results = json.loads((folder / "folds.json").read_text())
    assert set(results["over_folds"]) == set(metrics_for(multi_label=True))
    pooled = results["pooled"]
    assert pooled["n"] == 90
    assert pooled["micro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="micro"))
    assert pooled["map"] == pytest.approx(
        sk.average_precision_score(truth, scores, average="macro"))


def test_comparison_of_two_runs(trained, mixtures, home, tmp_path):
    other, picture = tmp_path / "other", tmp_path / "out.png"
    flags = ["--data", mixtures / "clips.csv", *SMALL, "--epochs", 1, "--run-dir", other]
    with without_pictures():
        assert exit_code(train.main, *flags) == 0
    lines = compare(trained, other, picture)
    for label, name in (("accuracy", "accuracy"), ("macro-F1", "macro_f1")):
        (line,) = (line for line in lines if line.startswith(f"  {label} "))
        a, b = metrics_in(trained / "test")[name], metrics_in(other / "test")[name]
        assert f"a {a:.3f}   b {b:.3f}   b - a {b - a:+.3f}" in line
    same = [line for line in compare(trained, trained, picture) if "b - a" in line]
    assert len(same) == len(metrics_for(multi_label=True))
    for line in same:
        assert "b - a +0.000   (95% interval +0.000 to +0.000)" in line
    run = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**run, "multi_label": False}))
    with pytest.raises(CompareError):
        compare(trained, other, picture)


def test_dry_run(mixtures, home, tmp_path, capsys):
    flags = ["--data", mixtures / "clips.csv", *SMALL, "--smoke", "--run-dir", tmp_path / "run"]
    assert exit_code(train.main, *flags) == 0
    printed = capsys.readouterr().out
    assert "passed" in printed and "100% correct" in printed


# --- altered checkpoints ---

def edit_sets(edit):
    """-> edit of a checkpoint: its label sets as lists, changed in place by `edit`."""
    def change(parts):
        sets = [[list(classes) for classes in pair] for pair in parts["manifest"]["label_sets"]]
        edit(sets)
        parts["manifest"]["label_sets"] = sets
    return change


def edit_column(name, edit):
    """-> edit of a checkpoint: a column of its manifest becomes `edit(column)`."""
    def change(parts):
        parts["manifest"][name] = edit(parts["manifest"][name])
    return change


def edit_first(name, value):
    """-> edit of a checkpoint: the first value of a column of its manifest."""
    return edit_column(name, lambda column: [value, *column[1:]])


ALTERATIONS = {
    "class too high": edit_sets(lambda sets: sets[0][0].append(99)),
    "class too low": edit_sets(lambda sets: sets[0][0].append(-1)),
    "class of 10 ** 30": edit_sets(lambda sets: sets[0][1].append(10**30)),
    "class a fraction": edit_sets(lambda sets: sets[0][1].append(0.5)),
    "class NaN": edit_sets(lambda sets: sets[0][0].append(float("nan"))),
    "class true": edit_sets(lambda sets: sets[0][1].append(True)),
    "class a text": edit_sets(lambda sets: sets[0][0].append("low")),
    "class a list": edit_sets(lambda sets: sets[0][0].append([1])),
    "class twice": edit_sets(lambda sets: sets[0][0].append(sets[0][0][0])),
    "class present and unknown": edit_sets(lambda sets: sets[0][1].append(sets[0][0][0])),
    "no class": edit_sets(lambda sets: sets[0][0].clear()),
    "set of three lists": edit_sets(lambda sets: sets[0].append([])),
    "set of one list": edit_sets(lambda sets: sets[0].pop()),
    "sets in another order": edit_sets(lambda sets: sets.reverse()),
    "no sets": edit_column("label_sets", lambda _: []),
    "sets a text": edit_column("label_sets", lambda _: "low"),
    "sets a number": edit_column("label_sets", lambda _: 7),
    "index too high": edit_first("label_set", 99),
    "index too low": edit_first("label_set", -1),
    "index of 10 ** 10": edit_first("label_set", 10**10),
    "index a text": edit_first("label_set", "low"),
    "column too short": edit_column("label_set", lambda column: column[1:]),
    "column a number": edit_column("label_set", lambda _: 3),
    "first label of another set": edit_column(
        "labels", lambda column: [(column[0] + 1) % 3, *column[1:]]),
    "softmax loss": lambda parts: parts["loss"].update(name="focal"),
    "alpha of each class": lambda parts: parts["loss"].update(
        name="focal-bce", alpha=[1.0, 2.0, 3.0]),
}


def write_altered(trained, path, edit):
    parts = dict(load_checkpoint(trained / "best.pt"))
    edit(parts)
    save_checkpoint(path, parts)
    shutil.copy(trained / "run.json", path.parent)  # so that its recordings are read
    return path


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_evaluate_refuses_an_altered_checkpoint_in_one_line(
        alteration, trained, tmp_path, capsys, recwarn):
    path = write_altered(trained, tmp_path / "x.pt", ALTERATIONS[alteration])
    assert run_evaluate(path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1
    assert not recwarn.list and not (tmp_path / "out").exists()


def test_control_an_unaltered_checkpoint_is_evaluated(trained, tmp_path):
    path = write_altered(trained, tmp_path / "x.pt", edit_sets(lambda sets: None))
    assert run_evaluate(path, tmp_path / "out") == 0


def name_a_softmax_loss(parts):
    parts["flags"]["loss"] = "focal"


@pytest.mark.parametrize("edit", [
    ALTERATIONS["class too high"], ALTERATIONS["index too high"], ALTERATIONS["no sets"],
    name_a_softmax_loss])
def test_training_does_not_resume_an_altered_checkpoint(edit, trained, home, tmp_path, capsys):
    path = write_altered(trained, tmp_path / "x.pt", edit)
    assert exit_code(train.main, "--resume", path, "--run-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1
