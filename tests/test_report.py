"""Results in words, and pictures: written whole, decodable, not blank, and true to the data."""
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metrics import METRICS, Metric
from report import style
from report.pictures import batch, confusion, curves, schedule
from report.plots import history_panels
from report.results import result_lines
from report.run_files import load_scores

COLUMNS = ("epoch,train_loss,train_acc,val_loss,val_acc,val_macro_f1,val_map,lr_backbone,lr_head,"
           "seconds,clips_per_second,peak_memory_mb,skipped_steps")
STRANGE = ["Dog_$1$", r"$\frac{", "$", "$$", r"\$x^2_", "a<b>&c", "Ωмега", "シジュウカラ", "طائر",
           "two\nlines\t", "bell\a", "x" * 30, "y" * 300, "", "bird 🐦"]


@pytest.fixture
def figures(monkeypatch):
    """The figures as they are saved, so that a test can read their text."""
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig

    def record(self, *args, **kwargs):
        saved.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


@pytest.fixture(autouse=True)
def no_warnings(recwarn):
    yield
    assert [str(w.message) for w in recwarn] == []


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def check_picture(path):
    """Decodes `path`, asserts that something is drawn and that nothing else was left behind."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 100
    assert (pixels < 200).mean() > 0.002 and (pixels > 250).mean() > 0.05
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".png"] == [path.name]
    return pixels


def history(tmp_path, rows):
    path = tmp_path / "history.csv"
    lines = [",".join(map(str, row)) + ",5e-5,1e-3,60,100,8000,0" for row in rows]
    path.write_text("\n".join([COLUMNS, *lines]) + "\n", encoding="utf-8")
    return path


ROWS = [(1, 2.0, 0.2, 1.5, 0.30, 0.2, 0.25), (2, 1.0, 0.5, 1.1, 0.52, 0.4, 0.44),
        (3, 0.7, 0.7, 1.0, 0.52, 0.3, 0.45), (4, 0.5, 0.8, 1.2, 0.50, 0.3, 0.41)]


@pytest.mark.parametrize("monitor, expected", [
    ("val_acc", "4 epochs: best validation accuracy 0.520 at epoch 3"),
    ("val_loss", "4 epochs: best validation loss 1.000 at epoch 3"),
    ("val_map", "4 epochs: best validation mAP 0.450 at epoch 3"),
])
def test_curves_mark_the_best_epoch(tmp_path, figures, monitor, expected):
    curves(history(tmp_path, ROWS), tmp_path / "curves.png", monitor=monitor)
    check_picture(tmp_path / "curves.png")
    assert expected in texts(figures[0])
    epoch = float(expected.split()[-1])
    for ax in figures[0].axes:
        marks = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert [line.get_xdata()[0] for line in marks] == [epoch]
    row = ROWS[int(epoch) - 1]
    assert f"at epoch {epoch:g}: macro-F1 {row[5]:.3f}, mAP {row[6]:.3f}" in texts(figures[0])
    assert {"training", "validation", "macro-F1", "mAP"} <= set(texts(figures[0]))


def test_curves_of_one_epoch(tmp_path, figures):
    curves(history(tmp_path, ROWS[:1]), tmp_path / "curves.png")
    check_picture(tmp_path / "curves.png")
    assert "1 epoch: best validation accuracy 0.300 at epoch 1" in texts(figures[0])


def test_curves_with_blank_and_non_finite_values(tmp_path, figures):
    rows = [ROWS[0], (2, "nan", 0.5, "", "", "", ""), (3, "inf", 0.7, 1.0, 0.4, 0.3, 0.45)]
    curves(history(tmp_path, rows), tmp_path / "curves.png")
    check_picture(tmp_path / "curves.png")
    assert "3 epochs: best validation accuracy 0.400 at epoch 3" in texts(figures[0])
    loss = {tuple(line.get_xdata()) for line in figures[0].axes[0].lines}
    assert {(1.0,), (1.0, 3.0)} <= loss


def test_curves_without_validation(tmp_path, figures):
    rows = [(e, 1 / e, 0.5, "", "", "", "") for e in range(1, 60)]
    curves(history(tmp_path, rows), tmp_path / "curves.png")
    check_picture(tmp_path / "curves.png")
    assert {"59 epochs, no validation accuracy yet", "no values yet"} <= set(texts(figures[0]))


def test_invalid_histories_are_refused(tmp_path):
    out = tmp_path / "curves.png"
    with pytest.raises(ValueError, match=r"history\.csv has no epochs"):
        curves(history(tmp_path, []), out)
    with pytest.raises(ValueError, match=r"history\.csv.*'oops'"):
        curves(history(tmp_path, [(1, "oops", 0, 0, 0, 0, 0)]), out)
    with pytest.raises(ValueError, match="monitor must be one of val_acc, val_macro_f1"):
        curves(history(tmp_path, ROWS), out, monitor="accuracy")
    assert not out.exists()


def cosine(base, warmup, steps=400):
    step = np.arange(steps)
    after = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - 1 - warmup)))
    return base * np.where(step < warmup, (step + 1) / max(warmup, 1), after)  # the last is 0


@pytest.mark.parametrize("warmup, expected", [
    (0, "no warm-up"), (50, "warm-up: 50 steps"), (350, "warm-up: 350 steps")])
def test_schedule_merges_equal_groups_and_shows_their_ratio(tmp_path, figures, warmup, expected):
    groups = [(f"{name}{tail}", cosine(base, warmup)) for tail in ("", "_no_decay")
              for name, base in (("backbone", 5e-5), ("head", 1e-3))]
    schedule(groups, warmup, 40, tmp_path / "schedule.png")
    check_picture(tmp_path / "schedule.png")
    words = texts(figures[0])
    assert "backbone, backbone_no_decay\npeak 5e-5, last step 0" in words
    assert "head, head_no_decay\npeak 1e-3, last step 0" in words
    assert "Learning rate per group: the ratio between groups is constant (1 : 20)" in words
    assert expected in words
    assert len(figures[0].axes[0].patches) == (warmup > 0)
    assert figures[0].axes[0].get_yscale() == "log"
    assert figures[0].axes[0].child_axes[0].get_xlim()[1] == pytest.approx(399.5 / 40)


def test_schedule_shows_a_changing_ratio(tmp_path, figures):
    # One value written to every group in the warm-up: the fault this picture is there to show.
    backbone = cosine(5e-5, 50)
    backbone[:50] = cosine(1e-3, 50)[:50]
    schedule([("backbone", backbone), ("head", cosine(1e-3, 50))], 50, 40, tmp_path / "s.png")
    check_picture(tmp_path / "s.png")
    assert any("CHANGES" in text for text in texts(figures[0]))
    assert not any("constant" in text for text in texts(figures[0]))


def test_schedule_labels_of_many_groups_do_not_overlap(tmp_path, figures):
    # Peaks so close that their labels have to move, rates so small that only a relative
    # comparison tells them apart.
    groups = [(f"layer_{i}", cosine(1e-8 * 0.95 ** i, 50)) for i in range(14)]
    schedule(groups, 50, 40, tmp_path / "schedule.png")
    check_picture(tmp_path / "schedule.png")
    labels = [t for t in figures[0].axes[0].texts if t.get_text().startswith("layer_")]
    boxes = sorted((t.get_window_extent() for t in labels), key=lambda box: box.y0)
    assert len(boxes) == 14
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


def test_schedule_of_one_group_one_step_and_a_frozen_group(tmp_path, figures):
    schedule([("all", [1e-4])], 0, 40, tmp_path / "schedule.png")
    schedule([("head", cosine(1e-3, 5)), ("backbone", np.zeros(400))], 5, 40,
             tmp_path / "schedule.png")
    check_picture(tmp_path / "schedule.png")
    assert "Learning rate, the same for every group" in texts(figures[0])
    assert figures[0].axes[0].lines[0].get_marker() == "o"  # a line of one point shows nothing
    assert "backbone\npeak 0, last step 0" in texts(figures[1])
    with pytest.raises(ValueError, match="head has 3 steps, backbone has 2"):
        schedule([("backbone", [1, 1]), ("head", [1, 1, 1])], 0, 40, tmp_path / "schedule.png")
    with pytest.raises(ValueError, match="above zero"):
        schedule([("backbone", [0, 0])], 0, 40, tmp_path / "schedule.png")


MEL_HZ = np.geomspace(50, 10000, 32)


@pytest.mark.parametrize("n", [3, 20])
def test_batch_shows_up_to_16_clips_on_one_colour_scale(tmp_path, figures, n):
    specs = np.random.default_rng(0).normal(size=(n, 32, 40))
    labels = np.arange(n) % len(STRANGE)
    targets = np.eye(len(STRANGE))[labels]
    targets[1] = 0.7 * targets[1] + 0.3 * targets[0]
    batch(specs, labels, targets, STRANGE, tmp_path / "batch.png", 16000, 160, MEL_HZ,
          unit="standard units")
    check_picture(tmp_path / "batch.png")
    titles = [ax.get_title(loc="left") for ax in figures[0].axes if ax.images]
    first, second = titles[1].split("\n")
    assert first.endswith(" 70%") and second.endswith(" 30%")
    assert titles[0] and "%" not in titles[0]
    images = [ax for ax in figures[0].axes if ax.images]
    assert len(images) == min(n, 16)
    assert len({ax.images[0].get_clim() for ax in images}) == 1
    assert "standard units" in [ax.get_ylabel() for ax in figures[0].axes]
    assert any("16 of 20 clips" in text for text in texts(figures[0])) == (n == 20)


def test_batch_titles_of_several_labels(tmp_path, figures):
    targets = np.array([[1, 1, 1, 1], [1, np.nan, 0, 1], [np.nan, 0, 1, 0], [0.6, 1, 0, 0]])
    batch(np.zeros((4, 32, 40)), [0, 3, 2, 1], targets, list("abcd"), tmp_path / "batch.png", 16000,
          160, MEL_HZ)
    titles = [ax.get_title(loc="left") for ax in figures[0].axes if ax.images]
    assert titles == ["a\nb\nand 2 more", "a\nd", "c", "b\na 60%"]


def test_batch_axes_are_seconds_and_hertz_with_low_frequencies_at_the_bottom(tmp_path, figures):
    specs = np.zeros((1, 32, 40))
    specs[0, :16] = 1.0  # the low half is bright
    batch(specs, [0], [[1.0]], ["a"], tmp_path / "batch.png", 16000, 160, MEL_HZ)
    ax = figures[0].axes[0]
    assert ax.get_xlim() == (0, pytest.approx(0.4))
    for place, label in zip(ax.get_yticks(), ax.get_yticklabels()):
        assert np.interp(place, np.arange(32), MEL_HZ) == pytest.approx(float(label.get_text()))
    assert "1000" in [label.get_text() for label in ax.get_yticklabels()]
    pixels = check_picture(tmp_path / "batch.png").astype(float)
    height, width = pixels.shape
    assert pixels[int(0.7 * height), width // 3] > pixels[int(0.3 * height), width // 3] + 50
    assert "standardised dB" in texts(figures[0])


def test_batch_shows_values_that_are_not_finite(tmp_path, figures):
    specs = np.zeros((2, 32, 40))
    specs[0, :8, :20] = np.nan
    specs[1, :8, :20] = np.inf
    batch(specs, [0, 1], np.eye(2), ["a", "b"], tmp_path / "batch.png", 16000, 160, MEL_HZ)
    assert any("320 values not finite (red)" in text for text in texts(figures[0]))
    with Image.open(tmp_path / "batch.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(axis=1).mean() > 0.03


def test_batch_with_swapped_axes_or_missing_labels_is_refused(tmp_path):
    rest = ([0], [[1.0]], ["a"], tmp_path / "batch.png", 16000, 160, MEL_HZ)
    with pytest.raises(ValueError, match=r"\(B, 32, frames\), got \(1, 40, 32\)"):
        batch(np.zeros((1, 40, 32)), *rest)
    with pytest.raises(ValueError, match=r"1 labels .* for 2 spectrograms"):
        batch(np.zeros((2, 32, 40)), *rest)


def test_confusion_of_few_classes_has_counts_and_true_classes_in_rows(tmp_path, figures):
    matrix = np.array([[12, 7, 0], [0, 31, 0], [0, 0, 0]])
    confusion(matrix, ["cat", "dog", "owl"], tmp_path / "confusion.png")
    check_picture(tmp_path / "confusion.png")
    ax = figures[0].axes[0]
    cells = {t.get_position(): t.get_text() for t in ax.texts}
    assert cells == {(0, 0): "12", (1, 0): "7", (1, 1): "31"}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cat  19", "dog  31", "owl  0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["cat", "dog", "owl"]
    share = ax.images[0].get_array()
    assert share[0, 1] == pytest.approx(7 / 19) and share.mask[2].all()
    assert "50 clips, 86.0% correct" in texts(figures[0])


def test_confusion_of_90_classes_lists_the_largest_confusions(tmp_path, figures):
    matrix = np.diag(np.full(90, 5))
    matrix[3, 4], matrix[8, 7], matrix[9, 7] = 2, 6, 6
    matrix[9, 9] = 1
    names = [f"Genusmaximus_longissimus_{i:05d}" for i in range(90)]
    confusion(matrix, names, tmp_path / "confusion.png")
    check_picture(tmp_path / "confusion.png")
    ax = figures[0].axes[0]
    assert ax.texts[0].get_text().split("\n") == [
        "Largest confusions, true → predicted", "",
        f"{names[9]} → {names[7]}  6 of 7",
        f"{names[8]} → {names[7]}  6 of 11",
        f"{names[3]} → {names[4]}  2 of 7",
    ]
    for labels, along in ((ax.get_xticklabels(), "x"), (ax.get_yticklabels(), "y")):
        assert len(labels) == 90
        edges = sorted(getattr(t.get_window_extent(), f"interval{along}").tolist() for t in labels)
        assert all(a[1] <= b[0] + 1 for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("matrix", [np.array([[4]]), np.zeros((21, 21), int)])
def test_confusion_of_one_class_and_of_no_clips(tmp_path, matrix):
    confusion(matrix, [f"c{i}" for i in range(len(matrix))], tmp_path / "confusion.png")
    check_picture(tmp_path / "confusion.png")


@pytest.mark.parametrize("extra", [0, 6])
def test_confusion_draws_strange_names_as_they_are(tmp_path, figures, extra):
    names = STRANGE + [f"c{i}" for i in range(extra)]
    matrix = np.random.default_rng(0).integers(0, 9, size=(len(names), len(names)))
    confusion(matrix, names, tmp_path / "confusion.png")
    check_picture(tmp_path / "confusion.png")
    shown = [t.get_text() for t in figures[0].axes[0].get_xticklabels()]
    assert shown[:6] == STRANGE[:6]  # as they stand: no mathematics, no escapes
    assert not any(t.get_parse_math() for t in figures[0].axes[0].get_xticklabels())
    assert "two lines" in shown and "bell?" in shown and "y" * 16 + "…" + "y" * 15 in shown


def test_names_that_no_font_can_draw_have_their_index(tmp_path, figures):
    cuneiform = ["\U00012000", "\U00012001"]  # in none of the fonts that are looked for
    assert not style.legible(cuneiform[0]) and style.legible("Ωмега $_")
    confusion(np.eye(3, dtype=int), ["owl", *cuneiform], tmp_path / "confusion.png")
    shown = [t.get_text() for t in figures[0].axes[0].get_xticklabels()]
    assert shown == ["owl", f"[1] {cuneiform[0]}", f"[2] {cuneiform[1]}"]


def test_confusion_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(2, 2\) for 3 classes"):
        confusion(np.eye(2, dtype=int), ["a", "b", "c"], tmp_path / "confusion.png")


def test_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    out = tmp_path / "confusion.png"
    confusion(np.array([[1]]), ["a"], out)
    old = out.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        confusion(np.array([[2]]), ["b"], out)
    assert out.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["confusion.png"]


def test_import_does_not_load_matplotlib_and_drawing_leaves_its_settings(tmp_path):
    code = f"""
