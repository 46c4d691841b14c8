"""A disk that is away is no broken file: the run stops, and resumed later it is as untouched."""
import errno
import os
import shutil

import numpy as np
import pytest
import soundfile as sf
from harness import both, outcome, program, rows

import data.files
import train
from data.audio import AccessError, check
from data.bandwidth import describe_unheard
from data.files import find_outage
from data.scan import scan

from recordings import manifest_of_paths  # isort: skip


@pytest.fixture
def disk(tones, tmp_path):
    shutil.copytree(tones, tmp_path / "disk")
    return tmp_path / "disk"


def at_step(number, act):
    """-> prepare: call `act()` before that optimizer step."""
    def prepare(patch):
        real_step, n_done = train.train_step, 0

        def train_step(*args):
            nonlocal n_done
            n_done += 1
            if n_done == number:
                act()
            return real_step(*args)
        patch.setattr(train, "train_step", train_step)
    return prepare


def test_a_run_whose_disk_goes_away_and_comes_back_is_as_untouched(
    disk, tmp_path, monkeypatch, capsys
):
    away = tmp_path / "away"
    for name in ("untouched", "stopped"):
        (tmp_path / name).mkdir()
    assert program(monkeypatch, tmp_path / "untouched", "--cache", "off", data=disk) == 0
    run = tmp_path / "stopped"
    code = program(monkeypatch, run, "--cache", "off", data=disk,
                   prepare=both(at_step(4, lambda: disk.rename(away))))
    assert code == 2
    assert "the data are not there" in capsys.readouterr().err
    assert program(monkeypatch, run, "--resume") == 2  # still away
    disk.mkdir()
    assert program(monkeypatch, run, "--resume") == 2  # a mount point without its disk
    disk.rmdir()
    away.rename(disk)
    assert program(monkeypatch, run, "--resume") == 0
    assert rows(run / "run" / "bad_files.csv") == []
    assert outcome(run / "run") == outcome(tmp_path / "untouched" / "run")


def test_control_a_file_that_vanishes_alone_is_left_out(disk, tmp_path, monkeypatch):
    paths = sorted(disk.rglob("*.wav"))
    code = program(monkeypatch, tmp_path, "--cache", "off", data=disk,
                   prepare=at_step(1, paths[0].unlink))
    assert code == 0
    bad = rows(tmp_path / "run" / "bad_files.csv")
    assert [row["path"] for row in bad] == [str(paths[0].relative_to(disk))]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV])
def test_errors_of_a_disk_are_told_from_broken_files(tmp_path, monkeypatch, number):
    for name in "ab":
        sf.write(tmp_path / f"{name}.wav", np.zeros(100), 16000)
    failed = {"a.wav": "decoding fails after 0.0 s"}
    assert find_outage(tmp_path, failed, ["a.wav", "b.wav"]) is None
    real_stat = os.stat

    def stat(path, *args, **options):
        if os.fsdecode(path).endswith("a.wav"):
            raise OSError(number, os.strerror(number), path)
        return real_stat(path, *args, **options)

    monkeypatch.setattr(data.files.os, "stat", stat)
    assert os.strerror(number) in find_outage(tmp_path, failed, ["a.wav", "b.wav"])
    with pytest.raises(AccessError):
        check(tmp_path / "a.wav")


def test_a_bad_sector_of_one_file_is_no_outage(tmp_path, monkeypatch):
    for name in "ab":
        sf.write(tmp_path / f"{name}.wav", np.zeros(100), 16000)
    real_problem = data.files._access_problem
    monkeypatch.setattr(data.files, "_access_problem", lambda path, is_folder=False: (
        errno.EIO if str(path).endswith("a.wav") else real_problem(path, is_folder)))
    assert find_outage(tmp_path, {"a.wav": "x"}, ["a.wav", "b.wav"]) is None
    assert find_outage(tmp_path, {"a.wav": "x"}, ["a.wav"])  # nothing else can be read


def test_a_missing_folder_or_a_file_that_is_back_is_an_outage(tmp_path):
    for name in ("a/1.wav", "b/2.wav"):
        (tmp_path / name).parent.mkdir()
        sf.write(tmp_path / name, np.zeros(100), 16000)
    paths = ["a/1.wav", "b/2.wav"]
    assert find_outage(tmp_path, {"a/1.wav": "cannot be opened: No such file"}, paths)
    (tmp_path / "a/1.wav").unlink()
    assert find_outage(tmp_path, {"a/1.wav": "cannot be opened: No such file"}, paths) is None
    (tmp_path / "a").rmdir()
    assert find_outage(tmp_path, {"a/1.wav": "cannot be opened: No such file"}, paths)
    assert find_outage(tmp_path, {"a/1.wav": "cannot be opened"}, paths, were_there=False) is None


def test_what_the_system_refuses_to_read_is_not_remembered(tmp_path, monkeypatch):
    sf.write(tmp_path / "a.wav", np.zeros(100), 16000)
    manifest, index = manifest_of_paths(tmp_path, "a.wav"), tmp_path / "index"

    def refuse(path):
        raise AccessError("read", OSError(errno.EIO, "Input/output error"))

    with monkeypatch.context() as patch:
        patch.setattr("data.scan.check", refuse)
        assert not scan(manifest, index, True).ok.any()
    assert scan(manifest, index, False).ok.all()


def test_sound_above_the_band_of_the_front_end_is_noted(tmp_path):
    t = np.arange(250_000) / 250_000
    sf.write(tmp_path / "bat.wav", 0.3 * np.sin(2 * np.pi * 45_000 * t), 250_000)
    sf.write(tmp_path / "bird.wav", 0.3 * np.sin(2 * np.pi * 4_000 * t), 250_000)
    rng = np.random.default_rng(0)
    sf.write(tmp_path / "noise.wav", 0.1 * rng.standard_normal(44100), 44100)
    for name, n_lines in (("bat", 1), ("bird", 0), ("noise", 0)):
        manifest = manifest_of_paths(tmp_path, f"{name}.wav")
        manifest.duration = scan(manifest, None, False).duration
        lines = describe_unheard(manifest, 11025, "logmel")
        assert len(lines) == n_lines, name
        assert all("--frontend logmel" in line for line in lines)
