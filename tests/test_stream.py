"""Windows of a stream, against soundfile and soxr on the whole file, audio.read and evaluation."""
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr

from data.audio import AudioError, AudioInfo, fit, length_at, probe, read, tile_starts
from data.clips import Clips
from data.manifest import DataError, Manifest
from data.stream import (
    BATCHES_PER_GROUP,
    Windows,
    find_recordings,
    number_groups,
    read_headers,
    read_windows,
    safe_name,
    window_batches,
)


def write_noise(path, rate, frames, channels=1, seed=0, subtype="FLOAT"):
    wave = 0.2 * np.random.default_rng(seed).standard_normal((frames, channels))
    sf.write(path, wave, rate, subtype=subtype)
    return path


def write_truncated_flac(path, rate=16000):
    content = write_noise(path, rate, 24 * rate, subtype="PCM_16").read_bytes()
    path.write_bytes(content[:len(content) * 2 // 3])
    return path


@pytest.mark.parametrize("rate, target", [
    (44100, 22050), (48000, 22050), (8000, 16000), (22050, 22050), (44101, 16000), (96000, 16000),
])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("hop", [1.0, 0.37])
def test_windows_are_ranges_of_the_whole_recording(tmp_path, rate, target, channels, hop):
    path = write_noise(tmp_path / "a.wav", rate, 5 * rate + 12345, channels)  # several blocks
    windows = Windows(target, target, round(hop * target), "repeat")
    whole = sf.read(path, dtype="float32")[0].reshape(-1, channels).mean(axis=1)
    if rate != target:
        whole = soxr.resample(whole, rate, target, quality="HQ")
    found = list(read_windows(path, windows))
    starts = [start for start, _, _ in found]
    assert starts == tile_starts(windows.total(probe(path)), target, windows.hop)
    assert np.diff(starts).max() == windows.hop
    assert abs(starts[-1] + target - len(whole)) <= 1
    assert found[-1][1] == min(starts[-1] + target, length_at(probe(path), target))
    for start, end, wave in found:
        assert wave.dtype == np.float32
        assert len(wave) == target
        np.testing.assert_allclose(wave[:end - start], whole[start:end], atol=1e-6)
        clip = fit(read(path, target, start, end - start), target, "repeat")
        np.testing.assert_allclose(wave, clip, atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_windows_start_like_the_tiles_of_evaluation(rate):
    random_lengths = np.random.default_rng(rate).integers(60, 300 * rate, 3000)
    frames = np.concatenate([np.arange(1, 60), random_lengths])
    n = len(frames)
    zeros = np.zeros(n, np.int32)
    manifest = Manifest(
        name="x",
        root=Path("/"),
        classes=["x"],
        paths=["x"] * n,
        labels=zeros,
        start=zeros.astype(np.float32),
        end=np.full(n, np.nan, np.float32),
        group=zeros,
        group_source="",
        split=zeros.astype(np.int8),
        fold=None,
        notes=[],
        duration=(frames / rate).astype(np.float32),
    )
    clips, windows = Clips(manifest, 22050, 88200), Windows(22050, 88200, 88200, "repeat")
    for row, count in enumerate(frames.tolist()):
        info = AudioInfo(rate, count, 1, "")
        assert windows.total(info) == clips.total[row]
        assert windows.starts(info) == clips.tiles(row)


def test_a_very_long_recording_ends_at_its_end_and_not_where_float32_rounds():
    windows = Windows(22050, 88200, 88200, "repeat")
    info = AudioInfo(48000, 48000 * 360000 + 777, 1, "")
    exact = length_at(info, 22050)
    assert windows.total(info) - exact in (0, 1)
    assert abs(float(np.float32(info.seconds)) * 22050 - exact) > 100


@pytest.mark.parametrize("short", ["repeat", "pad", "place"])
def test_a_recording_shorter_than_a_window(tmp_path, short):
    path = write_noise(tmp_path / "a.wav", 16000, 5000)
    [(start, end, wave)] = read_windows(path, Windows(16000, 16000, 16000, short))
    assert (start, end) == (0, 5000)
    assert np.array_equal(wave, fit(read(path, 16000), 16000, short))
    assert wave[11000:].any() == (short == "repeat")
    assert wave[:5000].all() == (short != "place")


@pytest.mark.parametrize("name, subtype", [
    ("a.mp3", "MPEG_LAYER_III"), ("a.ogg", "VORBIS"), ("a.flac", "PCM_16"), ("a.wav", "GSM610"),
])
def test_formats(tmp_path, name, subtype):
    path = write_noise(tmp_path / name, 16000, 100_000, subtype=subtype)
    found = list(read_windows(path, Windows(22050, 22050, 22050, "repeat")))
    whole = read(path, 22050)
    assert found[-1][1] == pytest.approx(len(whole), abs=1)
    for start, end, wave in found:
        np.testing.assert_allclose(wave[:end - start], whole[start:end], atol=1e-5)


def test_an_mp3_that_is_shorter_than_its_header_says(tmp_path):
    path = write_noise(tmp_path / "a.mp3", 16000, 100_000, subtype="MPEG_LAYER_III")
    path.write_bytes(path.read_bytes()[:-300])
    windows = Windows(16000, 16000, 4000, "repeat")
    found = list(read_windows(path, windows))
    assert [start for start, _, _ in found] == windows.starts(probe(path))
    assert found[-1][1] < windows.total(probe(path))
    for start, end, wave in found:
        clip = fit(read(path, 16000, start, end - start), 16000, "repeat")
        np.testing.assert_allclose(wave, clip, atol=1e-6)


def test_a_truncated_recording_gives_its_first_windows(tmp_path):
    path = write_truncated_flac(tmp_path / "a.flac")
    n_windows = 0
    with pytest.raises(AudioError, match=r"decoding fails|truncated"):
        for _ in read_windows(path, Windows(16000, 1000, 1000, "repeat")):
            n_windows += 1
    assert n_windows > 10


def test_a_missing_recording_raises(tmp_path):
    with pytest.raises(AudioError, match="cannot be opened"):
        next(read_windows(tmp_path / "none.wav", Windows(16000, 1000, 1000, "repeat")))


# --- batches ---

WINDOWS = Windows(8000, 4000, 4000, "repeat")


@pytest.fixture
def folder(tmp_path):
    """Recordings of 1 to 40 windows. 01b.flac is truncated, 02b.wav is not audio."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i, n_windows in enumerate([1, 3, 1, 40, 2, 1, 1, 5, 4, 1, 2, 7]):
        write_noise(folder / f"{i:02d}.wav", 8000, 4000 * n_windows, seed=i)
    write_truncated_flac(folder / "01b.flac", 8000)
    (folder / "02b.wav").write_text("no audio")
    return folder


def grouped_recordings(folder, size):
    """(recording, group) of all recordings with a valid header."""
    recordings = find_recordings([str(folder)])
    read_headers(recordings, WINDOWS)
    broken = [os.path.basename(r.path) for r in recordings if r.reason]
    assert broken == ["02b.wav"]
    valid = [r for r in recordings if r.reason is None]
    return list(zip(valid, number_groups([r.windows for r in valid], size)))


def contents(batches):
    """(path, start, samples as bytes) of each window of each batch."""
    return [
        [(r.path, start, wave.tobytes()) for (r, start, _), wave in zip(batch.windows, batch.wave)]
        for batch in batches
    ]


def is_truncated(path):
    return os.path.basename(path) == "01b.flac"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_have_every_window_once_and_in_order(folder, size):
    recordings = grouped_recordings(folder, size)
    batches = list(window_batches(recordings, WINDOWS, size, 1))
    assert all(len(batch.windows) <= size for batch in batches)
    found = [w for batch in contents(batches) for w in batch if not is_truncated(w[0])]
    expected = []
    for recording, _ in recordings:
        if not is_truncated(recording.path):
            expected += [(recording.path, start) for start in WINDOWS.starts(recording.info)]
    assert [(path, start) for path, start, _ in found] == expected
    for path, start, samples in found:
        assert samples == read(path, 8000, start, 4000).tobytes()
    if size == 3:
        assert any(len({r.path for r, _, _ in batch.windows}) > 1 for batch in batches)


def test_batches_tell_which_recordings_ended_and_which_are_broken(folder):
    recordings = grouped_recordings(folder, 2)
    ended = []
    for batch in window_batches(recordings, WINDOWS, 2, 1):
        ended += [(recording.path, reason) for recording, reason in batch.ended]
    assert [path for path, _ in ended] == [recording.path for recording, _ in recordings]
    assert not any(reason for _, reason in ended)
    assert [r.name for r, _ in recordings if r.truncated] == ["01b.flac"]  # its beginning is used


@pytest.mark.parametrize("workers", [2, 5])
def test_batches_do_not_depend_on_the_number_of_threads(folder, workers):
    recordings = grouped_recordings(folder, 3)
    expected = contents(window_batches(recordings, WINDOWS, 3, 1))
    assert contents(window_batches(recordings, WINDOWS, 3, workers)) == expected


def test_batches_are_the_same_from_a_later_group_on(folder):
    size = 2
    recordings = grouped_recordings(folder, size)
    all_batches = contents(window_batches(recordings, WINDOWS, size, 1))
    last_group = max(group for _, group in recordings)
    assert last_group >= 3
    for first in range(1, last_group + 1):
        later = [(recording, group) for recording, group in recordings if group >= first]
        paths = {recording.path for recording, _ in later}
        expected = [batch for batch in all_batches if batch[0][0] in paths]
        assert contents(window_batches(later, WINDOWS, size, 1)) == expected


def test_number_groups():
    assert BATCHES_PER_GROUP == 8
    assert number_groups([1, 3, 1, 40, 2, 1, 16, 1], 2) == [0, 0, 0, 1, 2, 2, 3, 4]
    assert number_groups([], 2) == []


def test_closing_the_batches_early_ends_the_threads(folder):
    batches = window_batches(grouped_recordings(folder, 2), WINDOWS, 2, 4)
    next(batches)
    batches.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("ThreadPoolExecutor")]


# --- recordings and the names of their results ---

def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_each_recording_is_found_once_by_its_path(tmp_path, monkeypatch):
    for name in ("b/x.wav", "b/c/x.wav", "a.flac", "b/readme.txt", "b/.hidden.wav", "odd"):
        touch(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    recordings = find_recordings(["b", "b/c", "a.flac", "./b/x.wav", "odd"])
    assert [r.path for r in recordings] == ["a.flac", "b/c/x.wav", "b/x.wav", "odd"]
    assert [r.name for r in recordings] == ["a.flac", "b/c/x.wav", "b/x.wav", "odd"]
    assert [r.name for r in find_recordings(["b/"])] == ["c/x.wav", "x.wav"]
    expected = [str(tmp_path / name) for name in ("a.flac", "b/c/x.wav", "b/x.wav")]
    assert [r.path for r in find_recordings([str(tmp_path)])] == expected


def test_inputs_without_recordings_are_refused(tmp_path, monkeypatch):
    touch(tmp_path / "b" / "x.wav")
    touch(tmp_path / "text" / "a.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        find_recordings(["b", "nowhere"])
    with pytest.raises(DataError, match=r"no audio files.*1 x \.txt"):
        find_recordings(["text"])


def test_names_of_results_are_safe_and_unique(tmp_path):
    names = [
        "plain.wav", "two\nlines.wav", "two_lines.wav", "tab\t.wav", "käfer.wav", "a:b.wav",
        "a*b.wav", "x" * 250 + ".wav", "x" * 249 + "y.wav", os.fsdecode(b"caf\xe9.wav"),
        os.fsdecode(b"caf\xe8.wav"), "caf_.wav", 'q"<>|?.wav', "white space.wav", "\u202eevil.wav",
        safe_name("two\nlines.wav"),  # the safe name of another file
    ]
    for folder in ("one", "other"):
        for name in names:
            touch(tmp_path / folder / name)
    inputs = [tmp_path / "one"]
    inputs += [tmp_path / "other" / name for name in names]
    inputs += [tmp_path / "one" / names[-1]]  # a second time
    recordings = find_recordings([str(path) for path in inputs])
    assert len(recordings) == 2 * len(names)
    assert len({r.name for r in recordings}) == len(recordings)
    assert len({r.key for r in recordings}) == len(recordings)
    for recording in recordings:
        folder, name = recording.name.split("/")
        assert folder in ("one", "other")
        assert name.isprintable()
        assert len(name.encode()) <= 200
        assert not set(name) & set('\\:*?"<>|')
        assert recording.key.isalnum()
        assert recording.key.isascii()
    unchanged = {"plain.wav", "two_lines.wav", "käfer.wav", "white space.wav", "caf_.wav"}
    assert unchanged <= {r.name.split("/")[1] for r in recordings}