import sys
from pathlib import Path
import report.pictures
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
report.pictures.confusion([[1]], ["a"], Path({str(tmp_path)!r}) / "c.png")
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# --- results in words ---

FIGURES = {"split": "test", "n": 8, "unreadable": 1, "tiles": 20, "tile_accuracy": 0.7,
           "temperature": 1.25, "ece": 0.1, "ece_calibrated": 0.05,
           "accuracy": 0.75, "accuracy_ci95": [0.4, 0.9], "map": 0.8, "map_ci95": [0.5, 0.95]}


def test_result_lines_have_each_metric_with_its_interval():
    lines = result_lines({**FIGURES, "recall_head": 0.9, "recall_middle": None, "recall_tail": 0.5})
    [unknown] = [line for line in lines if "false alarms" in line]
    assert "not known" in unknown and "--negatives" in unknown
    assert [line for line in lines if line != unknown] == [
        "test: 8 clips, 1 unreadable and skipped",
        "  accuracy           0.750   (95% interval 0.400 to 0.900)",
        "  mAP                0.800   (95% interval 0.500 to 0.950)",
        "  single tiles       0.700   (20 tiles; the metrics above average them per clip)",
        "  calibration error  0.100, 0.050 at temperature 1.25 (fitted on validation)",
        "  recall of classes  head 0.900, middle -, tail 0.500   "
        "(thirds by number of training clips)"]


