"""A checkpoint from elsewhere chooses no folder and no file of this machine."""
import json
import re
import shutil
from pathlib import Path

import pytest
import soundfile as sf
from conftest import tone
from faults.harness import TINY, exit_code, program, stop_at, without_pictures

import evaluate
import export
import predict
import train
from core.run.checkpoint import load_checkpoint, save_checkpoint
from core.run.origin import own_run_info

ON_CPU = ["--device", "cpu"]


def forge(run, path, **flags):
    """Write the run's checkpoint, with other flags and another root, to `path`."""
    parts = dict(load_checkpoint(run / "best.pt"))
    root = flags.pop("root", None)
    parts["flags"] = {**parts["flags"], **flags}
    if root:
        parts["manifest"] = {**parts["manifest"], "root": str(root)}
    del parts["format"], parts["version"]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, parts)
    return path


@pytest.fixture
def private(tones, tmp_path):
    """A folder with the run's file names, of other content, that the person did not give."""
    folder = tmp_path / "private"
    for i, path in enumerate(sorted(tones.rglob("*.wav"))):
        copy = folder / path.relative_to(tones)
        copy.parent.mkdir(parents=True, exist_ok=True)
        sf.write(copy, tone(1.0, hz=700 + 10 * i), 16000)
    return folder


def run_evaluate(*flags):
    return exit_code(evaluate.main, *ON_CPU, *flags)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize("place", ["alone", "in a run of another split", "with a damaged run.json",
                                   "with a run.json of lists"])
def test_forged_root_is_not_read(place, finished_run, run_copy, private, tmp_path, home, capsys):
    path = tmp_path / ("downloads" if place == "alone" else "run") / "best.pt"
    forge(finished_run, path, root=private, cache_dir=str(tmp_path / "planted"))
    info = json.loads((run_copy / "run.json").read_text())
    if place == "in a run of another split":
        info["data"]["root"], info["split_sha256"] = str(private), "0" * 64
        (run_copy / "run.json").write_text(json.dumps(info))
    elif place == "with a damaged run.json":
        (run_copy / "run.json").write_text('{"flags": ')
    elif place == "with a run.json of lists":
        (run_copy / "run.json").write_text('{"flags": [], "data": [], "split_sha256": []}')
    assert run_evaluate("--ckpt", path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and "--data" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "planted").exists()


def test_forged_root_in_the_folder_of_a_run_reads_the_runs_own_recordings(
        finished_run, run_copy, private, tmp_path, home, capsys):
    forge(finished_run, run_copy / "best.pt", root=private)
    assert run_evaluate("--ckpt", run_copy / "best.pt", "--out", tmp_path / "out") == 0
    assert str(private) not in capsys.readouterr().out
    expected = (run_copy / "test" / "predictions.csv").read_text()
    assert (tmp_path / "out" / "predictions.csv").read_text() == expected


def test_control_the_same_run_json_makes_it_the_runs_own(run_copy, private, tmp_path, home):
    """The folder is then as train.py would have written it."""
    info = json.loads((run_copy / "run.json").read_text())
    info["data"]["root"] = str(private)
    (run_copy / "run.json").write_text(json.dumps(info))
    forge(run_copy, run_copy / "best.pt", root=private)
    assert own_run_info(load_checkpoint(run_copy / "best.pt")) == info


def test_given_data_are_read_and_the_cache_is_not_where_the_file_says(
        finished_run, tones, private, tmp_path, home, capsys):
    planted = tmp_path / "planted"
    path = forge(finished_run, tmp_path / "downloads" / "best.pt", root=private,
                 cache_dir=str(planted), noise_dir=str(private), data=str(private), cache="disk")
    out = tmp_path / "out"
    with without_pictures(pytest.MonkeyPatch()):
        assert run_evaluate("--ckpt", path, "--out", out, "--data", tones) == 0
    assert not planted.exists() and list(home.rglob("audio"))
    page = (out / "report.html").read_text()
    assert str(private) not in re.sub(r"\s", "", page)


def test_predict_and_export_use_no_folder_of_the_file(finished_run, tones, private, tmp_path, home,
                                                      monkeypatch):
    planted = tmp_path / "planted"
    path = forge(finished_run, tmp_path / "downloads" / "best.pt", root=private,
                 cache_dir=str(planted), noise_dir=str(private), data=str(private),
                 run_dir=str(planted), weights=str(private), resume=str(planted))
    shutil.rmtree(private)  # they would fail if they needed it
    recording = sorted(tones.rglob("*.wav"))[0]
    out = ["--out", tmp_path / "p"]
    assert exit_code(predict.main, "--ckpt", path, *ON_CPU, *out, recording) == 0
    assert exit_code(export.main, "--ckpt", path, "--to", "hf", tmp_path / "e") == 0
    assert not planted.exists()


def test_cache_of_the_own_run_is_used(tones, tmp_path, home, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        assert program(patch, tmp_path, "--cache-dir", tmp_path / "mine", data=tones) == 0
    n_entries = len(list((tmp_path / "mine" / "audio").rglob("*")))
    with without_pictures(monkeypatch):
        assert run_evaluate("--ckpt", tmp_path / "run" / "best.pt") == 0
    assert len(list((tmp_path / "mine" / "audio").rglob("*"))) == n_entries > 10
    assert not home.exists()


# --- the usual place works with no further flags ---

def test_newest_run_and_newest_fold(tones, tmp_path, home, monkeypatch, capsys):
    short = [*TINY, "--epochs", 1, "--warmup-epochs", 0, "--freeze-epochs", 0]
    with without_pictures(monkeypatch):
        assert exit_code(train.main, "--data", tones, *short, "--folds", 3,
                         "--run-dir", "runs/f") == 0
        capsys.readouterr()
        assert run_evaluate("--ckpt", "best.pt") == 0
        assert "runs/f/fold3/best.pt" in capsys.readouterr().out
        assert exit_code(train.main, "--data", tones, *short) == 0
        assert run_evaluate("--ckpt", "best.pt") == 0
        newest = next(path for path in Path("runs").iterdir() if path.name != "f")
        assert f"{newest}/best.pt" in capsys.readouterr().out


def test_links_copies_of_the_folder_and_other_files_of_the_run(run_copy, tmp_path, home,
                                                               monkeypatch):
    (tmp_path / "link.pt").symlink_to(run_copy / "best.pt")
    moved = run_copy.rename(tmp_path / "renamed")
    (tmp_path / "folder").symlink_to(moved)
    (tmp_path / "link.pt").unlink()
    (tmp_path / "link.pt").symlink_to(moved / "best.pt")
    with without_pictures(monkeypatch):
        for path in ("renamed/best.pt", "folder/best.pt", "link.pt", "renamed/last.pt.prev"):
            assert run_evaluate("--ckpt", path, "--out", tmp_path / "out") == 0, path


def test_run_whose_data_moved_is_evaluated_after_it_was_resumed(tones, tmp_path, home,
                                                                monkeypatch):
    data = shutil.copytree(tones, tmp_path / "data")
    assert program(monkeypatch, tmp_path, data=data, prepare=stop_at(3)) == 143
    moved = data.rename(tmp_path / "elsewhere")
    assert program(monkeypatch, tmp_path, "--resume", "--data", moved) == 0
    with without_pictures(monkeypatch):
        assert run_evaluate("--ckpt", tmp_path / "run" / "best.pt") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["root"] == str(moved)
