"""Caches of other users, and files that are no files: not used, and nothing hangs."""
import os
import shutil
import threading

import numpy as np
import pytest
from recordings import write_wav

import data.cache
from data.cache import WaveCache
from data.load import load_manifest
from data.manifest import DataError
from data.named import fetch
from data.scan import scan
from report.run_files import read_rows
from tests.faults.harness import program, rows
from util import foreign_owner, open_regular, read_regular

OTHER = 12345
needs_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0,
                                reason="only root can give a file to another user")


def give_away(*paths):
    for path in paths:
        os.chown(path, OTHER, OTHER)


@pytest.fixture
def recordings(tmp_path):
    for name in ("a", "b"):
        for i in range(3):
            write_wav(tmp_path / "data" / name / f"{i}.wav", seed=i + 10 * (name == "b"))
    return tmp_path / "data"


def in_time(function, seconds=10):
    """function()'s result or error, or a failure if it does not return: a test must not hang."""
    result = []

    def run():
        try:
            result.append((function(), None))
        except Exception as error:
            result.append((None, error))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "hangs"
    value, error = result[0]
    if error:
        raise error
    return value


# --- the cache of decoded audio ---

def read(cache, path):
    return cache.read(path, 0, 800)[0].tolist()


def entry_of(cache):
    return next(path for path in cache.folder.rglob("*") if path.is_file())


@needs_root
@pytest.mark.parametrize("level", ["cache", "cache/audio", "cache/audio/16000"])
def test_cache_folder_of_another_user_is_not_used(level, recordings, tmp_path):
    path = recordings / "a" / "0.wav"
    expected = read(WaveCache(tmp_path / "cache" / "audio", 16000), path)
    entry = entry_of(WaveCache(tmp_path / "cache" / "audio", 16000))
    content = entry.read_bytes()
    forge_samples(entry)
    give_away(tmp_path / level)
    cache = WaveCache(tmp_path / "cache" / "audio", 16000)
    assert read(cache, path) == expected
    assert str(tmp_path / level) in cache.problem and "another user" in cache.problem
    assert entry.read_bytes() != content  # nothing was written


def forge_samples(entry):
    """Other samples under a right checksum."""
    content = entry.read_bytes()
    magic, *source, n, scale, _ = data.cache.HEADER.unpack(content[:data.cache.HEADER.size])
    samples = np.arange(n, dtype=np.int16).tobytes()
    checksum = data.cache._checksum(source, scale, samples)
    header = data.cache.HEADER.pack(magic, *source, n, scale, checksum)
    entry.write_bytes(header + samples)


@needs_root
def test_forged_entry_of_another_user_is_replaced(recordings, tmp_path):
    path = recordings / "a" / "0.wav"
    cache = WaveCache(tmp_path / "cache" / "audio", 16000)
    expected = read(cache, path)
    entry = entry_of(cache)
    forge_samples(entry)
    give_away(entry)
    assert read(WaveCache(tmp_path / "cache" / "audio", 16000), path) == expected
    assert os.stat(entry).st_uid == os.getuid()


def test_control_a_forged_entry_of_this_user_is_read(recordings, tmp_path):
    path = recordings / "a" / "0.wav"
    cache = WaveCache(tmp_path / "cache" / "audio", 16000)
    expected = read(cache, path)
    forge_samples(entry_of(cache))
    assert read(WaveCache(tmp_path / "cache" / "audio", 16000), path) != expected


@pytest.mark.parametrize("kind", ["fifo", "zero", "null"])
def test_cache_entry_that_is_no_file(kind, recordings, tmp_path):
    path = recordings / "a" / "0.wav"
    cache = WaveCache(tmp_path / "cache" / "audio", 16000)
    expected = read(cache, path)
    put_no_file(entry_of(cache), kind)
    assert in_time(lambda: read(WaveCache(tmp_path / "cache" / "audio", 16000), path)) == expected


def put_no_file(path, kind):
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(f"/dev/{kind}")


@needs_root
def test_run_goes_on_without_the_cache_of_another_user(tones, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "shared"
    assert program(monkeypatch, tmp_path / "own", "--cache-dir", tmp_path / "mine",
                   data=tones) == 0
    shutil.copytree(tmp_path / "mine", cache)
    for entry in (path for path in (cache / "audio").rglob("*") if path.is_file()):
        forge_samples(entry)
    give_away(cache)
    capsys.readouterr()
    assert program(monkeypatch, tmp_path / "other", "--cache-dir", cache, data=tones) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "another user" in line]
    assert len(lines) == 2 and all(str(cache) in line for line in lines)  # scan and audio
    assert rows(tmp_path / "own" / "run" / "steps.csv") == rows(
        tmp_path / "other" / "run" / "steps.csv")


@needs_root
def test_data_set_of_another_user_is_refused(tmp_path):
    home = tmp_path / "datasets" / "esc50"
    home.mkdir(parents=True)
    assert fetch("esc50", tmp_path) == home
    for folder in (home, home.parent):
        give_away(folder)
        with pytest.raises(DataError, match="another user") as error:
            fetch("esc50", tmp_path)
        assert "--data" in str(error.value)
        os.chown(folder, os.getuid(), os.getgid())


@needs_root
def test_cache_below_a_folder_of_root_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: OTHER)
    assert foreign_owner(tmp_path) is None  # such as /tmp
    assert foreign_owner(tmp_path, tmp_path) is not None


# --- the scan index ---

@needs_root
@pytest.mark.parametrize("which", ["index", "folder"])
def test_scan_index_of_another_user_is_not_used(which, recordings, tmp_path):
    manifest, index = load_manifest(recordings), tmp_path / "cache" / "scan"
    assert scan(manifest, index, True).n_opened == 6
    give_away(index if which == "index" else index.parent)
    result = scan(manifest, index, True)
    assert result.n_opened == 6
    assert any("another user" in note for note in result.notes) == (which == "folder")


@pytest.mark.parametrize("kind", ["fifo", "zero", "null"])
def test_scan_index_that_is_no_file(kind, recordings, tmp_path):
    manifest, index = load_manifest(recordings), tmp_path / "scan"
    put_no_file(index, kind)
    assert in_time(lambda: scan(manifest, index, True)).n_opened == 6
    assert scan(manifest, index, True).n_opened == 0  # a file has taken its place


# --- tables ---

@pytest.mark.parametrize("kind", ["fifo", "zero"])
@pytest.mark.parametrize("name", ["clips.csv", "data/meta/esc50.csv", "data/train_metadata.csv",
                                  "data/testing_list.txt", "data/a/3.wav"])
def test_data_that_are_no_files(name, kind, recordings, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    put_no_file(path, kind)
    (recordings / "validation_list.txt").write_text("a/0.wav\n")
    given = path if name == "clips.csv" else recordings

    def load():
        try:
            return scan(load_manifest(given), None, True)
        except DataError as error:
            assert name != "data/a/3.wav" and str(error).isprintable()
    in_time(load)


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_results_that_are_no_files(kind, tmp_path):
    put_no_file(tmp_path / "predictions.csv", kind)
    with pytest.raises(OSError, match="not a regular file"):
        in_time(lambda: read_rows(tmp_path / "predictions.csv"))


def test_regular_files_are_read(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("x")
    assert read_regular(tmp_path / "link") == b"abc"
    with open_regular(tmp_path / "x") as file:
        assert file.read(2) == b"ab"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")
