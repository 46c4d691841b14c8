"""Scans of generated and unreadable files, and what is written and printed about them."""
import csv
import os
import signal
import struct
import threading
import time
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
from recordings import manifest_of_paths, same_scan, write_wav

import data.scan
from data.load import load_manifest
from data.scan import scan, summary, write_bad_files


@pytest.fixture
def folder(tmp_path):
    """Class folders with four readable files, two of them the same."""
    for name, seed in (("a/1", 1), ("a/2", 2), ("b/3", 3), ("b/copy of 1", 1)):
        write_wav(tmp_path / "data" / f"{name}.wav", seed)
    return tmp_path / "data"


def test_results_of_a_scan(tmp_path):
    write_wav(tmp_path / "a.wav", frames=8000, rate=8000)
    write_wav(tmp_path / "b.wav", frames=11025, rate=22050, channels=2)
    write_wav(tmp_path / "c.wav", frames=100, rate=96000, channels=6)
    for full in (False, True):
        result = scan(manifest_of_paths(tmp_path, "a.wav", "b.wav", "c.wav"), None, full)
        assert result.duration.tolist() == [1.0, 0.5, np.float32(100 / 96000)]
        assert result.duration.dtype == np.float32
        assert result.rate.tolist() == [8000, 22050, 96000] and result.rate.dtype == np.int32
        assert result.channels.tolist() == [1, 2, 6] and result.channels.dtype == np.int16
        assert result.ok.tolist() == [True] * 3 and result.ok.dtype == bool
        assert (result.reasons, result.duplicates, result.notes) == ({}, [], [])
        assert (result.full, result.n_opened, result.n_files) == (full, 3, 3)
        assert result.seconds > 0


# ---- unreadable files

def write_unreadable_files(folder):
    """Write good.wav and unreadable files. -> two dicts of {path: part of the reason}.

    The files in the second dict are only seen to be unreadable when they are decoded.
    """
    good = write_wav(folder / "good.wav", frames=4000).read_bytes()
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is no audio\n" * 20)
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    os.symlink("nowhere", folder / "dangling.wav")
    os.symlink("loop.wav", folder / "loop.wav")
    (folder / "header.wav").write_bytes(good[:44])
    sf.write(folder / "nan.wav", np.array([0, np.nan, 0.5]), 16000, subtype="FLOAT")
    sf.write(folder / "noise.flac", np.random.default_rng(0).uniform(-1, 1, 30000), 16000)
    content = (folder / "noise.flac").read_bytes()  # the header is right, the samples are not
    (folder / "noise.flac").write_bytes(content[:100] + bytes(len(content) - 100))
    open(os.fsencode(folder) + b"/\xff\n.wav", "wb").close()
    by_header = {
        "empty.wav": "empty", "text.wav": "not readable", "folder.wav": "not a regular file",
        "pipe.wav": "not a regular file", "dangling.wav": "cannot be opened",
        "loop.wav": "cannot be opened", "header.wav": "no samples",
        "gone.wav": "cannot be opened", "\udcff\n.wav": "empty"}
    return by_header, {"nan.wav": "not finite", "noise.flac": ""}


@pytest.mark.parametrize("with_index", [False, True])
def test_reasons_of_unreadable_files(tmp_path, with_index):
    by_header, by_decoding = write_unreadable_files(tmp_path)
    manifest = manifest_of_paths(tmp_path, "good.wav", *by_header, *by_decoding)
    index = tmp_path / "cache/index" if with_index else None
    n = len(manifest)
    headers = scan(manifest, index, False)
    assert headers.ok.tolist() == [True] + [False] * len(by_header) + [True] * len(by_decoding)
    full = scan(manifest, index, True)
    assert full.ok.tolist() == [True] + [False] * (n - 1) and full.n_opened == n
    for row, (path, reason) in enumerate({**by_header, **by_decoding}.items(), 1):
        assert reason in full.reasons[row] and full.reasons[row], path
        assert full.duration[row] == 0
    assert list(full.reasons) == list(range(1, n))
    if with_index:
        # A scan of headers remembers what decoding showed; unreadable headers are read again.
        again = scan(manifest, index, False)
        assert same_scan(again, full) and again.n_opened == len(by_header)
        again = scan(manifest, index, True)
        assert same_scan(again, full) and again.n_opened == len(by_header) + len(by_decoding)


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", frames=32000)
    calls = Counter()

    def count(name):
        real = getattr(data.scan, name)

        def counted(path):
            calls[name, path] += 1
            return real(path)

        monkeypatch.setattr(data.scan, name, counted)

    count("probe")
    count("check")
    manifest = manifest_of_paths(tmp_path, *["a.wav"] * 3, start=[0, 1, 0.5], end=[1, 2, 9])
    result = scan(manifest, None, True)
    assert list(calls.values()) == [1, 1] and result.n_opened == 1
    assert result.duration.tolist() == [1, 1, 1.5] and result.duplicates == []


