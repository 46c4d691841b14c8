"""The index that lets the next scan open only new and changed files."""
import os
import threading
import tracemalloc

import numpy as np
import pytest
import soundfile as sf
from recordings import manifest_of_paths, same_scan, write_wav

import data.scan
from data import scan_index
from data.audio import AudioError, AudioInfo
from data.load import load_manifest
from data.scan import scan, summary
from util import printable


@pytest.fixture
def folder(tmp_path):
    """Class folders with four readable files, two of them the same."""
    for name, seed in (("a/1", 1), ("a/2", 2), ("b/3", 3), ("b/copy of 1", 1)):
        write_wav(tmp_path / "data" / f"{name}.wav", seed)
    return tmp_path / "data"


def test_known_files_are_not_opened(folder, tmp_path):
    manifest, index = load_manifest(folder), tmp_path / "new/cache/index"
    first = scan(manifest, index, False)
    assert first.n_opened == 4 and first.duplicates == [[0, 3]]
    assert os.listdir(index.parent) == ["index"]
    modified = os.stat(index).st_mtime_ns
    second = scan(manifest, index, False)
    assert second.n_opened == 0 and same_scan(first, second)
    assert os.stat(index).st_mtime_ns == modified
    full = scan(manifest, index, True)
    assert full.n_opened == 4 and full.full and same_scan(first, full)
    assert scan(manifest, index, True).n_opened == scan(manifest, index, False).n_opened == 0
    some = scan(manifest.select([3, 1]), index, True)
    assert some.n_opened == 0 and some.duplicates == []


def test_a_new_file_is_opened_and_so_is_its_original(folder, tmp_path):
    index = tmp_path / "index"
    scan(load_manifest(folder), index, True)
    write_wav(folder / "b/new.wav", seed=2)  # a copy of a/2.wav, whose digest was not needed yet
    result = scan(load_manifest(folder), index, True)
    assert result.n_opened == 2 and result.duplicates == [[0, 3], [1, 4]]


