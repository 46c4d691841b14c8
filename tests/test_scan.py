"""data/scan.py on generated and broken files, with and without its index."""
import csv
import os
import signal
import struct
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import data.scan
from data.audio import AudioInfo
from data.load import load_manifest
from data.manifest import Manifest
from data.scan import codes, printable, scan, summary, unite, write_atomic, write_bad_files


def wav(path, seed=0, frames=800, rate=16000, channels=1):
    """A valid WAV of noise whose bytes follow from the seed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, (frames, channels)), rate, subtype="PCM_16")
    return path


def rows_of(folder, *paths, start=None, end=None):
    """A manifest of these paths, without a look at the disk."""
    n = len(paths)
    return Manifest(
        "made", Path(folder), ["a", "b"], list(paths), np.zeros(n, np.int32),
        np.zeros(n, np.float32) if start is None else np.array(start, np.float32),
        np.full(n, np.nan, np.float32) if end is None else np.array(end, np.float32),
        np.arange(n, dtype=np.int32), "each file alone", np.full(n, -1, np.int8), None, [])


def same(one, other):
    """The two scans found the same."""
    arrays = ("duration", "rate", "channels", "ok")
    return (all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
            and one.reasons == other.reasons and one.duplicates == other.duplicates)


@pytest.fixture
def folder(tmp_path):
    """Four good files, two of them the same, and their manifest's index beside them."""
    for name, seed in (("a/1", 1), ("a/2", 2), ("b/3", 3), ("b/copy of 1", 1)):
        wav(tmp_path / "data" / f"{name}.wav", seed)
    return tmp_path / "data"


def test_what_a_scan_finds(tmp_path):
    wav(tmp_path / "a.wav", frames=8000, rate=8000)
    wav(tmp_path / "b.wav", frames=11025, rate=22050, channels=2)
    wav(tmp_path / "c.wav", frames=100, rate=96000, channels=6)
    for full in (False, True):
        found = scan(rows_of(tmp_path, "a.wav", "b.wav", "c.wav"), None, full)
        assert found.duration.tolist() == [1.0, 0.5, np.float32(100 / 96000)] and found.duration.dtype == np.float32
        assert found.rate.tolist() == [8000, 22050, 96000] and found.rate.dtype == np.int32
        assert found.channels.tolist() == [1, 2, 6] and found.channels.dtype == np.int16
        assert found.ok.tolist() == [True] * 3 and found.ok.dtype == bool
        assert (found.reasons, found.duplicates, found.full, found.fresh, found.notes) == ({}, [], full, 3, [])
        assert found.seconds > 0


def broken_files(folder):
    """Files that cannot be used -> part of the reason; `deep` ones show only when decoded."""
    good = wav(folder / "good.wav", frames=4000).read_bytes()
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is no audio\n" * 20)
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    os.symlink("nowhere", folder / "dangling.wav")
    os.symlink("loop.wav", folder / "loop.wav")
    (folder / "header.wav").write_bytes(good[:44])
    sf.write(folder / "nan.wav", np.array([0, np.nan, 0.5]), 16000, subtype="FLOAT")
    sf.write(folder / "cut.flac", np.random.default_rng(0).uniform(-1, 1, 30000), 16000)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:20000])
    open(os.fsencode(folder) + b"/\xff\n.wav", "wb").close()
    shallow = {"empty.wav": "empty", "text.wav": "not readable", "folder.wav": "not a regular file",
               "pipe.wav": "not a regular file", "dangling.wav": "cannot be opened", "loop.wav": "cannot be opened",
               "header.wav": "no samples", "gone.wav": "cannot be opened", "\udcff\n.wav": "empty"}
    return shallow, {"nan.wav": "not finite", "cut.flac": ""}


@pytest.mark.parametrize("indexed", [False, True])
def test_broken_files_have_their_reasons(tmp_path, indexed):
    shallow, deep = broken_files(tmp_path)
    manifest = rows_of(tmp_path, "good.wav", *shallow, *deep)
    index = tmp_path / "cache/index" if indexed else None
    n = len(manifest)
    headers = scan(manifest, index, False)
    assert headers.ok.tolist() == [True] + [False] * len(shallow) + [True] * len(deep)
    full = scan(manifest, index, True)
    assert full.ok.tolist() == [True] + [False] * (n - 1) and full.fresh == n
    for row, (path, part) in enumerate({**shallow, **deep}.items(), 1):
        assert part in full.reasons[row] and full.reasons[row], path
        assert full.duration[row] == 0
    assert list(full.reasons) == list(range(1, n))
    if indexed:  # what decoding showed is not forgotten by a look at the headers; broken headers are tried again
        again = scan(manifest, index, False)
        assert same(again, full) and again.fresh == len(shallow)
        again = scan(manifest, index, True)
        assert same(again, full) and again.fresh == len(shallow) + len(deep)


