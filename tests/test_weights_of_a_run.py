"""--weights from an earlier run: the rows of known classes, and test clips that it has seen."""
import json
import shutil

import pytest
import soundfile as sf
import torch
from conftest import tone

from build import _load_weights
from core.run.checkpoint import load_checkpoint
from data.load import load_manifest
from data.prepare import prepare
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from report import verdict
from report.run_files import read_run
from tests.faults.harness import program


@pytest.fixture
def four_classes(tones, tmp_path):
    """The recordings of `tones` and those of a class that comes first."""
    folder = shutil.copytree(tones, tmp_path / "four")
    (folder / "a new one").mkdir()
    for i in range(16):
        sf.write(folder / "a new one" / f"{i}.wav", tone(1.0, hz=2400 + 10 * i, seed=i), 16000)
    return folder


def load(run, classes, data, cache):
    """(state before, state after, lines, state of the run) of loading a run's weights."""
    checkpoint = load_checkpoint(run / "best.pt")
    config = ASTConfig(**{**checkpoint["config"], "n_classes": len(classes)})
    frontend = build_frontend(FrontendConfig(**checkpoint["frontend"]))
    model = AST(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    manifest, _ = prepare(data, cache_dir=cache, log=lambda line: None)
    manifest.classes = classes
    report, leaks = _load_weights(str(run / "best.pt"), model, frontend, manifest)
    return before, model.state_dict(), [*report.lines(), *leaks], checkpoint["model"]


def test_rows_of_known_classes_are_taken_and_the_others_start_anew(
        finished_run, four_classes, tmp_path):
    classes = load_manifest(four_classes).classes
    known = load_checkpoint(finished_run / "best.pt")["classes"]
    assert classes == ["a new one", *known]
    before, after, lines, source = load(finished_run, classes, four_classes, tmp_path / "cache")
    for name in ("head.1.weight", "head.1.bias"):
        assert torch.equal(after[name][1:], source[name])
        assert torch.equal(after[name][0], before[name][0])
    assert torch.equal(after["head.0.weight"], source["head.0.weight"])
    assert any("3 of 4 classes have the weights' own rows" in line for line in lines)


def test_control_head_starts_anew_if_no_class_is_known(finished_run, tones, tmp_path):
    before, after, lines, _ = load(finished_run, ["x", "y", "z"], tones, tmp_path / "cache")
    for name in before:
        if name.startswith("head."):
            assert torch.equal(after[name], before[name])
    assert any("new: head" in line for line in lines)


def test_test_clips_that_the_weights_have_seen_are_a_leak(tones, tmp_path, monkeypatch, capsys):
    assert program(monkeypatch, tmp_path, "--epochs", 1, data=tones) == 0
    first = (tmp_path / "run").rename(tmp_path / "first")
    used = {path for path, split in zip(*(load_checkpoint(first / "best.pt")["manifest"][name]
                                          for name in ("paths", "split"))) if split != 2}
    capsys.readouterr()
    renamed = tmp_path / "renamed"  # under the old names the clips would keep their split
    for path in sorted(tones.glob("*/*.wav")):
        (renamed / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, renamed / path.parent.name / f"x{path.name}")
    flags = ["--epochs", 1, "--seed", 5, "--weights", first / "best.pt"]
    assert program(monkeypatch, tmp_path, *flags, data=renamed) == 0
    manifest = load_checkpoint(tmp_path / "run" / "best.pt")["manifest"]
    test = [path for path, split in zip(manifest["paths"], manifest["split"]) if split == 2]
    n_seen = len(used & {path.replace("/x", "/") for path in test})
    assert n_seen > 0
    line = f"LEAK: {n_seen} of {len(test)} test clips were used to train or select"
    assert line in capsys.readouterr().out
    run = read_run(tmp_path / "run", tmp_path / "run" / "test")
    [leak] = [item for item in verdict.findings(run).found if "Leakage" in item.text]
    assert any(line.removeprefix("LEAK: ") in detail for detail in leak.details)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["notes"]


def test_control_weights_with_the_same_split_have_seen_no_test_clip(
        finished_run, tones, tmp_path):
    classes = load_checkpoint(finished_run / "best.pt")["classes"]
    *_, lines, _ = load(finished_run, classes, tones, tmp_path / "cache")
    assert not any("LEAK" in line for line in lines)
