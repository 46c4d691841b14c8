"""Windows out of a stream, against soundfile and soxr on the whole file, audio.read, and evaluation's own tiles."""
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr

from data.audio import AudioError, AudioInfo, fit, length_at, probe, read, tile_starts
from data.clips import Clips
from data.manifest import DataError, Manifest
from data.stream import GROUP, Windows, find_recordings, look, number_groups, safe, window_batches, windows_of


def noise(path, rate, frames, channels=1, seed=0, subtype="FLOAT"):
    wave = 0.2 * np.random.default_rng(seed).standard_normal((frames, channels))
    sf.write(path, wave, rate, subtype=subtype)
    return path


@pytest.mark.parametrize("rate, target", [(44100, 22050), (48000, 22050), (8000, 16000), (22050, 22050), (44101, 16000),
                                          (96000, 16000)])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("hop", [1.0, 0.37])
def test_windows_are_those_stretches_of_the_whole(tmp_path, rate, target, channels, hop):
    path = noise(tmp_path / "a.wav", rate, 5 * rate + 12345, channels)  # several blocks, and a bit
    cut = Windows(target, target, round(hop * target), "repeat")
    mono = sf.read(path, dtype="float32")[0].reshape(-1, channels).mean(axis=1)
    whole = soxr.resample(mono, rate, target, quality="HQ") if rate != target else mono
    found = list(windows_of(path, cut))
    starts = [start for start, _, _ in found]
    assert starts == tile_starts(cut.total(probe(path)), target, cut.hop)
    assert np.diff(starts).max() == cut.hop and abs(starts[-1] + target - len(whole)) <= 1
    assert found[-1][1] == min(starts[-1] + target, length_at(probe(path), target))
    for start, end, wave in found:
        assert wave.dtype == np.float32 and len(wave) == target
        np.testing.assert_allclose(wave[:end - start], whole[start:end], atol=1e-6)
        np.testing.assert_allclose(wave, fit(read(path, target, start, end - start), target, "repeat"), atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_the_tiles_of_evaluation(rate):
    frames = np.concatenate([np.arange(1, 60), np.random.default_rng(rate).integers(60, 300 * rate, 3000)])
    n, zeros = len(frames), np.zeros(len(frames), np.int32)
    manifest = Manifest("x", Path("/"), ["x"], ["x"] * n, zeros, zeros.astype(np.float32), np.full(n, np.nan, np.float32),
                        zeros, "", zeros.astype(np.int8), None, [], (frames / rate).astype(np.float32))
    clips, cut = Clips(manifest, 22050, 88200), Windows(22050, 88200, 88200, "repeat")
    for row, count in enumerate(frames.tolist()):
        info = AudioInfo(rate, count, 1, "")
        assert cut.total(info) == clips.total[row] and cut.starts(info) == clips.tiles(row)


def test_a_long_recording_is_cut_at_its_end_and_not_where_float32_puts_it():
    cut, info = Windows(22050, 88200, 88200, "repeat"), AudioInfo(48000, 48000 * 360000 + 777, 1, "")
    assert cut.total(info) - length_at(info, 22050) in (0, 1)
    assert abs(float(np.float32(info.seconds)) * 22050 - length_at(info, 22050)) > 100


@pytest.mark.parametrize("short", ["repeat", "pad"])
def test_a_short_recording(tmp_path, short):
    path = noise(tmp_path / "a.wav", 16000, 5000)
    (start, end, wave), = windows_of(path, Windows(16000, 16000, 16000, short))
    assert (start, end) == (0, 5000) and np.array_equal(wave, fit(read(path, 16000), 16000, short))
    assert wave[5000:].any() == (short == "repeat")


@pytest.mark.parametrize("name, subtype", [("a.mp3", "MPEG_LAYER_III"), ("a.ogg", "VORBIS"), ("a.flac", "PCM_16"),
                                           ("a.wav", "GSM610")])
def test_formats(tmp_path, name, subtype):
    path = noise(tmp_path / name, 16000, 100_000, subtype=subtype)
    found = list(windows_of(path, Windows(22050, 22050, 22050, "repeat")))
    whole = read(path, 22050)
    assert [end for _, end, _ in found][-1] == pytest.approx(len(whole), abs=1)
    for start, end, wave in found:
        np.testing.assert_allclose(wave[:end - start], whole[start:end], atol=1e-5)


def test_an_mp3_that_ends_before_its_header_says(tmp_path):
    data = noise(tmp_path / "b.mp3", 16000, 100_000, subtype="MPEG_LAYER_III").read_bytes()
    path = tmp_path / "a.mp3"
    path.write_bytes(data[:-300])
    cut = Windows(16000, 16000, 4000, "repeat")
    promised, found = cut.starts(probe(path)), list(windows_of(path, cut))
    assert [start for start, _, _ in found] == promised and found[-1][1] < cut.total(probe(path))
    for start, end, wave in found:
        assert len(wave) == 16000
        np.testing.assert_allclose(wave, fit(read(path, 16000, start, end - start), 16000, "repeat"), atol=1e-6)


def broken_flac(path, rate=16000):
    whole = noise(path, rate, 24 * rate, subtype="PCM_16").read_bytes()
    path.write_bytes(whole[:len(whole) * 2 // 3])
    return path


def test_a_file_that_breaks_on_the_way(tmp_path):
    windows = windows_of(broken_flac(tmp_path / "a.flac"), Windows(16000, 1000, 1000, "repeat"))
    got = 0
    with pytest.raises(AudioError, match="decoding fails|truncated"):
        for _ in windows:
            got += 1
    assert got > 10  # as much as was decoded
    with pytest.raises(AudioError, match="cannot be opened"):
        next(windows_of(tmp_path / "none.wav", Windows(16000, 1000, 1000, "repeat")))


# --- batches ---

CUT = Windows(8000, 4000, 4000, "repeat")


@pytest.fixture
def folder(tmp_path):
    """Recordings of 1 to 40 windows, one of them broken after some."""
    (tmp_path / "r").mkdir()
    for i, windows in enumerate([1, 3, 1, 40, 2, 1, 1, 5, 4, 1, 2, 7]):
        noise(tmp_path / "r" / f"{i:02d}.wav", 8000, 4000 * windows, seed=i)
    broken_flac(tmp_path / "r" / "01b.flac", 8000)
    (tmp_path / "r" / "02b.wav").write_text("no audio")
    return tmp_path / "r"


def planned(folder, size):
    recordings = find_recordings([str(folder)])
    look(recordings, CUT)
    good = [recording for recording in recordings if recording.reason is None]
    assert [os.path.basename(r.path) for r in recordings if r.reason] == ["02b.wav"]
    return list(zip(good, number_groups([r.windows for r in good], size), strict=True))


def held(batches):
    return [[(r.path, start, wave.tobytes()) for (r, start, _), wave in zip(batch.windows, batch.wave, strict=True)]
            for batch in batches]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_hold_every_window_once_and_in_order(folder, size):
    plan = planned(folder, size)
    batches = list(window_batches(plan, CUT, size, 1))
    assert all(len(batch.windows) <= size for batch in batches)
    found = [window for batch in held(batches) for window in batch if "01b" not in window[0]]
    assert [(path, start) for path, start, _ in found] == [
        (r.path, start) for r, _ in plan if "01b" not in r.path for start in CUT.starts(r.info)]
    for path, start, wave in found:
        assert wave == read(path, 8000, start, 4000).tobytes()
    ended = [(os.path.basename(r.path), reason) for batch in batches for r, reason in batch.ended]
    assert [name for name, _ in ended] == [os.path.basename(r.path) for r, _ in plan]
    assert [name for name, reason in ended if reason] == ["01b.flac"]
    if size == 3:  # windows of several recordings together
        assert any(len({r.path for r, _, _ in batch.windows}) > 1 for batch in batches)


@pytest.mark.parametrize("workers", [2, 5])
def test_batches_are_the_same_whatever_the_threads(folder, workers):
    plan = planned(folder, 3)
    assert held(window_batches(plan, CUT, 3, workers)) == held(window_batches(plan, CUT, 3, 1))


def test_batches_are_the_same_when_begun_at_a_later_group(folder):
    plan, size = planned(folder, 2), 2
    whole = held(window_batches(plan, CUT, size, 1))
    last = max(group for _, group in plan)
    assert last >= 3
    for first in range(1, last + 1):
        later = [(r, group) for r, group in plan if group >= first]
        names = {r.path for r, _ in later}
        assert held(window_batches(later, CUT, size, 1)) == [batch for batch in whole if batch[0][0] in names]


def test_groups():
    counts = [1, 3, 1, 40, 2, 1, 16, 1]
    assert GROUP == 8 and number_groups(counts, 2) == [0, 0, 0, 1, 2, 2, 3, 4]
    assert number_groups([], 2) == []


def test_a_stop_in_the_middle_ends_the_threads(folder):
    import threading
    batches = window_batches(planned(folder, 2), CUT, 2, 4)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


# --- what is found, and what results are called ---

def test_each_recording_once_by_its_path(tmp_path, monkeypatch):
    for name in ("b/x.wav", "b/c/x.wav", "a.flac", "b/readme.txt", "b/.hidden.wav", "odd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    found = find_recordings(["b", "b/c", "a.flac", "./b/x.wav", "odd"])
    assert [r.path for r in found] == ["a.flac", "b/c/x.wav", "b/x.wav", "odd"]
    assert [r.name for r in found] == ["a.flac", "b/c/x.wav", "b/x.wav", "odd"]
    assert [r.name for r in find_recordings(["b/"])] == ["c/x.wav", "x.wav"]
    assert [r.path for r in find_recordings([str(tmp_path)])] == [str(tmp_path / n) for n in ("a.flac", "b/c/x.wav", "b/x.wav")]
    with pytest.raises(DataError, match="nowhere"):
        find_recordings(["b", "nowhere"])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    with pytest.raises(DataError, match="no audio files.*1 x .txt"):
        find_recordings(["text"])


def test_names_of_results_are_safe_and_unique(tmp_path):
    names = ["plain.wav", "two\nlines.wav", "two_lines.wav", "tab\t.wav", "käfer.wav", "a:b.wav", "a*b.wav", "x" * 250 + ".wav",
             "x" * 249 + "y.wav", os.fsdecode(b"caf\xe9.wav"), os.fsdecode(b"caf\xe8.wav"), "caf_.wav", 'q"<>|?.wav',
             "white space.wav", "\u202eevil.wav"]
    names.append(safe("two\nlines.wav"))  # a file that is called like the safe name of another
    for top in ("one", "other"):
        (tmp_path / top).mkdir()
        for name in names:
            (tmp_path / top / name).touch()
    found = find_recordings([str(tmp_path / "one"), *(str(tmp_path / "other" / name) for name in names),
                             str(tmp_path / "one" / names[-1])])
    assert len(found) == 2 * len(names) == len({r.name for r in found}) == len({r.key for r in found})
    for recording in found:
        top, name = recording.name.split("/")
        assert top in ("one", "other") and name.isprintable() and len(name.encode()) <= 200 and not set(name) & set('\\:*?"<>|')
        assert recording.key.isalnum() and recording.key.isascii()
    plain = {r.name.split("/")[1] for r in found}
    assert {"plain.wav", "two_lines.wav", "käfer.wav", "white space.wav", "caf_.wav"} <= plain
