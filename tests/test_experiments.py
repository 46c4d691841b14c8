"""The studies: their flags exist, their data is what they say, the faults that they warn of are those, their intervals hold."""
import csv
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import train
from model.ast import AST, ASTConfig
from model.frontend import LogMel

ROOT = train.Path(train.__file__).parent
STUDIES = ("warmup", "batch", "augmentation", "longtail", "frontend", "recipe")


@pytest.fixture
def studies(monkeypatch):
    """The scripts as modules, by name; they find each other as when they are run."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    yield {name: importlib.import_module(name) for name in (*STUDIES, "common", "pretrain")}
    for name in (*STUDIES, "common", "pretrain"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_is_a_command_line_of_the_program(name, studies):
    arms = studies[name].ARMS
    assert len(arms) > 2 and len(studies[name].CLAIM) > 20
    for flags in arms.values():
        flags = flags[0] if isinstance(flags, tuple) else flags
        args, given = train.parse(["--data", "x", *map(str, flags)])
        assert len(given) == 1 + sum(str(flag).startswith("--") for flag in flags)


def test_the_earlier_systems_scheduler(studies):
    """One rate for all groups, up to 1e-3 after the warm-up whatever the groups' own, and back to theirs afterwards."""
    ours = train.RelativeSchedule
    with studies["warmup"].shared():
        assert train.RelativeSchedule is not ours
        weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 5e-5}, {"params": [weights[1]], "lr": 1e-3}])
        schedule, rates = train.RelativeSchedule(optimizer, 10, 50), []
        for _ in range(50):
            rates.append([group["lr"] for group in optimizer.param_groups])
            schedule.step()
    assert train.RelativeSchedule is ours
    assert all(a == b for a, b in rates)
    rates = [a for a, _ in rates]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == rates[10] == pytest.approx(1e-3)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-5


def test_the_uneven_classes(studies, tmp_path, monkeypatch):
    (tmp_path / "meta").mkdir()
    with open(tmp_path / "meta" / "esc50.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["filename", "fold", "target", "category"])
        out.writerows([f"{c}-{fold}-{i}.wav", fold, c, f"class{c}"] for c in range(10) for fold in range(1, 6) for i in range(8))
    monkeypatch.setattr(studies["longtail"], "WORK", tmp_path)
    for fold in (1, 5):
        flags = studies["longtail"].thinned(SimpleNamespace(data=str(tmp_path)), fold)
        with open(flags[1], newline="") as file:
            rows = list(csv.DictReader(file))
        count = {split: sorted(sum(row["split"] == split and row["label"] == f"class{c}" for row in rows) for c in range(10))
                 for split in ("train", "val", "test")}
        assert count["train"] == [1, 1, 2, 3, 4, 6, 8, 12, 17, 24] and count["val"] == count["test"] == [8] * 10
        folds = {split: {row["path"].split("-")[1] for row in rows if row["split"] == split} for split in count}
        assert folds["test"] == {str(fold)} and folds["val"] == {str(fold % 5 + 1)} and len(folds["train"]) <= 3
        assert not folds["train"] & (folds["val"] | folds["test"])


def test_swapped_axes_are_those_of_the_earlier_system(studies):
    """Of a square input the model sees the transpose; of any other as many tokens, in the places of others."""
    torch.manual_seed(0)
    plain = AST(ASTConfig(3, dim=16, depth=1, heads=2)).eval()
    with studies["frontend"].swapped():
        model = AST(plain.config).eval()
        model.load_state_dict(plain.state_dict())
    square, wide = torch.randn(2, 128, 128), torch.randn(2, 128, 173)
    torch.testing.assert_close(model(square), plain(square.transpose(1, 2)))
    assert model(wide).shape == (2, 3) and not torch.allclose(model(wide), plain(wide), atol=1e-3)
    again = AST(plain.config).eval()
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again(wide), plain(wide))


def test_padding_is_zeros_after_the_clip(studies):
    wave = torch.randn(2, 88200)
    native = LogMel()(wave)
    with studies["frontend"].padded():
        found = LogMel()(wave)
    assert native.shape == (2, 128, 173) and found.shape == (2, 128, 1024)
    assert torch.equal(found[:, :, :173], native) and not found[:, :, 173:].any()
    assert torch.equal(LogMel()(wave), native)


def test_intervals_of_a_difference(studies):
    folds, clips = np.array([0.05, -0.02, 0.11, 0.04]), np.repeat([-1.0, 0.0, 1.0], [30, 290, 80])
    expected = stats.ttest_1samp(folds, 0).confidence_interval(0.95)
    assert studies["common"].by_folds(folds) == pytest.approx((folds.mean(), *expected))
    expected = stats.bootstrap((clips,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert studies["common"].by_clips(clips) == pytest.approx((0.125, *expected), abs=0.004)


@pytest.mark.long
def test_a_study_side_by_side_is_the_study_one_by_one(studies, tones, tmp_path, monkeypatch):
    """Two arms, one of them with a patch of the program, in this process and in two others: the same losses, and a table."""
    common, tables = studies["common"], []
    monkeypatch.setattr(common, "SMALL", ["--dim", "16", "--depth", "1", "--heads", "2", "--seconds", "1", "--device", "cpu", "--amp", "off"])
    arms = {"plain": [], "padded": ([], studies["frontend"].padded)}
    for jobs in (1, 2):
        monkeypatch.setattr(common, "WORK", tmp_path / f"work{jobs}")
        monkeypatch.setattr(common, "RESULTS", tmp_path / f"results{jobs}")
        args = common.parser("x").parse_args(["--weights", "none", "--epochs", "1", "--folds", "1", "--jobs", str(jobs)])
        common.study("toy", "None.", arms, args, data=lambda args, fold: ["--data", tones])
        tables.append((tmp_path / f"results{jobs}" / "toy.md").read_text().splitlines()[:6])
        assert (tmp_path / f"results{jobs}" / "toy.png").exists()
    assert [line.split("|")[1:2] for line in tables[0]] == [line.split("|")[1:2] for line in tables[1]]
    losses = []
    for folder in ("work1/toy/plain-1", "work1/toy/padded-1", "work2/toy/plain-1", "work2/toy/padded-1"):
        with open(tmp_path / folder / "history.csv", newline="") as file:
            losses += [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5) and abs(losses[0] - losses[1]) > 1e-3  # sums in another order, no more
