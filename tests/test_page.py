"""report.html: what it says, and its figures against independent computations."""
import json
import os
import re
import shutil
import subprocess
import sys
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from conftest import ROOT
from made_run import HOSTILE, LEAK, MadeRun, Text, read_page
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from core.run.log import EPOCH_COLUMNS as HISTORY
from core.run.log import STEP_COLUMNS as STEPS
from metrics import METRICS, recall_by_frequency, wilson
from report import confusions, page, verdict
from report.examples import SuspectSearch
from report.plots import envelope, thin
from report.run_files import read_run


def clip_data(source):
    """What the page's script reads."""
    return json.loads(re.search(r'id="clips">(.*?)</script>', source)[1])


def test_page_loads_nothing(source):
    """No address but data:, fragments and the recordings on disk."""
    tags = Text(source).tags
    addresses = [value for _, attributes in tags for key, value in attributes.items()
                 if key in ("src", "href", "xlink:href", "srcset", "action")]
    assert len(addresses) > 50
    schemes = {re.match(r"data:|#|\./|\.\./", address)[0] for address in addresses}
    assert schemes == {"data:", "#", "./"}
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    policy = next(attributes["content"] for _, attributes in tags
                  if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_names_from_the_data_are_text(source):
    parsed = Text(source)
    assert not [tag for tag, attributes in parsed.tags if "onerror" in attributes]
    assert [tag for tag, _ in parsed.tags].count("script") == 2  # the data and the page's own
    words = "".join(parsed.words)
    for name in [*HOSTILE[:5], "made & <u>sold", "broken <i>.wav", "a.wav, <b>.wav"]:
        assert name in words, name


def test_names_in_the_clip_data_are_text_and_have_addresses(source):
    data = clip_data(source)
    listed = [clip for cell in data["cells"].values() for clip in cell]
    assert data["names"] == HOSTILE
    paths = {clip[0] for clip in listed}
    assert {"<script>alert(5)</script>.wav", "not \\udcff utf-8.wav"} <= paths
    # Only this one has an address of its own: its text does not lead to it.
    assert [clip[4] for clip in listed if clip[4]] == ["not%20%FF%20utf-8.wav"]


def test_user_names_are_isolated_from_the_direction_of_the_text_around(source):
    for name in ("طائر", "made &amp; &lt;u&gt;sold"):
        assert f"<bdi>{name}</bdi>" in source


def test_verdict_opens_the_page(made, source):
    metrics = json.loads((made.folder / "test" / "metrics.json").read_text())
    words = Text(source).text
    low, high = metrics["accuracy_ci95"]
    assert f"{metrics['accuracy']:.1%} of 80 test clips classified correctly." in words
    assert f"95% interval {100 * low:.1f} to {high:.1%}" in words
    assert "would be correct for 10.0%" in words
    assert f"Epoch {made.best} of 6 was best by validation accuracy" in words
    assert "a gap of 15 points" in words
    for finding in ("Optimizer steps were skipped: loss or gradients were not finite",
                    "step 77, epoch 2: loss", "Leakage between the splits", LEAK,
                    "1 unreadable recording left out", "1 class never predicted: wren"):
        assert finding in words, finding
    absent = words.split("not found:")[1][:200]
    assert "divergence, a changing ratio" in absent and "bad files" not in absent
    order = ("classified correctly", r"\d findings", "Loss by step", "run folder")
    places = [re.search(text, words).start() for text in order]
    assert places == sorted(places)


def test_every_metric_is_shown_with_its_interval(made, source):
    metrics = json.loads((made.folder / "test" / "metrics.json").read_text())
    words = Text(source).text
    keys = [key for key in METRICS if key in metrics]
    assert len(keys) == 5
    for key in keys:
        low, high = metrics[f"{key}_ci95"]
        assert f"{METRICS[key].label} {metrics[key]:.3f} {low:.3f} to {high:.3f}" in words


def changed(made, **changes):
    """The run as the page reads it, with some parts changed."""
    run = read_run(made.folder, made.folder / "test")
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def finding_texts(run):
    return [finding.text for finding in verdict.findings(run).found]


def test_findings_are_absent_without_their_cause(made):
    run = changed(made, events=[], bad_files=[], run={**made.run, "data": {"notes": []}})
    texts = finding_texts(run)
    for word in ("skipped", "Leakage", "unreadable"):
        assert not any(word in text for text in texts)
    assert {"divergence", "skipped steps", "bad files", "leakage between the splits"} <= set(
        verdict.findings(run).absent)


def test_events_are_found_also_of_an_unknown_kind(made):
    kinds = ("diverged", "rollback", "rollback", "new kind")
    events = [{"step": "9", "epoch": "3", "event": kind, "detail": "d"} for kind in kinds]
    texts = finding_texts(changed(made, events=events))
    assert "Validation dropped far below its best value" in texts
    assert "Training went back to its best weights (2 times)" in texts
    assert "new kind" in texts


def test_unknown_leakage_is_neither_found_nor_absent(made):
    run = changed(made, run={**made.run, "data": {}})
    assert "leakage between the splits" not in verdict.findings(run).absent
    assert not any("Leakage" in text for text in finding_texts(run))


def test_changing_ratio_of_learning_rates_is_found(made):
    """The fault that this project was made for."""
    run = changed(made)
    run.steps["lr_backbone"][:40] = run.steps["lr_head"][:40]
    assert any("ratio of the head's learning rate" in text for text in finding_texts(run))


def test_accuracy_at_chance_or_unlike_validation_is_found(made):
    run = changed(made)
    run.metrics["accuracy_ci95"] = [0.05, 0.2]
    assert any("Not significantly better" in text for text in finding_texts(run))
    run = changed(made)
    run.history["val_acc"] = run.history["val_acc"] + 0.28
    assert any("outside the interval of the test accuracy" in text for text in finding_texts(run))


@pytest.mark.parametrize("values, flags, expected", [
    ([.1, .2, .3], {"epochs": 3}, "still improving at the end"),
    ([.1, .3, .2, .2, .2], {"epochs": 50, "patience": 3},
     "stopped early, after 3 epochs without improvement"),
    ([.1, .3, .2], {"epochs": 50, "patience": 7}, "ended before the 50 planned epochs"),
    ([.3, .3, .2], {"epochs": 3}, "Epoch 2 of 3 was best"),
    ([np.nan, .3, .2], {"epochs": 3}, "Epoch 2 of 3 was best"),
    ([.2, .3, .3], {"epochs": 3},
     "Epoch 3 of 3 was best by validation accuracy (0.300, the last of 2 equal ones)"),
])
def test_how_training_went(made, values, flags, expected):
    n = len(values)
    history = {name: np.full(n, 0.5) for name in HISTORY}
    history |= {"epoch": np.arange(1, n + 1), "val_acc": np.array(values)}
    run = changed(made, history=history, run={"flags": {"monitor": "val_acc", **flags}})
    words = " ".join(verdict.training(run))
    assert expected in words
    assert ("still improving" in words) == (values == [.1, .2, .3])
    assert "evaluates the weights after epoch 7" in " ".join(verdict.training(run, 7))


@pytest.mark.parametrize("n_wrong, expected", [
    (0, None), (15, "For 15 of them the prediction is not the label: often the label is wrong"),
    (16, "For 16 of them the prediction is not the label: with so many, most are mistakes of the "
         "model")])
def test_share_of_contradicted_labels_is_explained(made, tmp_path, n_wrong, expected):
    out = made.write(tmp_path / "p.html", search=SuspectSearch(150, 900, n_wrong))
    words = read_page(out).text
    assert "150 of the 900 training clips, drawn at random, were checked" in words
    assert expected in words if expected else "prediction is not the label" not in words


def test_best_epoch_by_loss_is_the_lowest(made):
    run = changed(made, run={"flags": {"monitor": "val_loss"}})
    run.history["val_loss"] = np.array([3, 1.5, 2, 1.5, 4, 5])
    assert run.best == 3


def test_wilson_interval_is_scipys():
    for correct, n in ((0, 1), (3, 8), (8, 8), (50, 1200)):
        expected = binomtest(correct, n).proportion_ci(method="wilson")
        assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson(0, 0) == (0, 1)


def test_table_of_classes_and_thirds(made, source):
    matrix = confusion_matrix(made.labels, made.scores.argmax(axis=1), labels=range(10))
    table = source[source.index("<tbody>"):source.index("</tbody>")].split("<tr>")[1:]
    assert len(table) == 10
    for i, row in enumerate(table):
        low, high = binomtest(int(matrix[i, i]), 8).proportion_ci(method="wilson")
        assert f"{matrix[i, i] / 8:.0%} ({low:.0%} to {high:.0%})" in " ".join(row.split())
        wrong = matrix[i].copy()
        wrong[i] = 0
        assert (f"{wrong.max()}\N{MULTIPLICATION SIGN} " in row) == wrong.any()
        assert ("data-go" in row) == wrong.any()
    thirds = recall_by_frequency(made.scores, made.labels, made.train_counts)
    for value in thirds.values():
        assert f"<b>{value:.3f}</b>" in source


def test_charts_follow_the_colours_of_the_page_and_have_tooltips(made, source):
    charts = re.findall(r"<svg .*?</svg>", source, re.S)
    assert len(charts) == 8  # three of epochs, three of steps, recall, reliability
    labels = [re.search(r'aria-label="([^"]+)"', chart)[1] for chart in charts]
    assert len(set(labels)) == 8
    for chart in charts:
        assert "var(--blue)" in chart or "var(--green)" in chart
        assert not re.search("#[0-9a-f]{6};", chart), "a colour that does not follow the mode"
        assert " id=\"axes" not in chart and "<style" not in chart
    run = read_run(made.folder, made.folder / "test")
    loss = run.history["val_loss"][2]
    assert f"<title>validation, epoch 3: {loss:.4g}</title>" in charts[0]
    assert "<title>step 77 skipped</title>" in charts[4]
    assert charts[6].count("<title>") == 10 and "recall, 200 training clips" in charts[6]
    ids = re.findall(r' id="([^"]+)"', source)
    assert len(ids) == len(set(ids))


def test_page_of_results_without_a_run(made, tmp_path):
    out = tmp_path / "page.html"
    page.write_page(out, tmp_path, made.folder / "test")
    words = read_page(out).text
    assert "of 80 test clips classified correctly" in words
    assert "no history.csv" in words and "Loss by step" not in words
    made.write(out, examples=(), search=SuspectSearch(), root=None, mel_hz=None)
    words = read_page(out).text
    assert "Listen" not in words and "run folder" in words


def test_incomplete_last_line_and_values_that_are_not_finite(made, tmp_path):
    for name in ("history.csv", "steps.csv", "run.json"):
        shutil.copy(made.folder / name, tmp_path)
    steps = (made.folder / "steps.csv").read_text().splitlines()
    steps[5] = steps[5].replace(steps[5].split(",")[3], "nan", 1)
    steps[6] = steps[6].replace(steps[6].split(",")[3], "inf", 1)
    (tmp_path / "steps.csv").write_text("\n".join(steps) + "\n401,6,0.5,1.")
    page.write_page(tmp_path / "page.html", tmp_path, made.folder / "test")
    assert len(read_run(tmp_path, made.folder / "test").steps["step"]) == 400
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Gradient norm" in source and not re.search(r'[ ",]-?(nan|inf)[ ",]', source)


def test_page_keeps_to_its_size_and_tells_which_clips_have_no_player(made, tmp_path):
    complete = made.write(tmp_path / "a.html")
    without_sound = made.write(tmp_path / "b.html", max_bytes=1)
    n = len(made.examples)
    text = complete.read_text(encoding="utf-8")
    assert text.count("data:audio/mpeg") == n and "Every clip has a player" in text
    text = without_sound.read_text(encoding="utf-8")
    assert text.count("<audio") == 0 and text.count("open the recording") == n
    assert f"0 of {n} clips have a player" in text
    limit = (complete.stat().st_size + without_sound.stat().st_size) // 2
    half = made.write(tmp_path / "c.html", max_bytes=limit)
    text = half.read_text(encoding="utf-8")
    n_players = text.count("<audio")
    assert 0 < n_players < n and f"{n_players} of {n} clips have a player" in text
    assert limit - 20000 < half.stat().st_size <= limit


def test_links_lead_to_the_recordings(made, tmp_path):
    """From any folder, for any name: percent-encoded bytes of a relative path."""
    folder = tmp_path / "a #b"
    folder.mkdir()
    parsed = read_page(made.write(folder / "p.html", max_bytes=1))
    links = {attributes["href"] for tag, attributes in parsed.tags
             if tag == "a" and attributes["href"][0] == "."}
    assert len(links) > 5
    for link in links:
        path = os.path.join(os.fsencode(folder), unquote_to_bytes(link))
        assert "#" not in link and os.path.exists(path)


def test_envelope_and_thinned_curve_keep_extremes():
    n = 1_000_000
    loss = np.exp(np.random.default_rng(0).normal(0, 0.2, n))
    loss[700_000], loss[3] = 99.0, np.nan
    x, mean, low, high = envelope(np.arange(n), loss, 300)
    assert len(x) == 300 and high.max() == 99.0 and low.min() == np.nanmin(loss)
    assert (low <= mean).all() and (mean <= high).all()
    assert np.average(mean) == pytest.approx(np.nanmean(loss), rel=1e-4)
    lr = np.sin(np.arange(n) / n * 3)
    x, _ = thin(np.arange(n), lr)
    assert len(x) < 500 and {0, int(lr.argmax()), n - 1} <= set(x.astype(int))


def test_page_of_a_million_steps_is_small(made, tmp_path):
    n = 1_000_000
    for name in ("history.csv", "run.json"):
        shutil.copy(made.folder / name, tmp_path)
    with open(tmp_path / "steps.csv", "w") as file:
        file.write(",".join(STEPS) + "\n")
        pair = "".join(f"{{}},1,{loss},2.0,{1e-5},{2e-4},1.0,32\n" for loss in (0.5, 0.7))
        file.writelines(pair.format(i, i + 1) for i in range(1, n, 2))
    page.write_page(tmp_path / "page.html", tmp_path, made.folder / "test")
    assert (tmp_path / "page.html").stat().st_size < 300_000


def test_lists_of_many_clips_and_classes_are_limited(tmp_path, monkeypatch):
    made = MadeRun(tmp_path / "run", [f"class {i}" for i in range(40)], per_class=9)
    monkeypatch.setattr(confusions, "MOST_CLASSES", 30)
    monkeypatch.setattr(confusions, "MOST_CLIPS", 120)
    monkeypatch.setattr(confusions, "MOST_PER_CELL", 2)
    source = made.write(examples=()).read_text(encoding="utf-8")
    cells = clip_data(source)["cells"]
    assert sum(map(len, cells.values())) <= 120 and max(map(len, cells.values())) <= 2
    words = Text(source).text
    assert "At most 2 per cell and 120 in all are listed" in words
    assert "Of 40 classes, the 30 with the most confusions are shown" in words
    wrong = [cell for cell in cells if len(set(cell.split(","))) == 2]
    matrix = confusion_matrix(made.labels, made.scores.argmax(axis=1))
    n_wrong_cells = np.count_nonzero(matrix - np.diag(np.diag(matrix)))
    assert len(wrong) == n_wrong_cells  # mistakes take precedence


def test_failed_write_leaves_the_old_page(made, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            made.write(out)
    assert out.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_import_loads_neither_torch_nor_picture_libraries():
    code = ("import sys, report.page; "
            "assert not {'torch', 'matplotlib', 'PIL', 'soundfile'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_flags_in_sentences_are_elements_not_text():
    shown = page._keep_flags_whole("more <b> (--epochs), --mixup-alpha")
    parsed = Text(str(shown))
    assert [tag for tag, _ in parsed.tags] == ["span", "span"]
    assert parsed.text == "more <b> ( --epochs ), --mixup-alpha"