def test_a_file_is_looked_at_once(tmp_path, monkeypatch):
    wav(tmp_path / "a.wav", frames=32000)
    looked = Counter()
    for name in ("probe", "check"):
        def counted(path, name=name, real=getattr(data.scan, name)):
            looked[name, path] += 1
            return real(path)
        monkeypatch.setattr(data.scan, name, counted)
    found = scan(rows_of(tmp_path, "a.wav", "a.wav", "a.wav", start=[0, 1, 0.5], end=[1, 2, 9]), None, True)
    assert list(looked.values()) == [1, 1] and found.fresh == 1
    assert found.duration.tolist() == [1, 1, 1.5] and found.duplicates == []


def test_clips_beyond_the_end_of_their_file(tmp_path):
    wav(tmp_path / "a.wav", frames=16000)
    manifest = rows_of(tmp_path, *["a.wav"] * 5, start=[0, 0.5, 1, 3, 0], end=[5, 1.01, 2, np.nan, np.nan])
    found = scan(manifest, None, False)
    assert found.ok.tolist() == [True, True, False, False, True]
    assert found.duration.tolist() == [1, 0.5, 0, 0, 1]
    assert found.reasons == {2: "the clip starts at 1 s, but the file ends at 1 s",
                             3: "the clip starts at 3 s, but the file ends at 1 s"}
    assert "1 clips end after their file does and are cut there" in summary(found, manifest)


# ---- copies

def test_copies_are_found_by_their_bytes(tmp_path):
    for name, seed, frames in (("a", 1, 50000), ("b", 1, 50000), ("c", 2, 50000), ("d", 3, 200), ("e", 3, 200),
                               ("f", 3, 201)):
        wav(tmp_path / f"{name}.wav", seed, frames)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[20000] ^= 1  # neither in the first, middle nor last piece
    (tmp_path / "near.wav").write_bytes(content)
    os.link(tmp_path / "d.wav", tmp_path / "hard.wav")
    os.symlink("d.wav", tmp_path / "soft.wav")
    for broken in ("x.wav", "y.wav"):
        (tmp_path / broken).write_text("no audio, twice")
    paths = ["near.wav", "b.wav", "a.wav", "e.wav", "x.wav", "a.wav", "f.wav", "hard.wav", "soft.wav", "y.wav", "c.wav"]
    manifest = rows_of(tmp_path, *paths, start=[0, 0, 0, 0, 0, 0.1, 0, 0, 0, 0, 0])
    for full in (False, True):
        found = scan(manifest, None, full)
        assert found.duplicates == [[1, 2, 5], [3, 7, 8]]  # every row of the files, but no file with itself
    assert any("3 files are byte-identical to another, e.g. b.wav = a.wav" in line for line in summary(found, manifest))
    assert all(type(row) is int for rows in found.duplicates for row in rows)


