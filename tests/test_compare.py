"""Cross-validation and the comparison of two runs, against scikit-learn and by hand."""
import csv
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from report.compare import CompareError, _macro_f1, compare
from tests.faults.harness import program


def run_folder(folder, predictions, labels, **flags):
    (folder / "test").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"flags": {"seed": 0, "run_dir": str(folder), **flags}, "weights": "none"}))
    (folder / "history.csv").write_text("epoch,train_loss,train_acc,val_loss,val_acc,val_macro_f1\n1,1,0.5,1.1,0.4,0.3\n2,.8,.6,1,.5,.4\n")
    with open(folder / "test" / "predictions.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow("path start end label prediction confidence top5".split())
        out.writerows([f"{i}.wav", "0", "", label, guess, 1, ""] for i, (label, guess) in enumerate(zip(labels, predictions)))
    return folder


def test_macro_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, guesses = rng.integers(0, 6, (2, 30))
        want = f1_score(labels, guesses, average="macro", labels=np.unique(labels), zero_division=0)
        assert _macro_f1(labels, guesses) == pytest.approx(want)


def test_two_runs(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], 200)
    worse = np.where(rng.random(200) < 0.4, "a", labels)
    better = np.where(rng.random(200) < 0.05, "a", labels)
    one = run_folder(tmp_path / "one", worse, labels, gamma=2.0, only_here=1)
    other = run_folder(tmp_path / "other", better[:180], labels[:180], gamma=0.0)
    text = "\n".join(compare(one, other, tmp_path / "out.png"))
    assert "gamma              2.0                      0.0" in text and "only_here" in text and "run_dir" not in text
    assert "180 clips that both have scored, 20 only in a" in text and text.count("(b is better)") == 2
    a, b = (worse[:180] == labels[:180]).mean(), (better[:180] == labels[:180]).mean()
    assert f"accuracy   a {a:.3f}   b {b:.3f}   b - a {b - a:+.3f}" in text
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    same = "\n".join(compare(one, one, tmp_path / "out.png"))
    assert "none" in same and "b - a +0.000   (95% interval +0.000 to +0.000)\n" in same


def test_the_interval_is_the_paired_one(tmp_path):
    """Against the exact variance of the mean of the paired differences."""
    rng = np.random.default_rng(1)
    labels = np.array(["a", "b"] * 200)
    hits_one = rng.random(400) < 0.7
    hits_other = np.where(rng.random(400) < 0.1, ~hits_one, hits_one)
    wrong = np.where(labels == "a", "b", "a")
    folders = [run_folder(tmp_path / name, np.where(hits, labels, wrong), labels)
               for name, hits in (("one", hits_one), ("other", hits_other))]
    line = next(line for line in compare(*folders, tmp_path / "out.png") if line.startswith("  accuracy"))
    low, high = (float(part) for part in line.split("interval ")[1].rstrip(")").split(")")[0].split(" to "))
    difference = hits_other.astype(float) - hits_one
    half = 1.96 * difference.std() / 20
    assert low == pytest.approx(difference.mean() - half, abs=0.006) and high == pytest.approx(difference.mean() + half, abs=0.006)
    assert half < 0.6 * 1.96 * np.hypot(hits_one.std(), hits_other.std()) / 20  # unpaired, it would be far wider


def test_what_cannot_be_compared(tmp_path):
    labels = ["a", "b"]
    one = run_folder(tmp_path / "one", labels, labels)
    with pytest.raises(CompareError, match="not there"):
        compare(one, tmp_path / "none", tmp_path / "out.png")
    with pytest.raises(CompareError, match="two labels"):
        compare(one, run_folder(tmp_path / "other", labels, labels[::-1]), tmp_path / "out.png")
    (one / "run.json").write_text("{")
    with pytest.raises(CompareError, match="not a run"):
        compare(one, one, tmp_path / "out.png")


def test_all_folds_with_one_command(tones, tmp_path, monkeypatch, capsys):
    lines = ["path,label,fold"] + [f"{path.relative_to(tones)},{path.parent.name},{i % 3 + 1}"
                                   for i, path in enumerate(sorted(tones.rglob("*.wav")))]
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(lines))
    flags = ["--audio-dir", tones, "--folds", "all", "--epochs", 1, "--freeze-epochs", 0]
    assert program(monkeypatch, tmp_path, *flags, data=table) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "folds.json").read_text())
    assert found["pooled"]["n"] == 48 and "3 folds, 48 clips" in out
    each = [json.loads((tmp_path / "run" / f"fold{i}" / "test" / "metrics.json").read_text()) for i in (1, 2, 3)]
    values = [metrics["accuracy"] for metrics in each]
    assert found["over_folds"]["accuracy"]["folds"] == values
    assert found["over_folds"]["accuracy"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    hits = n = 0
    for i in (1, 2, 3):
        with open(tmp_path / "run" / f"fold{i}" / "test" / "predictions.csv", newline="") as file:
            for row in csv.DictReader(file):
                hits, n = hits + (row["label"] == row["prediction"]), n + 1
    assert found["pooled"]["accuracy"] == pytest.approx(hits / n) and n == 48
    (tmp_path / "run" / "fold2" / "test" / "scores.npz").unlink()  # as if it had been killed there
    assert program(monkeypatch, tmp_path, *flags, data=table) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == 2 and "resumed after step" in out
    assert json.loads((tmp_path / "run" / "folds.json").read_text()) == found


def test_folds_that_are_not_there(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--folds", "all", data=tones) == 2
    assert "has no folds" in capsys.readouterr().err
    assert program(monkeypatch, tmp_path, "--folds", "all", "--fold", 1, data=tones) == 2
    assert "goes without --fold" in capsys.readouterr().err
