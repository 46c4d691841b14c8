"""False alarms in what an evaluation writes: metrics.json, false_alarms.csv, the report's words."""
import csv
import json

import numpy as np
import pytest

from core.scoring import Evaluation
from data.manifest import Manifest
from metrics import apply_temperature, evaluate_scores
from report import verdict
from report.examples import MOST, choose_alarms
from report.results import result_lines, write_results
from report.run_files import read_run

CLASSES = ["bat", "cat", "dog"]
N_LABELLED, N_NEGATIVE, SECONDS = 30, 200, 3.0
CALIBRATION = {"temperature": 1.7, "thresholds": [0.5, 0.6, 0.7], "sigmoid": True}


def make_result(multi_label=False, n_negative=N_NEGATIVE, seed=0):
    """(Evaluation, manifest) of labelled clips and windows of 10 recordings without a class."""
    rng = np.random.default_rng(seed)
    n = N_LABELLED + n_negative
    labels = np.append(np.arange(N_LABELLED) % 3, np.full(n_negative, -1)).astype(np.int32)
    order = rng.permutation(n)
    labels = labels[order]
    zeros = np.zeros(n, np.float32)
    group = np.where(labels < 0, 1000 + np.arange(n) % 10, np.arange(n)).astype(np.int32)
    manifest = Manifest(
        "made", "/data", CLASSES, [f"{i:03d}.wav" for i in range(n)], labels, zeros, zeros * np.nan,
        group, "each file alone", np.full(n, 2, np.int8), None, [],
        duration=np.full(n, SECONDS, np.float32))
    if multi_label:
        manifest = manifest.with_label_sets([((c,) if c >= 0 else (), ()) for c in labels.tolist()])
    scores = rng.uniform(0, 1, (n, 3)) ** 2
    scores[labels >= 0, labels[labels >= 0]] = rng.uniform(0.4, 1, N_LABELLED)
    ones = np.ones(n, np.int64)
    shown = manifest.targets(np.arange(n)) if multi_label else labels.astype(np.int64)
    correct = (scores.argmax(axis=1) == labels).astype(np.int64)
    return Evaluation(np.arange(n), shown, scores, ones * 0.5, {}, ones, correct), manifest


def counted_alarms(result, manifest, one_answer):
    """[(row, class)] of the alarms, by a plain loop."""
    alarms = []
    calibrated = apply_temperature(result.scores, CALIBRATION["temperature"], sigmoid=True)
    for row in range(len(manifest)):
        if manifest.labels[row] >= 0:
            continue
        for c in range(3):
            is_best = all(calibrated[row, c] >= calibrated[row, other] for other in range(3))
            if calibrated[row, c] >= CALIBRATION["thresholds"][c] and (is_best or not one_answer):
                alarms.append((row, c))
    return alarms


@pytest.mark.parametrize("multi_label", [False, True])
def test_false_alarms_equal_a_plain_count(tmp_path, multi_label):
    result, manifest = make_result(multi_label)
    metrics = write_results(tmp_path, result, manifest, CLASSES, "test", CALIBRATION)
    alarms = counted_alarms(result, manifest, one_answer=not multi_label)
    figures = json.loads((tmp_path / "metrics.json").read_text())["false_alarms"]
    assert figures == metrics["false_alarms"]
    hours = N_NEGATIVE * SECONDS / 3600
    assert figures["hours"] == pytest.approx(hours) and figures["recordings"] == 10
    assert figures["per_hour"] == pytest.approx(len({row for row, _ in alarms}) / hours)
    assert [row["count"] for row in figures["per_class"]] == [
        sum(c == wanted for _, c in alarms) for wanted in range(3)]
    assert 0 <= figures["per_hour_ci95"][0] < figures["per_hour"] < figures["per_hour_ci95"][1]
    with open(tmp_path / "false_alarms.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["path"], row["class"]) for row in rows} == {
        (manifest.paths[row], CLASSES[c]) for row, c in alarms}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(float(row["end"]) - float(row["start"]) == SECONDS for row in rows)


