"""The studies: their flags exist, their data is what they say, the scheduler that they warn of is that one."""
import csv
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import train

ROOT = train.Path(train.__file__).parent
STUDIES = ("warmup", "batch", "augmentation", "longtail")


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
