"""Files whose names in the table are not quite those on the disk."""
import unicodedata

import numpy as np
import pytest
from recordings import assert_not_loaded, touch, write_table, write_wav

from data.load import load_manifest
from data.manifest import DataError
from data.prepare import prepare


def load(folder, first, second, *args):
    return load_manifest(write_table(folder, f"path,label\n{first},x\n{second},y\n"), *args)


@pytest.mark.parametrize("files, texts", [
    (["64760.wav", "1.wav"], ["64760", "1"]),
    (["a.flac", "b.flac"], ["a.wav", "b.wav"]),
    (["a.WAV", "B.wav"], ["a.wav", "b.wav"]),
    (["x/a.wav", "y/b.wav"], ["x\\a.wav", "y\\b.wav"]),
    (["1.5 m.wav", "2.wav"], ["1.5 m", "2"]),  # the dot is not of a suffix
    (["Blaü.wav", "b.wav"], [unicodedata.normalize("NFD", "Blaü.wav"), "b.wav"]),
    ([unicodedata.normalize("NFD", "Blaü.wav"), "b.wav"], ["Blaü.wav", "b.wav"]),
])
def test_names_that_differ_a_little(tmp_path, files, texts):
    touch(tmp_path, *files)
    manifest = load(tmp_path, *texts)
    assert manifest.paths == sorted(files)
    assert sum("files are found" in note for note in manifest.notes) == 1


def test_an_exact_name_wins_and_a_doubtful_one_is_missing(tmp_path):
    touch(tmp_path, "a.wav", "a.flac", "A.wav", "b.wav")
    assert load(tmp_path, "a.wav", "b.wav").paths == ["a.wav", "b.wav"]
    touch(tmp_path, "c.flac", "c.mp3", "d.flac", "d.mp3")
    assert_not_loaded("row 2: c.wav is not in", "fix the paths",
                      write_table(tmp_path, "path,label\nc.wav,x\nd.wav,y\n"))


@pytest.mark.parametrize("texts", [
    ("a.wav", "b.wav"), ("C:\\data\\s1\\a.wav", "C:\\data\\s2\\b.wav"),
    ("/home/me/a.wav", "/home/me/b.wav"), ("a", "b")])
def test_files_anywhere_below_audio_dir(tmp_path, texts):
    touch(tmp_path, "store/s1/deep/a.wav", "store/s2/b.wav")
    assert load(tmp_path, *texts, tmp_path / "store").paths == ["s1/deep/a.wav", "s2/b.wav"]


def test_folders_decide_between_equal_names(tmp_path):
    touch(tmp_path, "store/q/s1/a.wav", "store/q/s2/a.wav")
    manifest = load(tmp_path, "D:\\old\\s1\\a.wav", "D:\\old\\s2\\a.wav", tmp_path / "store")
    assert manifest.paths == ["q/s1/a.wav", "q/s2/a.wav"]
    assert [manifest.classes[c] for c in manifest.labels] == ["x", "y"]
    table = write_table(tmp_path, "path,label\na.wav,x\nz/a.wav,y\n")
    assert_not_loaded("is not in", "--audio-dir", table, tmp_path / "store")  # either may be meant


def test_path_is_a_folder_beside_filename(tmp_path):
    touch(tmp_path, "s1/a.wav", "s2/a.wav")
    text = "path,filename,label\ns1,a.wav,x\ns2,a.wav,y\n"
    manifest = load_manifest(write_table(tmp_path, text))
    assert manifest.paths == ["s1/a.wav", "s2/a.wav"]
    manifest = load_manifest(write_table(tmp_path, text.replace("path,", "Folder,")))
    assert manifest.paths == ["s1/a.wav", "s2/a.wav"]


def write_recordings(folder, n):
    for i in range(n):
        write_wav(folder / f"{i:02d}.wav", seed=i)
    return "path,label\n" + "".join(f"{i:02d}.wav,{'xy'[i % 2]}\n" for i in range(n))


def test_a_few_missing_files_are_left_out(tmp_path):
    table = write_table(tmp_path, write_recordings(tmp_path, 40) + "gone.wav,x\n")
    lines = []
    manifest, bad = prepare(table, cache_dir=tmp_path / "cache", log=lines.append)
    assert len(manifest) == 40 and [path for path, _ in bad] == ["gone.wav"]
    assert any("missing: the files of 1 of 41 rows, gone.wav" in line for line in lines)
    table = write_table(tmp_path, table.read_text() + "gone2.wav,x\ngone3.wav,y\n")
    with pytest.raises(DataError, match="3 of 43 clips cannot be read, more than --max-bad-share"):
        prepare(table, cache_dir=tmp_path / "cache", log=lines.append)


@pytest.mark.parametrize("factor, fix", [
    (1000, "call the columns start_ms and end_ms"), (16000, "divide them by the sampling rate"),
    (77, "times must be seconds")])
def test_times_in_another_unit_are_refused(tmp_path, factor, fix):
    write_recordings(tmp_path, 8)
    edges = np.array([0.01, 0.04]) * factor  # of files of 0.05 s
    rows = "".join(f"{i:02d}.wav,{'xy'[i % 2]},{edges[0]},{edges[1]}\n" for i in range(8))
    table = write_table(tmp_path, f"path,label,start,end\n{rows}")
    with pytest.raises(DataError, match=fix):
        prepare(table, cache_dir=tmp_path / "cache", log=print)


def test_control_times_in_seconds_pass(tmp_path):
    write_recordings(tmp_path, 8)
    rows = "".join(f"{i:02d}.wav,{'xy'[i % 2]},0.01,0.06\n" for i in range(8))
    table = write_table(tmp_path, f"path,label,start,end\n{rows}")
    manifest, _ = prepare(table, cache_dir=tmp_path / "cache", log=print)
    assert manifest.duration == pytest.approx([0.04] * 8)