def test_figures_of_classes_are_those_of_the_clips_with_a_label(tmp_path):
    result, manifest = make_result()
    metrics = write_results(tmp_path, result, manifest, CLASSES, "test", CALIBRATION)
    alone = result.select(result.labels >= 0)
    expected = evaluate_scores(alone.scores, alone.labels, n_boot=10)
    for key in ("n", "accuracy", "balanced_accuracy", "macro_f1", "weighted_f1"):
        assert metrics[key] == pytest.approx(expected[key])
    assert metrics["unlabelled"] == N_NEGATIVE and metrics["map"] < expected["map"]
    run = read_run(tmp_path, tmp_path)
    assert len(run.scores) == len(run.labels) == len(run.clips) == N_LABELLED
    assert [row["label"] for row in run.clips] == [CLASSES[c] for c in run.labels.tolist()]
    matrix_clips = run.truth.sum()
    assert matrix_clips == N_LABELLED


def test_prediction_of_a_negative_is_empty_below_the_threshold(tmp_path):
    result, manifest = make_result()
    write_results(tmp_path, result, manifest, CLASSES, "test", CALIBRATION)
    with open(tmp_path / "predictions.csv", newline="") as file:
        predicted = {row["path"]: row["prediction"] for row in csv.DictReader(file)}
    alarms = dict(counted_alarms(result, manifest, one_answer=True))
    for row, path in enumerate(manifest.paths):
        if manifest.labels[row] < 0:
            assert predicted[path] == (CLASSES[alarms[row]] if row in alarms else "")
        else:
            assert predicted[path] != ""


def test_report_and_terminal_begin_with_false_alarms_or_say_that_they_are_not_known(tmp_path):
    for n_negative in (N_NEGATIVE, 0):
        result, manifest = make_result(n_negative=n_negative)
        metrics = write_results(tmp_path, result, manifest, CLASSES, "test", CALIBRATION)
        first = verdict.findings(read_run(tmp_path, tmp_path)).found[0].text
        lines = "\n".join(result_lines(metrics))
        if n_negative:
            rate = f"{metrics['false_alarms']['per_hour']:.1f}"
            assert rate in first and rate in lines
            assert "not known at 0.1" in lines  # 10 minutes are too short for 0.1 per hour
        else:
            assert metrics["false_alarms"] is None and not (tmp_path / "false_alarms.csv").exists()
            assert "not known" in first and "--negatives" in first and "--negatives" in lines


def test_false_alarms_to_listen_to_are_the_surest_and_of_several_recordings():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, (300, 3))
    alarms = scores > 0.8
    groups = np.arange(300) % 5
    chosen = choose_alarms(scores, alarms, groups)
    assert len(chosen) == MOST["alarm"]
    values = [scores[i, c] for i, c in chosen]
    assert values == sorted(values, reverse=True) and all(alarms[i, c] for i, c in chosen)
    counts = np.bincount(groups[[i for i, _ in chosen]], minlength=5)
    assert counts.max() == 2
    for group in range(5):  # the surest of each recording come first
        own = sorted((scores[i][alarms[i]].max() for i in np.flatnonzero(groups == group)
                      if alarms[i].any()), reverse=True)
        shown = [value for (i, _), value in zip(chosen, values) if groups[i] == group]
        assert shown == own[:len(shown)]
    assert choose_alarms(scores, np.zeros_like(alarms), groups) == []


def test_most_frequent_class_is_a_share_of_the_clips_with_a_label(tmp_path):
    for multi_label in (False, True):
        result, manifest = make_result(multi_label)
        write_results(tmp_path, result, manifest, CLASSES, "test", CALIBRATION)
        assert read_run(tmp_path, tmp_path).most_frequent_share == pytest.approx(1 / 3)