def test_clips_beyond_the_end_of_their_file(tmp_path):
    write_wav(tmp_path / "a.wav", frames=16000)
    manifest = manifest_of_paths(tmp_path, *["a.wav"] * 5, start=[0, 0.5, 1, 3, 0],
                                 end=[5, 1.01, 2, np.nan, np.nan])
    result = scan(manifest, None, False)
    assert result.ok.tolist() == [True, True, False, False, True]
    assert result.duration.tolist() == [1, 0.5, 0, 0, 1]
    assert result.reasons == {2: "the clip starts at 1 s, but the file ends at 1 s",
                              3: "the clip starts at 3 s, but the file ends at 1 s"}
    assert "cut at the end of their file: 1 clip" in summary(result, manifest)


def test_a_file_that_vanishes_during_the_scan(folder, monkeypatch):
    real_probe = data.scan.probe

    def probe(path):
        info = real_probe(path)
        if path.endswith("2.wav"):
            os.remove(path)
        return info

    monkeypatch.setattr(data.scan, "probe", probe)
    result = scan(load_manifest(folder), None, False)
    assert result.ok.tolist() == [True, False, True, True]
    assert "No such file" in result.reasons[1]
    assert result.duplicates == [[0, 3]]


def test_a_header_that_promises_too_much(tmp_path):
    content = bytearray(write_wav(tmp_path / "a.wav", frames=4000).read_bytes())
    content[40:44] = struct.pack("<I", 2**32 - 9)
    (tmp_path / "a.wav").write_bytes(content)
    result = scan(manifest_of_paths(tmp_path, "a.wav"), None, True)
    assert result.duration[0] < 1  # unreadable, or as long as its samples


def test_an_interrupted_scan_saves_what_it_saw(tmp_path, monkeypatch):
    paths = [write_wav(tmp_path / f"{i:02d}.wav", seed=i, frames=800 + i).name for i in range(60)]
    manifest, index = manifest_of_paths(tmp_path, *paths), tmp_path / "index"
    checked, sent = [], []
    real_check = data.scan.check

    def check(path):
        checked.append(path)
        if len(checked) >= 25 and not sent:  # two threads may pass 25 together
            sent.append(True)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.01)
        return real_check(path)

    monkeypatch.setattr(data.scan, "check", check)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            scan(manifest, index, True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(checked) < 60  # no further file was begun
    monkeypatch.undo()
    result = scan(manifest, index, True)
    assert result.ok.all() and result.n_opened == 60 - len(checked)


# ---- duplicates

def test_duplicates_are_found_by_their_bytes(tmp_path):
    for name, seed, frames in (("a", 1, 50000), ("b", 1, 50000), ("c", 2, 50000), ("d", 3, 200),
                               ("e", 3, 200), ("f", 3, 201)):
        write_wav(tmp_path / f"{name}.wav", seed, frames)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[20000] ^= 1  # in none of the pieces that the fingerprint covers
    (tmp_path / "near.wav").write_bytes(content)
    os.link(tmp_path / "d.wav", tmp_path / "hard.wav")
    os.symlink("d.wav", tmp_path / "soft.wav")
    for unreadable in ("x.wav", "y.wav"):
        (tmp_path / unreadable).write_text("no audio, twice")
    paths = ["near.wav", "b.wav", "a.wav", "e.wav", "x.wav", "a.wav", "f.wav", "hard.wav",
             "soft.wav", "y.wav", "c.wav"]
    manifest = manifest_of_paths(tmp_path, *paths, start=[0, 0, 0, 0, 0, 0.1, 0, 0, 0, 0, 0])
    for full in (False, True):
        result = scan(manifest, None, full)
        # Every row of the files, but no file as a duplicate of itself.
        assert result.duplicates == [[1, 2, 5], [3, 7, 8]]
    lines = summary(result, manifest)
    assert "3 files are byte-identical to another, e.g. b.wav = a.wav" in lines
    assert all(type(row) is int for rows in result.duplicates for row in rows)


def test_only_similar_files_are_read_through(tmp_path, monkeypatch):
    read = []
    real_sha256 = data.scan.sha256_of

    def sha256_of(path):
        read.append(os.path.basename(path))
        return real_sha256(path)

    monkeypatch.setattr(data.scan, "sha256_of", sha256_of)
    seeds = [0, 0, 1, 1, *range(4, 20)]
    paths = [write_wav(tmp_path / f"{i}.wav", seed=seed).name for i, seed in enumerate(seeds)]
    result = scan(manifest_of_paths(tmp_path, *paths), None, False)
    assert result.duplicates == [[0, 1], [2, 3]]
    assert sorted(read) == ["0.wav", "1.wav", "2.wav", "3.wav"]


# ---- what is written and printed

def test_bad_files_table(tmp_path):
    path = tmp_path / "run/bad_files.csv"
    write_bad_files([], path)
    assert path.read_text() == "path,reason\n"
    bad = [("a,b.wav", 'says "no"'), ("\udcff\n.wav", "empty"), ("a,b.wav", 'says "no"'),
           ["c.wav", "x"]]
    write_bad_files(bad, path)
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "reason"], *map(list, bad[:2]), bad[3]]
    assert os.listdir(tmp_path / "run") == ["bad_files.csv"]


