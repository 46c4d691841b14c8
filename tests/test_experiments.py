"""The studies: their flags, their data, the faults they reproduce, and their intervals."""

import csv
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import flags
import train
from data.clips import Clips
from model.ast import AST, ASTConfig
from model.frontend import LogMel

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
STUDIES = ("warmup", "batch", "augmentation", "longtail", "frontend", "recipe", "negatives")
MODULES = (*STUDIES, "common", "summary", "pretrain", "false_alarms")
TINY = ["--dim", "16", "--depth", "1", "--heads", "2", "--seconds", "1", "--device", "cpu",
        "--amp", "off"]


@pytest.fixture
def studies(monkeypatch):
    """The scripts as modules, by name, importable as when they are run."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", STUDIES)
def test_flags_of_every_arm_are_flags_of_the_program(name, studies):
    arms = studies[name].ARMS
    assert len(arms) > 2 and len(studies[name].CLAIM) > 20
    for arm in arms.values():
        words = arm[0] if isinstance(arm, tuple) else arm
        _, given = flags.parse(["--data", "x", *map(str, words)])
        assert len(given) == 1 + sum(str(word).startswith("--") for word in words)


def test_shared_schedule_writes_one_rate_to_all_groups(studies):
    original = train.RelativeSchedule
    rates = []
    with studies["warmup"].shared_schedule():
        assert train.RelativeSchedule is not original
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (5e-5, 1e-3)]
        optimizer = torch.optim.SGD(groups)
        schedule = train.RelativeSchedule(optimizer, 10, 50)
        for _ in range(50):
            rates.append([group["lr"] for group in optimizer.param_groups])
            schedule.step()
    assert train.RelativeSchedule is original
    assert all(backbone == head for backbone, head in rates)
    rates = [backbone for backbone, _ in rates]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[10] == pytest.approx(1e-3)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-5


@pytest.mark.parametrize("fold", [1, 5])
def test_thinned_data_have_uneven_classes_and_separate_folds(studies, tmp_path, monkeypatch, fold):
    (tmp_path / "meta").mkdir()
    with open(tmp_path / "meta" / "esc50.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["filename", "fold", "target", "category"])
        for c in range(10):
            for f in range(1, 6):
                out.writerows([f"{c}-{f}-{i}.wav", f, c, f"class{c}"] for i in range(8))
    monkeypatch.setattr(studies["longtail"], "WORK", tmp_path)
    _, table, *_ = studies["longtail"].thinned_data(SimpleNamespace(data=str(tmp_path)), fold)
    rows = read_rows(table)
    counts, folds = {}, {}
    for split in ("train", "val", "test"):
        own = [row for row in rows if row["split"] == split]
        labels = [row["label"] for row in own]
        counts[split] = sorted(labels.count(f"class{c}") for c in range(10))
        folds[split] = {row["path"].split("-")[1] for row in own}
    assert counts["train"] == [1, 1, 2, 3, 4, 6, 8, 12, 17, 24]
    assert counts["val"] == counts["test"] == [8] * 10
    assert folds["test"] == {str(fold)} and folds["val"] == {str(fold % 5 + 1)}
    assert len(folds["train"]) <= 3
    assert not folds["train"] & (folds["val"] | folds["test"])


def test_swapped_axes_show_the_model_the_transposed_spectrogram(studies):
    torch.manual_seed(0)
    plain = AST(ASTConfig(3, dim=16, depth=1, heads=2)).eval()
    with studies["frontend"].swapped_axes():
        swapped = AST(plain.config).eval()
        swapped.load_state_dict(plain.state_dict())
    square, wide = torch.randn(2, 128, 128), torch.randn(2, 128, 173)
    torch.testing.assert_close(swapped(square), plain(square.transpose(1, 2)))
    # Not square: as many tokens, but with the positions of others.
    assert swapped(wide).shape == (2, 3)
    assert not torch.allclose(swapped(wide), plain(wide), atol=1e-3)
    afterwards = AST(plain.config).eval()
    afterwards.load_state_dict(plain.state_dict())
    assert torch.equal(afterwards(wide), plain(wide))


def test_padded_frames_are_zeros_after_the_clip(studies):
    wave = torch.randn(2, 88200)
    native = LogMel()(wave)
    with studies["frontend"].padded_frames():
        padded = LogMel()(wave)
    assert native.shape == (2, 128, 173) and padded.shape == (2, 128, 1024)
    assert torch.equal(padded[:, :, :173], native) and not padded[:, :, 173:].any()
    assert torch.equal(LogMel()(wave), native)


def test_negatives_have_zeros_or_one_target_for_all_classes(studies):
    soft_targets = studies["negatives"].soft_targets
    labels = torch.tensor([0, 3, 2])  # of 3 classes; 3 is the output for noise
    zeros = soft_targets(labels, 4, 0.0, torch.nan)
    uniform = soft_targets(labels, 4, 1 / 3, 0.0)
    nan, third = float("nan"), 1 / 3
    expected = torch.tensor([[1, 0, 0, nan], [0, 0, 0, nan], [0, 0, 1, nan]])
    torch.testing.assert_close(zeros, expected, equal_nan=True)
    expected = torch.tensor([[1, 0, 0, 0], [third, third, third, 0], [0, 0, 1, 0]])
    torch.testing.assert_close(uniform, expected)


def test_patch_of_negatives_switches_their_output_off_and_ends(studies):
    config = ASTConfig(4, dim=16, depth=1, heads=2)
    originals = AST.__init__, Clips.batch, Clips.__getitems__
    spec = torch.randn(2, 128, 128)
    with studies["negatives"].uniform_targets():
        assert Clips.batch is Clips.__getitems__ is not originals[1]
        masked = AST(config).eval()(spec)
    assert (AST.__init__, Clips.batch, Clips.__getitems__) == originals
    assert (masked[:, 3] == -30).all()
    plain = AST(config).eval()(spec)
    assert (plain[:, 3] != -30).all()


def test_scores_leave_the_output_for_noise_out(studies):
    negatives = studies["negatives"]
    logits = np.array([[1.0, 2.0, 5.0]])
    e = np.exp([1.0, 2.0, 5.0])
    expected = {"A": e[:2] / e[:2].sum(), "B": e[:2] / e.sum(), "C": e[:2] / (1 + e[:2]),
                "D": e[:2] / e[:2].sum(), "E": e[:2] / (1 + e[:2])}
    for arm in negatives.ARMS:
        scores = negatives.as_scores(logits, 2, arm)
        np.testing.assert_allclose(scores, [expected[arm[0]]])


def test_negatives_of_training_and_test_are_of_different_sites(studies):
    negatives = studies["negatives"]
    rows = negatives.negative_rows("noise/")
    sites = {row[0] for row in rows}
    assert len(sites) == 12 and {row[2] for row in rows} == {"train"}
    seconds = [second for row in rows if row[0] == rows[0][0] for second in range(*row[3:])]
    assert seconds == list(range(150))  # the whole recording, once
    test = {f"noise/noise_{site:04d}.wav" for site in negatives.TEST_SITES}
    assert not sites & test
    n_train = 416 - 2 * 63
    assert 0.25 < len(rows) / (len(rows) + n_train) <= 0.3


@pytest.mark.parametrize("top_only", [False, True])
@pytest.mark.parametrize("recall", [0.9, 0.8, 0.5])
def test_false_alarms_equal_a_search_over_all_thresholds(studies, top_only, recall):
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    clips, negatives = rng.random((60, 3)), rng.random((200, 3))
    clips[np.arange(60), labels] += np.array([0.3, 1, 1])[labels]  # class 0 is often missed
    alarm, reached = studies["false_alarms"].false_alarms(clips, labels, negatives, recall,
                                                          top_only)

    def reports(scores, c, threshold):
        return [row[c] >= threshold and (not top_only or row[c] == max(row)) for row in scores]

    expected, recalls = np.zeros(200, bool), []
    for c in range(3):
        own = clips[labels == c]
        shares = {t: np.mean(reports(own, c, t)) for t in [0.0, *clips[:, c]]}
        enough = [t for t, share in shares.items() if share >= recall - 1e-9]
        threshold = max(enough, default=0.0)  # out of reach: the class with the top score
        expected |= reports(negatives, c, threshold)
        recalls.append(shares[threshold])
    np.testing.assert_array_equal(alarm, expected)
    assert reached == pytest.approx(np.mean(recalls))


def test_separation_is_the_area_under_the_roc_curve(studies):
    rng = np.random.default_rng(1)
    clips, negatives = rng.random((30, 2)).round(1), rng.random((40, 2)).round(1)
    a, b = clips.max(axis=1)[:, None], negatives.max(axis=1)
    expected = np.mean((a > b) + 0.5 * (a == b))
    assert studies["false_alarms"].separation(clips, negatives) == pytest.approx(expected)


def test_ratio_of_alarms_is_paired(studies):
    ratio_interval = studies["false_alarms"].ratio_interval
    sites = np.repeat([f"site {i}" for i in range(20)], 30)
    many = np.random.default_rng(2).random((2, 600)) < np.repeat(np.linspace(0, 1, 20), 30)
    few = many & (np.arange(600) % 6 == 0)
    rows = [[{"alarms": {("any", 0.9): alarm}} for alarm in alarms] for alarms in (many, few)]
    ratio, low, high = ratio_interval(*rows, sites, 0.9)
    assert ratio == pytest.approx((many.sum() + 0.5) / (few.sum() + 0.5))
    assert 1 < low < ratio < high and high / low < 1.5  # though sites differ in their alarms
    assert ratio_interval(rows[0], rows[0], sites, 0.9) == (1, 1, 1)


def test_interval_by_folds_is_the_t_interval(studies):
    differences = np.array([0.05, -0.02, 0.11, 0.04])
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    result = studies["summary"].by_folds(differences)
    assert result == pytest.approx((differences.mean(), *expected))
    assert studies["summary"].by_folds(differences[:1]) is None


def test_interval_by_clips_is_the_bootstrap_interval(studies):
    differences = np.repeat([-1.0, 0.0, 1.0], [30, 290, 80])
    low, high = stats.bootstrap(
        (differences,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    result = studies["summary"].by_clips(differences)
    assert result == pytest.approx((0.125, low, high), abs=0.004)


def test_comparison_pairs_the_same_clips_of_the_same_fold(studies):
    def result(correct):
        accuracy = np.mean(list(correct.values()))
        return SimpleNamespace(metrics={"accuracy": accuracy}, correct=correct)

    baseline = [result({"a": True, "b": False}), result({"c": False, "d": False})]
    better = [result({"b": True, "a": True}), result({"d": False, "c": True})]
    folds, clips = studies["summary"].compare(baseline, better)
    assert folds[0] == clips[0] == 50
    assert clips[1] >= 0  # no clip got worse
    folds, clips = studies["summary"].compare(baseline, baseline)
    assert clips == (0, 0, 0)


@pytest.mark.long
def test_study_in_parallel_gives_the_results_of_one_job(studies, tones, tmp_path, monkeypatch):
    # Two arms, one of which patches the program.
    common, tables = studies["common"], []
    monkeypatch.setattr(common, "SMALL", TINY)
    arms = {"plain": [], "padded": ([], studies["frontend"].padded_frames)}
    for jobs in (1, 2):
        results = tmp_path / f"results{jobs}"
        monkeypatch.setattr(common, "WORK", tmp_path / f"work{jobs}")
        monkeypatch.setattr(common, "RESULTS", results)
        args = common.study_parser("x").parse_args(
            ["--weights", "none", "--epochs", "1", "--folds", "1", "--jobs", str(jobs)])
        common.study("toy", "None.", arms, args, data=lambda args, fold: ["--data", tones])
        tables.append((results / "toy.md").read_text().splitlines()[:6])
        assert (results / "toy.png").exists()
    first_cells = [[line.split("|")[1:2] for line in table] for table in tables]
    assert first_cells[0] == first_cells[1]
    losses = []
    for folder in ("work1/toy/plain-1", "work1/toy/padded-1", "work2/toy/plain-1",
                   "work2/toy/padded-1"):
        losses += [float(row["train_loss"]) for row in read_rows(tmp_path / folder / "history.csv")]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)  # other threads: another order of sums
    assert abs(losses[0] - losses[1]) > 1e-3
