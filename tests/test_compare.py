"""Cross-validation and the comparison of two runs, against scikit-learn and by hand."""
import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import f1_score

import report.compare
from report.compare import CompareError, compare
from tests.faults.harness import program

HISTORY = ("epoch,train_loss,train_acc,val_loss,val_acc,val_macro_f1\n"
           "1,1,0.5,1.1,0.4,0.3\n2,.8,.6,1,.5,.4\n")


def run_folder(folder, predictions, labels, **flags):
    """A finished run with these class names as predictions and labels of its test clips."""
    classes = sorted({*predictions, *labels})
    index = [[classes.index(name) for name in names] for names in (predictions, labels)]
    scores = np.full((len(labels), len(classes)), 0.1, np.float32)
    scores[np.arange(len(labels)), index[0]] = 0.9
    (folder / "test").mkdir(parents=True)
    np.savez(folder / "test" / "scores.npz", scores=scores, labels=np.array(index[1]),
             rows=np.arange(len(labels)))
    flags = {"seed": 0, "run_dir": str(folder), **flags}
    run = {"flags": flags, "classes": classes, "weights": "none"}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "history.csv").write_text(HISTORY)
    with open(folder / "test" / "predictions.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["path", "start", "end", "label", "prediction", "confidence", "top5"])
        out.writerows([f"{i}.wav", "0", "", label, prediction, 1, ""]
                      for i, (label, prediction) in enumerate(zip(labels, predictions)))
    return folder


def metric_line(lines, label):
    return next(line for line in lines if line.startswith(f"  {label} "))


def test_two_runs_over_the_clips_that_both_have(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], 200)
    worse = np.where(rng.random(200) < 0.4, "a", labels)
    better = np.where(rng.random(200) < 0.05, "a", labels)
    a = run_folder(tmp_path / "one", worse, labels, gamma=2.0, only_here=1)
    b = run_folder(tmp_path / "two", better[:180], labels[:180], gamma=0.0)
    lines = compare(a, b, tmp_path / "out.png")
    text = "\n".join(lines)
    assert "gamma              2.0                      0.0" in text
    assert "only_here" in text and "run_dir" not in text
    assert "180 clips that both have scored, 20 only in a" in text
    for label in ("accuracy", "macro-F1", "weighted F1", "balanced accuracy"):
        assert metric_line(lines, label).endswith("(b is better)")
    accuracies = [(predicted[:180] == labels[:180]).mean() for predicted in (worse, better)]
    f1 = [f1_score(labels[:180], predicted[:180], average="macro") for predicted in (worse, better)]
    for label, values in (("accuracy", accuracies), ("macro-F1", f1)):
        difference = f"b - a {values[1] - values[0]:+.3f}"
        expected = f"a {values[0]:.3f}   b {values[1]:.3f}   {difference}"
        assert expected in metric_line(lines, label)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_compared_with_itself_does_not_differ(tmp_path):
    run = run_folder(tmp_path / "run", ["a", "b", "b", "a"], ["a", "b", "a", "b"])
    lines = compare(run, run, tmp_path / "out.png")
    assert "  none" in lines
    line = metric_line(lines, "accuracy")
    assert line.endswith("b - a +0.000   (95% interval +0.000 to +0.000)")
    assert "  correct only in a 0, only in b 0, in both 2" in lines


def test_interval_of_the_difference_is_paired(tmp_path):
    """Against the exact variance of the mean of the paired differences."""
    rng = np.random.default_rng(1)
    labels = np.array(["a", "b"] * 200)
    correct_a = rng.random(400) < 0.7
    correct_b = np.where(rng.random(400) < 0.1, ~correct_a, correct_a)
    wrong = np.where(labels == "a", "b", "a")
    folders = [run_folder(tmp_path / name, np.where(correct, labels, wrong), labels)
               for name, correct in (("one", correct_a), ("two", correct_b))]
    line = metric_line(compare(*folders, tmp_path / "out.png"), "accuracy")
    low, high = (float(part) for part in line.split("interval ")[1].split(")")[0].split(" to "))
    difference = correct_b.astype(float) - correct_a
    half = 1.96 * difference.std() / 20
    assert low == pytest.approx(difference.mean() - half, abs=0.006)
    assert high == pytest.approx(difference.mean() + half, abs=0.006)
    unpaired = 1.96 * np.hypot(correct_a.std(), correct_b.std()) / 20
    assert half < 0.6 * unpaired