def test_only_alike_files_are_read_through(tmp_path, monkeypatch):
    read = []

    def sha256(name, real=data.scan._sha256):
        read.append(name)
        return real(name)

    monkeypatch.setattr(data.scan, "_sha256", sha256)
    paths = [wav(tmp_path / f"{i}.wav", seed=i // 2 if i < 4 else i).name for i in range(20)]
    assert scan(rows_of(tmp_path, *paths), None, False).duplicates == [[0, 1], [2, 3]]
    assert sorted(os.path.basename(name) for name in read) == ["0.wav", "1.wav", "2.wav", "3.wav"]


# ---- the index

def test_the_index_spares_opening(folder, tmp_path):
    manifest, index = load_manifest(folder), tmp_path / "new/cache/index"
    first = scan(manifest, index, False)
    assert first.fresh == 4 and first.duplicates == [[0, 3]] and os.listdir(index.parent) == ["index"]
    stamp = os.stat(index).st_mtime_ns
    second = scan(manifest, index, False)
    assert second.fresh == 0 and same(first, second) and os.stat(index).st_mtime_ns == stamp
    full = scan(manifest, index, True)
    assert full.fresh == 4 and full.full and same(first, full)
    assert scan(manifest, index, True).fresh == scan(manifest, index, False).fresh == 0
    part = scan(manifest.select([3, 1]), index, True)
    assert part.fresh == 0 and part.duplicates == []


def test_only_new_and_changed_files_are_opened(folder, tmp_path):
    index = tmp_path / "index"
    scan(load_manifest(folder), index, True)
    wav(folder / "b/new.wav", seed=2)  # a copy of a/2, made later
    found = scan(load_manifest(folder), index, True)
    assert found.fresh == 2 and found.duplicates == [[0, 3], [1, 4]]  # a/2's bytes had not been needed yet
    status = os.stat(folder / "a/1.wav")
    wav(folder / "a/1.wav", seed=9)  # as long as before
    os.utime(folder / "a/1.wav", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    found = scan(load_manifest(folder), index, True)
    assert found.fresh == 1 and found.duplicates == [[1, 4]]
    wav(folder / "a/1.wav", seed=9, frames=801)
    assert scan(load_manifest(folder), index, True).duration[0] == np.float32(801 / 16000)
    os.utime(folder / "b/3.wav", ns=(0, 0))
    scan(load_manifest(folder), index, True)
    for replaced in (wav(tmp_path / "other.wav", seed=10), None):  # another file, or a longer one; the time is the same
        if replaced:
            os.replace(replaced, folder / "b/3.wav")
        else:
            wav(folder / "b/3.wav", seed=10, frames=900)
        os.utime(folder / "b/3.wav", ns=(0, 0))
        assert scan(load_manifest(folder), index, True).fresh == 1
    os.link(folder / "b/3.wav", folder / "b/hard link.wav")  # inode numbers repeat on other disks, so a name counts
    assert scan(load_manifest(folder), index, True).fresh == 2  # and its fingerprint makes b/3's due
    os.remove(folder / "b/hard link.wav")
    (folder / "b/3.wav").write_text("now it is text")
    found = scan(load_manifest(folder), index, False)
    assert found.ok.tolist() == [True, True, False, True, True]
    wav(folder / "b/3.wav", seed=11)
    assert scan(load_manifest(folder), index, False).ok.all()


def test_the_index_serves_several_data_sets(folder, tmp_path, monkeypatch):
    wav(tmp_path / "more/1.wav", seed=1)
    index = tmp_path / "index"
    scan(load_manifest(folder), index, False)
    assert scan(rows_of(tmp_path / "more", "1.wav"), index, False).fresh == 1
    assert scan(load_manifest(folder), index, False).fresh == 0
    monkeypatch.setattr(data.scan, "INDEX_LIMIT", 2)
    wav(tmp_path / "more/2.wav", seed=2)
    scan(rows_of(tmp_path / "more", "1.wav", "2.wav"), index, False)
    assert scan(load_manifest(folder), index, False).fresh == 4  # the oldest are forgotten first
    monkeypatch.undo()
    assert scan(rows_of(tmp_path / "more", "1.wav", "2.wav"), index, False).fresh == 2


def test_a_damaged_index_is_made_anew(folder, tmp_path):
    manifest, index = load_manifest(folder), tmp_path / "index"
    plain = scan(manifest, index, False)
    good = index.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(120):
        bad = bytearray(good)
        if trial < 60:
            bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        elif trial < 110:
            bad = bad[:rng.integers(len(bad))]
        else:
            bad = rng.bytes(trial * 3)
        index.write_bytes(bad)
        found = scan(manifest, index, False)
        assert same(found, plain) and found.fresh == 4 and index.read_bytes() == good
    os.remove(index)
    os.symlink("nowhere", index)
    assert scan(manifest, index, False).fresh == 4 and scan(manifest, index, False).fresh == 0


def test_an_index_of_another_format_is_made_anew(folder, tmp_path):
    index = tmp_path / "index"
    scan(load_manifest(folder), index, False)
    body = index.read_bytes().split(b"\n", 1)[1]
    index.write_bytes(b"warble scan index 2\n" + body)
    assert scan(load_manifest(folder), index, False).fresh == 4
    assert scan(load_manifest(folder), index, False).fresh == 0


def test_reasons_and_digests_outlive_other_scans(folder, tmp_path, monkeypatch):
    wav(tmp_path / "more/1.wav", seed=1)
    sf.write(folder / "a/nan.wav", np.array([0, np.nan, 0.5]), 16000, subtype="FLOAT")
    manifest, other, index = load_manifest(folder), rows_of(tmp_path / "more", "1.wav"), tmp_path / "index"
    first = scan(manifest, index, True)
    assert list(first.reasons) == [2] and first.duplicates == [[0, 4]]
    scan(other, index, True)
    again = scan(manifest, index, False)
    assert again.fresh == 0 and same(first, again)
    monkeypatch.setattr(data.scan, "INDEX_LIMIT", 1)  # their facts are forgotten, and the texts with them
    wav(tmp_path / "more/2.wav", seed=2)
    scan(rows_of(tmp_path / "more", "2.wav"), index, True)
    assert b"not finite" not in index.read_bytes()


def test_a_scan_keeps_what_another_wrote_meanwhile(folder, tmp_path, monkeypatch):
    wav(tmp_path / "more/1.wav", seed=1)
    other, index = rows_of(tmp_path / "more", "1.wav"), tmp_path / "index"

    def look(*args, real=data.scan._look):
        monkeypatch.undo()
        scan(other, index, False)
        real(*args)

    monkeypatch.setattr(data.scan, "_look", look)
    assert scan(load_manifest(folder), index, False).fresh == 4
    assert scan(other, index, False).fresh == scan(load_manifest(folder), index, False).fresh == 0


def test_decoding_again_changes_the_reason_or_the_copies(folder, tmp_path, monkeypatch):
    manifest, index = load_manifest(folder), tmp_path / "index"
    plain = scan(manifest, index, False)  # finds the copies by their digests

    def check(path, real=data.scan.check):
        if path.endswith("a/1.wav"):
            raise data.scan.AudioError("a bad sector " + 200 * "x")
        return real(path)

    with monkeypatch.context() as broken:
        broken.setattr(data.scan, "check", check)
        assert scan(manifest, index, True).reasons == {0: "a bad sector " + 200 * "x"}
    found = scan(manifest, index, False)
    assert (found.fresh, found.reasons, found.duplicates) == (0, {0: "a bad sector " + 200 * "x"}, [])
    assert same(scan(manifest, index, True), plain)  # the sector is well again
    found = scan(manifest, index, False)
    assert found.fresh == 0 and same(found, plain)


def test_memory_of_a_scan(tmp_path, monkeypatch):
    n = 4000
    monkeypatch.setattr(data.scan, "probe", lambda path: AudioInfo(16000, 16000, 1, "made"))
    monkeypatch.setattr(data.scan, "PART", 1000)
    (tmp_path / ("long" * 30)).mkdir()  # paths are long; nothing may hold copies of all of them
    paths = [f"{'long' * 30}/{i}.wav" for i in range(n)]
    for i, path in enumerate(paths):
        with open(tmp_path / path, "wb") as file:
            file.truncate(i)  # no two are as long
    manifest, index = rows_of(tmp_path, *paths), tmp_path / "index"
    assert scan(manifest, index, False).fresh == n
    tracemalloc.start()
    assert scan(manifest, index, False).fresh == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / n < 170


def test_an_index_that_cannot_be_written_is_told(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    for index in (tmp_path / "file/index", tmp_path / "dir"):
        found = scan(load_manifest(folder), index, False)
        assert found.ok.all() and found.fresh == 4
        assert len(found.notes) == 1 and found.notes[0].startswith("the scan is not remembered")
        assert summary(found, load_manifest(folder))[-1] == printable(found.notes[0])
    assert sorted(os.listdir(tmp_path)) == ["data", "dir", "file"]


def test_scans_side_by_side(folder, tmp_path):
    manifest, index = load_manifest(folder), tmp_path / "index"
    plain, found = scan(manifest, None, True), []

    def work(n):
        for k in range(8):
            if k % 3 == n % 3:
                index.unlink(missing_ok=True)
            found.append(scan(manifest, index, full=k % 2 == 0))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 48 and all(same(one, plain) for one in found) and not any(one.notes for one in found)
    assert sorted(os.listdir(tmp_path)) in (["data"], ["data", "index"])
    scan(manifest, index, True)
    assert scan(manifest, index, True).fresh == 0


def test_an_interrupted_scan_keeps_what_it_saw(tmp_path, monkeypatch):
    paths = [wav(tmp_path / f"{i:02d}.wav", seed=i, frames=800 + i).name for i in range(60)]
    manifest, index, checked, sent = rows_of(tmp_path, *paths), tmp_path / "index", [], []

    def check(path, real=data.scan.check):
        checked.append(path)
        if len(checked) >= 25 and not sent:  # two threads may pass 25 together
            sent.append(True)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.01)
        return real(path)

    monkeypatch.setattr(data.scan, "check", check)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            scan(manifest, index, True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(checked) < 60  # nothing more was begun
    monkeypatch.undo()
    found = scan(manifest, index, True)
    assert found.ok.all() and found.fresh == 60 - len(checked)


def test_a_file_that_vanishes_meanwhile(folder, monkeypatch):
    def probe(path, real=data.scan.probe):
        info = real(path)
        if path.endswith("2.wav"):
            os.remove(path)
        return info

    monkeypatch.setattr(data.scan, "probe", probe)
    found = scan(load_manifest(folder), None, False)
    assert found.ok.tolist() == [True, False, True, True] and "No such file" in found.reasons[1]
    assert found.duplicates == [[0, 3]]


# ---- what is written and said

def test_bad_files_table(tmp_path):
    write_bad_files([], tmp_path / "run/bad_files.csv")
    assert (tmp_path / "run/bad_files.csv").read_text() == "path,reason\n"
    bad = [("a,b.wav", 'says "no"'), ("\udcff\n.wav", "empty"), ("a,b.wav", 'says "no"'), ["c.wav", "x"]]
    write_bad_files(bad, tmp_path / "run/bad_files.csv")
    with open(tmp_path / "run/bad_files.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file)) == [["path", "reason"], *map(list, bad[:2]), bad[3]]
    assert os.listdir(tmp_path / "run") == ["bad_files.csv"]


def test_summary(tmp_path):
    for i, (rate, frames, channels) in enumerate([(16000, 8000, 1), (16000, 32000, 2), (44100, 44100, 1)]):
        wav(tmp_path / f"{i}.wav", i, frames, rate, channels)
    (tmp_path / "3\n.wav").touch()
    manifest = rows_of(tmp_path, "0.wav", "1.wav", "2.wav", "3\n.wav", "4.wav", "5.wav", "6.wav")
    found = scan(manifest, None, False)
    lines = summary(found, manifest)
    assert lines[0].startswith("7 clips in 7 files, 0.00 h; 7 files opened in ") and found.files == 7
    twice = rows_of(tmp_path, "0.wav", "0.wav", "1.wav")
    assert summary(scan(twice, None, False), twice)[0].startswith("3 clips in 2 files")
    assert lines[1] == "length 0.50 / 1.00 / 2.00 s (shortest / median / longest)"
    assert lines[2] == "16000 Hz x 2, 44100 Hz x 1; 1 channel(s) x 2, 2 channel(s) x 1"
    assert lines[3].startswith("4 clips left out as broken: 3\\n.wav: empty") and lines[3].endswith("; ...")
    assert len(lines) == 4 and all(line.isprintable() for line in lines)
    nothing = rows_of(tmp_path, "4.wav", "5.wav")
    assert len(summary(scan(nothing, None, True), nothing)) == 2
    none = rows_of(tmp_path)
    assert summary(scan(none, tmp_path / "index", True), none)[0].startswith("0 clips in 0 files")


def test_a_header_that_promises_too_much(tmp_path):
    good = bytearray(wav(tmp_path / "a.wav", frames=4000).read_bytes())
    good[40:44] = struct.pack("<I", 2**32 - 9)
    (tmp_path / "a.wav").write_bytes(good)
    found = scan(rows_of(tmp_path, "a.wav"), None, True)
    assert found.duration[0] < 1  # broken, or as long as what is there


# ---- helpers

def test_unite():
    assert unite(np.array([0, 1, 2, 3]), np.array([0, 0, 1, 2])).tolist() == [0, 0, 1, 2]
    assert len(set(unite(np.array([0, 1, 1, 2, 5]), np.array([7, 7, 3, 3, 0])).tolist())) == 2
    assert unite(np.array([1, 0, 1, 2]), np.array([3, 0, 2, 1])).tolist() == [1, 0, 1, 2]
    rng = np.random.default_rng(1)
    for _ in range(50):
        one, other = rng.integers(0, 12, 15), rng.integers(0, 20, 15)
        sets = [{row} for row in range(15)]
        for column in (one, other):
            for value in set(column.tolist()):
                rows = set(np.flatnonzero(column == value).tolist())
                touched = [rows_of for rows_of in sets if rows_of & rows]
                sets = [rows_of for rows_of in sets if not rows_of & rows] + [set().union(*touched)]
        united = unite(one, other)
        assert {frozenset(np.flatnonzero(united == g).tolist()) for g in united} == set(map(frozenset, sets))


def test_codes_and_printable():
    assert codes(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2] and codes([]).dtype == np.int32
    assert printable("a\nb\udcff é\t") == "a\\nb\\udcff é\\t"


def test_write_atomic_permissions(tmp_path):
    write_atomic(tmp_path / "x", b"1")
    assert os.stat(tmp_path / "x").st_mode & 0o777 == 0o644


def test_real_recordings(esc10, tmp_path):
    manifest = load_manifest(esc10).select(slice(0, 400, 8))
    headers, full = scan(manifest, tmp_path / "index", False), scan(manifest, tmp_path / "index", True)
    assert headers.ok.all() and full.ok.all() and set(full.rate) == {44100} and full.duplicates == []
    assert 0 < full.duration.min() and full.duration.max() < 10
    assert scan(manifest, tmp_path / "index", True).fresh == 0