def test_changed_files_are_opened(folder, tmp_path):
    index = tmp_path / "index"
    scan(load_manifest(folder), index, True)
    status = os.stat(folder / "a/1.wav")
    write_wav(folder / "a/1.wav", seed=9)  # of the same length, but a little later
    os.utime(folder / "a/1.wav", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    result = scan(load_manifest(folder), index, True)
    assert result.n_opened == 1 and result.duplicates == []
    write_wav(folder / "a/1.wav", seed=9, frames=801)
    assert scan(load_manifest(folder), index, True).duration[0] == np.float32(801 / 16000)
    (folder / "b/3.wav").write_text("now it is text")
    result = scan(load_manifest(folder), index, False)
    assert result.ok.tolist() == [True, True, False, True]
    write_wav(folder / "b/3.wav", seed=11)
    assert scan(load_manifest(folder), index, False).ok.all()


def test_a_changed_file_with_an_unchanged_time_is_opened(folder, tmp_path):
    index, path = tmp_path / "index", folder / "b/3.wav"
    os.utime(path, ns=(0, 0))
    scan(load_manifest(folder), index, True)
    os.replace(write_wav(tmp_path / "other.wav", seed=10), path)  # another file of that size
    os.utime(path, ns=(0, 0))
    assert scan(load_manifest(folder), index, True).n_opened == 1
    write_wav(path, seed=10, frames=900)  # the same file with another size
    os.utime(path, ns=(0, 0))
    assert scan(load_manifest(folder), index, True).n_opened == 1
    # Inode numbers repeat on other disks, so another name is another file. Its fingerprint makes
    # the one of b/3.wav necessary.
    os.link(path, folder / "b/hard link.wav")
    assert scan(load_manifest(folder), index, True).n_opened == 2


def test_one_index_serves_several_data_sets(folder, tmp_path, monkeypatch):
    more = tmp_path / "more"
    write_wav(more / "1.wav", seed=1)
    index = tmp_path / "index"
    scan(load_manifest(folder), index, False)
    assert scan(manifest_of_paths(more, "1.wav"), index, False).n_opened == 1
    assert scan(load_manifest(folder), index, False).n_opened == 0
    monkeypatch.setattr(scan_index, "INDEX_LIMIT", 2)
    write_wav(more / "2.wav", seed=2)
    scan(manifest_of_paths(more, "1.wav", "2.wav"), index, False)
    assert scan(load_manifest(folder), index, False).n_opened == 4  # the oldest are dropped first
    monkeypatch.undo()
    assert scan(manifest_of_paths(more, "1.wav", "2.wav"), index, False).n_opened == 2


def test_a_damaged_index_is_replaced(folder, tmp_path):
    manifest, index = load_manifest(folder), tmp_path / "index"
    expected = scan(manifest, index, False)
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
        result = scan(manifest, index, False)
        assert same_scan(result, expected) and result.n_opened == 4
        assert index.read_bytes() == good
    os.remove(index)
    os.symlink("nowhere", index)
    assert scan(manifest, index, False).n_opened == 4
    assert scan(manifest, index, False).n_opened == 0


def test_an_index_of_another_format_is_replaced(folder, tmp_path):
    index = tmp_path / "index"
    scan(load_manifest(folder), index, False)
    body = index.read_bytes().split(b"\n", 1)[1]
    index.write_bytes(b"warble scan index 2\n" + body)
    assert scan(load_manifest(folder), index, False).n_opened == 4
    assert scan(load_manifest(folder), index, False).n_opened == 0


def test_reasons_and_digests_survive_other_scans(folder, tmp_path, monkeypatch):
    more = tmp_path / "more"
    write_wav(more / "1.wav", seed=1)
    write_wav(more / "2.wav", seed=2)
    sf.write(folder / "a/nan.wav", np.array([0, np.nan, 0.5]), 16000, subtype="FLOAT")
    manifest, index = load_manifest(folder), tmp_path / "index"
    first = scan(manifest, index, True)
    assert list(first.reasons) == [2] and first.duplicates == [[0, 4]]
    scan(manifest_of_paths(more, "1.wav"), index, True)
    again = scan(manifest, index, False)
    assert again.n_opened == 0 and same_scan(first, again)
    monkeypatch.setattr(scan_index, "INDEX_LIMIT", 1)  # dropped records take their texts with them
    scan(manifest_of_paths(more, "2.wav"), index, True)
    assert b"not finite" not in index.read_bytes()


def test_a_scan_keeps_what_another_one_wrote_meanwhile(folder, tmp_path, monkeypatch):
    write_wav(tmp_path / "more/1.wav", seed=1)
    manifest, index = manifest_of_paths(tmp_path / "more", "1.wav"), tmp_path / "index"
    real_inspect = data.scan._Files.inspect

    def inspect(files, full):
        monkeypatch.undo()
        scan(manifest, index, False)
        real_inspect(files, full)

    monkeypatch.setattr(data.scan._Files, "inspect", inspect)
    assert scan(load_manifest(folder), index, False).n_opened == 4
    assert scan(manifest, index, False).n_opened == 0
    assert scan(load_manifest(folder), index, False).n_opened == 0


def test_decoding_again_changes_reasons_and_duplicates(folder, tmp_path, monkeypatch):
    manifest, index = load_manifest(folder), tmp_path / "index"
    expected = scan(manifest, index, False)  # finds the duplicates by their digests
    real_check = data.scan.check
    reason = "a bad sector " + 200 * "x"

    def check(path):
        if path.endswith("a/1.wav"):
            raise AudioError(reason)
        return real_check(path)

    with monkeypatch.context() as broken:
        broken.setattr(data.scan, "check", check)
        assert scan(manifest, index, True).reasons == {0: reason}
    result = scan(manifest, index, False)
    assert (result.n_opened, result.reasons, result.duplicates) == (0, {0: reason}, [])
    assert same_scan(scan(manifest, index, True), expected)  # the sector is readable again
    result = scan(manifest, index, False)
    assert result.n_opened == 0 and same_scan(result, expected)


def test_memory_of_a_scan(tmp_path, monkeypatch):
    n = 4000
    monkeypatch.setattr(data.scan, "probe", lambda path: AudioInfo(16000, 16000, 1, "made"))
    monkeypatch.setattr(scan_index, "BLOCK", 1000)
    folder = "long" * 30  # long paths show whether anything copies all of them
    (tmp_path / folder).mkdir()
    paths = [f"{folder}/{i}.wav" for i in range(n)]
    for i, path in enumerate(paths):
        with open(tmp_path / path, "wb") as file:
            file.truncate(i)  # all sizes differ
    manifest, index = manifest_of_paths(tmp_path, *paths), tmp_path / "index"
    assert scan(manifest, index, False).n_opened == n
    tracemalloc.start()
    assert scan(manifest, index, False).n_opened == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / n < 170


def test_an_index_that_cannot_be_written_is_reported(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    for index in (tmp_path / "file/index", tmp_path / "dir"):
        result = scan(load_manifest(folder), index, False)
        assert result.ok.all() and result.n_opened == 4
        assert len(result.notes) == 1 and str(index) in result.notes[0]
        assert summary(result, load_manifest(folder))[-1] == printable(result.notes[0])
    assert sorted(os.listdir(tmp_path)) == ["data", "dir", "file"]


def test_scans_side_by_side(folder, tmp_path):
    manifest, index = load_manifest(folder), tmp_path / "index"
    expected = scan(manifest, None, True)
    results = []

    def work(n):
        for k in range(8):
            if k % 3 == n % 3:
                index.unlink(missing_ok=True)
            results.append(scan(manifest, index, full=k % 2 == 0))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 48
    assert all(same_scan(result, expected) and not result.notes for result in results)
    assert sorted(os.listdir(tmp_path)) in (["data"], ["data", "index"])
    scan(manifest, index, True)
    assert scan(manifest, index, True).n_opened == 0