def test_incomparable_runs_are_refused(tmp_path):
    labels = ["a", "b"]
    run = run_folder(tmp_path / "run", labels, labels)
    with pytest.raises(CompareError, match=r"none/run\.json: missing"):
        compare(run, tmp_path / "none", tmp_path / "out.png")
    with pytest.raises(CompareError, match="different labels for the same clip"):
        other = run_folder(tmp_path / "other", labels, labels[::-1])
        compare(run, other, tmp_path / "out.png")
    (run / "run.json").write_text("{")
    with pytest.raises(CompareError, match="not a finished run"):
        compare(run, run, tmp_path / "out.png")


def write_folds(tones, path):
    files = sorted(tones.rglob("*.wav"))
    rows = [f"{file.relative_to(tones)},{file.parent.name},{i % 3 + 1}"
            for i, file in enumerate(files)]
    path.write_text("\n".join(["path,label,fold", *rows]))


def test_all_folds_with_one_command(tones, tmp_path, monkeypatch, capsys):
    table, run = tmp_path / "clips.csv", tmp_path / "run"
    write_folds(tones, table)
    flags = ["--audio-dir", tones, "--folds", "all", "--epochs", 1, "--freeze-epochs", 0]
    assert program(monkeypatch, tmp_path, *flags, data=table) == 0
    out = capsys.readouterr().out
    folds = json.loads((run / "folds.json").read_text())
    assert folds["pooled"]["n"] == 48 and "3 folds, 48 clips" in out
    tests = [run / f"fold{i}" / "test" for i in (1, 2, 3)]
    values = [json.loads((test / "metrics.json").read_text())["accuracy"] for test in tests]
    over_folds = folds["over_folds"]["accuracy"]
    assert over_folds["folds"] == values
    assert over_folds["mean"] == pytest.approx(np.mean(values))
    assert over_folds["deviation"] == pytest.approx(np.std(values, ddof=1))
    rows = []
    for test in tests:
        with open(test / "predictions.csv", newline="") as file:
            rows += csv.DictReader(file)
    n_correct = sum(row["label"] == row["prediction"] for row in rows)
    assert len(rows) == 48
    assert folds["pooled"]["accuracy"] == pytest.approx(n_correct / 48)
    (run / "fold2" / "test" / "scores.npz").unlink()  # as if the run had been killed there
    assert program(monkeypatch, tmp_path, *flags, data=table) == 0
    out = capsys.readouterr().out
    assert out.count("already done") == 2 and "resumed after step" in out
    assert json.loads((run / "folds.json").read_text()) == folds