def test_result_lines_name_the_groups_and_a_calibration_that_is_chance():
    lines = result_lines({**FIGURES, "interval_over": "groups", "groups": 3, "ece_by_chance": 0.2})
    assert lines[0].endswith("; intervals over their 3 groups")
    assert lines[-1].endswith("; up to 0.200 is chance")
    lines = result_lines({**FIGURES, "temperature": 1.0, "interval_over": "clips", "groups": 8})
    assert "groups" not in lines[0] and "no temperature" in lines[-1]


def test_a_metric_that_is_added_to_the_table_is_shown_everywhere(monkeypatch):
    monkeypatch.setitem(METRICS, "top3", Metric("top3", "top3", "top-3 accuracy", None))
    lines = result_lines({**FIGURES, "top3": 0.85, "top3_ci95": [0.6, 0.99]})
    assert "  top-3 accuracy     0.850   (95% interval 0.600 to 0.990)" in lines
    *_, (title, columns) = history_panels({"val_map": [0.5], "val_top3": [0.5]}).items()
    assert title == "Validation mAP and top-3 accuracy"
    assert [column for column, _, _ in columns] == ["val_map", "val_top3"]


def test_scores_of_older_runs_are_read(tmp_path):
    arrays = {"scores": np.eye(2), "labels": np.eye(2), "rows": np.arange(2)}
    for name in ("said", "predicted"):
        np.savez(tmp_path / "scores.npz", **arrays, **{name: np.eye(2) > 0})
        assert load_scores(tmp_path)["predicted"].tolist() == [[True, False], [False, True]]