def test_summary(tmp_path):
    formats = [(16000, 8000, 1), (16000, 32000, 2), (44100, 44100, 1)]
    for i, (rate, frames, channels) in enumerate(formats):
        write_wav(tmp_path / f"{i}.wav", i, frames, rate, channels)
    (tmp_path / "3\n.wav").touch()
    manifest = manifest_of_paths(tmp_path, "0.wav", "1.wav", "2.wav", "3\n.wav", "4.wav", "5.wav",
                                 "6.wav")
    lines = summary(scan(manifest, None, False), manifest)
    assert lines[0].startswith("7 clips in 7 files, 0.00 h; opened 7 files in ")
    assert lines[1] == "length 0.50 / 1.00 / 2.00 s (shortest / median / longest)"
    assert lines[2] == "16000 Hz x 2, 44100 Hz x 1; 1 channel(s) x 2, 2 channel(s) x 1"
    assert lines[3].startswith("left out: 4 unreadable clips: 3\\n.wav: empty")
    assert lines[3].endswith("; ...")
    assert len(lines) == 4 and all(line.isprintable() for line in lines)
    twice = manifest_of_paths(tmp_path, "0.wav", "0.wav", "1.wav")
    assert summary(scan(twice, None, False), twice)[0].startswith("3 clips in 2 files")
    missing = manifest_of_paths(tmp_path, "4.wav", "5.wav")
    assert len(summary(scan(missing, None, True), missing)) == 2
    empty = manifest_of_paths(tmp_path)
    result = scan(empty, tmp_path / "index", True)
    assert summary(result, empty)[0].startswith("0 clips in 0 files")


def test_real_recordings(esc10, tmp_path):
    manifest = load_manifest(esc10).select(slice(0, 400, 8))
    headers = scan(manifest, tmp_path / "index", False)
    full = scan(manifest, tmp_path / "index", True)
    assert headers.ok.all() and full.ok.all()
    assert set(full.rate) == {44100} and full.duplicates == []
    assert full.duration.min() > 0 and full.duration.max() < 10
    assert scan(manifest, tmp_path / "index", True).n_opened == 0


@pytest.mark.parametrize("length", [36, 40, 43, 44, 47])
def test_mp3_that_ends_within_its_length_header_is_unreadable(tmp_path, length):
    """Cut at each field of the header, "Xing", flags and number of frames."""
    frame = bytes([0xff, 0xfb, 0x90, 0x00]) + bytes(32) + b"Xing" + bytes([0, 0, 0, 1, 0, 0, 0, 9])
    path = tmp_path / "a.mp3"
    path.write_bytes(frame[:length])
    result = scan(manifest_of_paths(tmp_path, "a.mp3"), None, full=True)
    assert not result.ok.any() and result.reasons[0]