def test_folds_flag_is_refused_without_folds_or_with_fold(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--folds", "all", data=tones) == 2
    assert f"--data {tones}: has no folds" in capsys.readouterr().err
    assert program(monkeypatch, tmp_path, "--folds", "all", "--fold", 1, data=tones) == 2
    assert "--folds" in capsys.readouterr().err


# --- several runs a side ---

def many_runs(folder, labels, share_wrong, seeds, **flags):
    """Run folders of several seeds below `folder`, each wrong in its own share of the clips."""
    rng = np.random.default_rng(int(1000 * share_wrong))
    wrong = np.where(labels == "a", "b", "a")
    return [run_folder(folder / f"seed{seed}", np.where(rng.random(len(labels)) < share_wrong,
                                                         wrong, labels), labels, seed=seed, **flags)
            for seed in seeds]


def test_several_seeds_a_side_give_means_and_one_interval(tmp_path):
    labels = np.array(["a", "b"] * 100)
    a = many_runs(tmp_path / "one", labels, 0.3, (0, 1, 2), gamma=2.0)
    b = many_runs(tmp_path / "two", labels, 0.1, (0, 1, 2), gamma=0.0)
    lines = compare(tmp_path / "one", tmp_path / "two", tmp_path / "out.png")
    text = "\n".join(lines)
    assert "a has 3 runs, b has 3" in text
    assert "gamma              2.0                      0.0" in text and "  seed" not in text

    def accuracy(folders):
        tables = [(folder / "test" / "predictions.csv").read_text() for folder in folders]
        rows = [row for table in tables for row in csv.DictReader(table.splitlines())]
        return np.mean([row["label"] == row["prediction"] for row in rows])

    line = metric_line(lines, "accuracy")
    assert f"a {accuracy(a):.3f}   b {accuracy(b):.3f}" in line and "(b is better)" in line


def test_folds_are_pooled_and_paired_by_clip(tmp_path):
    labels = np.array(["a", "b"] * 60)
    rng = np.random.default_rng(0)
    wrong = np.where(labels == "a", "b", "a")
    expected = {}
    for name, share in (("one", 0.4), ("two", 0.2)):
        predictions = np.where(rng.random(120) < share, wrong, labels)
        expected[name] = np.mean(predictions == labels)
        for fold in range(3):
            part = slice(40 * fold, 40 * fold + 40)
            run = run_folder(tmp_path / name / f"fold{fold}", predictions[part], labels[part],
                             fold=fold)
            table = (run / "test" / "predictions.csv").read_text().splitlines()
            (run / "test" / "predictions.csv").write_text("\n".join(
                [table[0], *(f"{fold}-{line}" for line in table[1:])]))
    lines = compare(tmp_path / "one", tmp_path / "two", tmp_path / "out.png")
    assert any("120 clips that both have scored" in line for line in lines)
    line = metric_line(lines, "accuracy")
    assert f"a {expected['one']:.3f}   b {expected['two']:.3f}" in line
    assert any("over the 3 folds" in line and "accuracy" in line for line in lines)


def test_interval_of_a_difference_is_over_groups_if_clips_share_some(tmp_path):
    labels = np.array(["a", "b"] * 100)
    groups = np.repeat(np.arange(20), 10)
    wrong = np.where(labels == "a", "b", "a")
    is_wrong = np.random.default_rng(0).random(20)[groups] < 0.4  # whole groups
    folders = [run_folder(tmp_path / "one", np.where(is_wrong, wrong, labels), labels),
               run_folder(tmp_path / "two", labels, labels)]
    widths = []
    for given in (None, groups):
        for folder in folders:
            arrays = dict(np.load(folder / "test" / "scores.npz"))
            if given is not None:
                arrays["groups"] = given
            np.savez(folder / "test" / "scores.npz", **arrays)
        lines = compare(*folders, tmp_path / "out.png")
        line = metric_line(lines, "accuracy")
        low, high = (float(x) for x in line.split("interval ")[1].split(")")[0].split(" to "))
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]
    assert any("over 20 groups" in line for line in lines)


def test_picture_has_the_metrics_of_the_runs(tmp_path, monkeypatch):
    labels = np.array(["a", "b"] * 30)
    sides = [many_runs(tmp_path / name, labels, share, (0, 1, 2))
             for name, share in (("one", 0.3), ("two", 0.1))]
    for folder in sides[1]:
        (folder / "history.csv").write_text(HISTORY.replace("val_macro_f1", "val_map"))
    drawn = []
    monkeypatch.setattr(report.compare, "_draw_curves", lambda ax, title, *_: drawn.append(title))
    real = report.compare._draw_tests
    monkeypatch.setattr(report.compare, "_draw_tests",
                        lambda ax, *rest: (real(ax, *rest), drawn.append(ax)))
    compare(tmp_path / "one", tmp_path / "two", tmp_path / "out.png")
    *titles, ax = drawn
    assert sorted(titles) == ["accuracy", "loss", "mAP", "macro-F1"]
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert {"accuracy", "mAP", "macro-F1"} <= set(names) and "micro-F1" not in names
    row = names.index("accuracy")
    lines = [line for line in ax.lines if len(line.get_ydata()) and
             abs(line.get_ydata()[0] - row) < 0.5]
    points = [list(line.get_xdata()) for line in lines if len(line.get_xdata()) == 3]
    expected = [[np.mean([clip["label"] == clip["prediction"] for clip in csv.DictReader(
        (run / "test" / "predictions.csv").read_text().splitlines())]) for run in side]
        for side in sides]
    assert np.allclose(points, expected)
    assert sum(len(line.get_xdata()) == 2 for line in lines) == 2  # an interval per side


def test_module_runs_without_a_warning(tmp_path):
    result = subprocess.run([sys.executable, "-W", "error", "-m", "report.compare", "--help"],
                            cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "Warning" not in result.stderr
