"""Starts of whole runs: folds for any data, grown data, no home directory, another locale."""
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile as sf
from conftest import ROOT, tone
from harness import program

SHORT = ["--epochs", 1, "--freeze-epochs", 0]


def split_rows(run):
    with open(run / "split.csv", newline="", encoding="utf-8") as file:
        return {row["path"]: row["split"] for row in csv.DictReader(file)}


def test_folds_for_data_without_folds(tones, tmp_path, monkeypatch, capsys):
    flags = [*SHORT, "--folds", 3]
    assert program(monkeypatch, tmp_path, *flags, data=tones) == 0
    run = tmp_path / "run"
    splits = [split_rows(run / f"fold{fold}") for fold in (1, 2, 3)]
    for path in splits[0]:
        assert sorted(split[path] for split in splits) == ["test", "train", "val"]
    assert "3 folds, 48 clips" in capsys.readouterr().out
    for fold in (1, 2, 3):
        (run / f"fold{fold}" / "report.html").touch()  # tests write no report
    shutil.rmtree(run / "fold2")
    (run / "fold3/test/scores.npz").unlink()  # as if it had been killed there
    assert program(monkeypatch, tmp_path, *flags, data=tones) == 0
    assert [split_rows(run / f"fold{fold}") for fold in (1, 2, 3)] == splits
    out = capsys.readouterr().out
    assert "fold 1: already done" in out and "resumed after step" in out


@pytest.mark.parametrize("flags, name", [
    (["--folds", 3, "--fold", 4], "--fold 4"), (["--folds", 3, "--smoke"], "--folds"),
    (["--folds", 3, "--split-from", "x"], "--split-from"),
    (["--fold", 1, "--split-from", "x"], "--split-from"), (["--split-from", "no/run"], "no/run")])
def test_flags_that_do_not_fit(tones, tmp_path, monkeypatch, capsys, flags, name):
    assert program(monkeypatch, tmp_path, *flags, data=tones) == 2
    assert name in capsys.readouterr().err


def test_grown_data_keep_the_split_of_a_run(tones, run_copy, tmp_path, monkeypatch, capsys):
    data, old = tmp_path / "data", tmp_path / "old"
    shutil.copytree(tones, data)
    run_copy.rename(old)
    for c, folder in enumerate(sorted(data.iterdir())):
        for i in range(8):
            wave = tone(1.0, hz=500 * (c + 1), seed=9000 + 10 * c + i)
            sf.write(folder / f"new{i}.wav", wave, 16000)
    before = split_rows(old)
    for number, flags in enumerate([["--split-from", old], ["--weights", old / "best.pt"]]):
        where = tmp_path / str(number)
        where.mkdir()
        assert program(monkeypatch, where, *SHORT, "--seed", 7, *flags, data=data) == 0
        after = split_rows(where / "run")
        assert len(after) == 72 and before.items() <= after.items()
        assert "48 clips keep their split, 24 are new" in capsys.readouterr().out
    control = tmp_path / "control"
    control.mkdir()
    assert program(monkeypatch, control, *SHORT, "--seed", 7, data=data) == 0
    assert not before.items() <= split_rows(control / "run").items()


def test_without_a_home_directory(tones, tmp_path, monkeypatch, capsys):
    def homeless(patch):
        def home():
            raise RuntimeError("Could not determine home directory.")
        patch.setattr(Path, "home", home)

    assert program(monkeypatch, tmp_path, *SHORT, data=tones, prepare=homeless) == 2
    assert "give --cache-dir" in capsys.readouterr().err
    flags = [*SHORT, "--cache-dir", tmp_path / "cache"]
    assert program(monkeypatch, tmp_path, *flags, data=tones, prepare=homeless) == 0


def test_a_locale_without_utf8_changes_nothing(tmp_path):
    rows = ["path,label"]
    for c, name in enumerate(["häufig", "selten"]):
        (tmp_path / name).mkdir()
        for i in range(8):
            wave = tone(0.7, hz=400 + 900 * c, seed=c + 2 * i)
            sf.write(tmp_path / name / f"ü{i}.wav", wave, 16000)
            rows.append(f"{name}/ü{i}.wav,{name}")
    (tmp_path / "clips.csv").write_text("\n".join(rows), encoding="utf-8")
    command = [sys.executable, ROOT / "train.py", "--data", "clips.csv", "--weights", "none",
               "--dim", "16", "--depth", "1", "--heads", "2", "--seconds", "0.6", "--device", "cpu",
               "--amp", "off", "--epochs", "1", "--batch-size", "4", "--effective-batch", "4",
               "--cache-dir", "cache", "--run-dir"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for run, locale in (("ascii", ascii_only), ("utf8", {"PYTHONUTF8": "1"})):
        done = subprocess.run([*command, run], cwd=tmp_path, env={**os.environ, **locale},
                              capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
    splits = [(tmp_path / run / "split.csv").read_bytes() for run in ("ascii", "utf8")]
    assert splits[0] == splits[1] and "häufig".encode() in splits[0]
    assert "häufig" in (tmp_path / "ascii/report.html").read_text(encoding="utf-8")
