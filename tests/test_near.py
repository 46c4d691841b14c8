"""Copies in another format, rate or gain are found, stay in one split and are named."""
import numpy as np
import pytest
import soundfile as sf
import soxr
from recordings import make_manifest, manifest_of_paths

import data.scan
from data.audio import check
from data.near import connect, pairs_of_clips
from data.old_split import OldRun
from data.prepare import prepare
from data.scan import scan
from data.sound_print import PRINT, near_pairs, sound_print

RATE = 44100


def chirps(seed, seconds=3.0, rate=RATE):
    """Noise in bursts of changing colour."""
    rng = np.random.default_rng(seed)
    n = int(seconds * rate)
    times = np.arange(n) / rate
    wave = 0.02 * rng.standard_normal(n)
    for _ in range(8):
        begin, pitch = rng.uniform(0, seconds), rng.uniform(200, 3000)
        burst = np.exp(-((times - begin) / 0.1) ** 2)
        wave += 0.3 * burst * np.sin(2 * np.pi * pitch * times * (1 + 0.1 * times))
    return 0.5 * wave / np.abs(wave).max()


def write_copy(kind, wave, path):
    """Write the wave in another form. -> path."""
    rate, options = RATE, {}
    if kind == "22 kHz":
        wave, rate = soxr.resample(wave, RATE, 22050), 22050
    elif kind == "quiet":
        wave = wave / 2
    elif kind in ("30 ms later", "90 ms later"):
        wave = np.concatenate([np.zeros(RATE * int(kind[:2]) // 1000), wave])
    suffix = {"flac": ".flac", "ogg": ".ogg", "mp3": ".mp3", "aiff": ".aiff"}.get(kind, ".wav")
    path = path.with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, wave, rate, **options)
    if kind == "list chunk":
        content = bytearray(path.read_bytes())
        content += b"LIST\x0c\0\0\0INFOICMT\0\0\0\0"
        content[4:8] = (len(content) - 8).to_bytes(4, "little")
        path.write_bytes(content)
    return path


KINDS = ["list chunk", "aiff", "flac", "ogg", "mp3", "22 kHz", "quiet",
         "30 ms later", "90 ms later"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_another_form_is_near_identical(kind, tmp_path):
    first = write_copy("wav", chirps(1), tmp_path / "first").name
    other = write_copy("wav", chirps(2), tmp_path / "other").name
    copy = write_copy(kind, chirps(1), tmp_path / "copy").name
    manifest = manifest_of_paths(tmp_path, first, other, copy)
    result = scan(manifest, None, True)
    assert result.duplicates == []
    assert result.near.tolist() == [[0, 2]] and result.copies == [[0, 2]]


def test_control_takes_of_noise_hum_and_silence_are_not_copies():
    rng = np.random.default_rng(0)
    times = np.arange(5 * 8000) / 8000
    takes = [0.1 * rng.standard_normal(len(times)) for _ in range(40)]
    takes += [np.cumsum(rng.standard_normal(len(times))) for _ in range(40)]
    for _ in range(40):  # a hum with its harmonics under a little noise
        hum = sum(np.sin(2 * np.pi * 50 * k * times + rng.uniform(0, 6)) / k for k in range(1, 9))
        takes.append(hum + 0.01 * rng.standard_normal(len(times)))
    takes += [np.zeros(len(times)) for _ in range(5)]
    takes += [np.sin(2 * np.pi * 440 * times) for _ in range(5)]
    prints = np.array([sound_print(take.astype(np.float32), 8000) for take in takes])
    assert near_pairs(prints, np.full(len(takes), 5.0)).tolist() == []
    again = np.concatenate([prints[:80], prints[:80]])  # the same takes of noise are
    assert near_pairs(again, np.full(160, 5.0)).tolist() == [[i, i + 80] for i in range(80)]


def test_recordings_of_another_length_are_no_copies():
    prints = np.array([sound_print(chirps(1).astype(np.float32), RATE)] * 2)
    assert len(near_pairs(prints, np.array([3.0, 3.1]))) == 1
    assert len(near_pairs(prints, np.array([3.0, 4.0]))) == 0


@pytest.mark.parametrize("rate", [1, 4000, 8000, 96000, 2_000_000_000])
def test_any_rate_and_level_gives_a_print(rate):
    for wave in (np.zeros(0), np.ones(5), 1e10 * chirps(1, 0.3), 1e-40 * chirps(1, 0.3)):
        with np.errstate(all="raise", under="ignore"):
            assert sound_print(wave.astype(np.float32), rate).dtype == PRINT


def test_a_second_scan_finds_the_pairs_without_opening_a_file(tmp_path):
    names = [write_copy(kind, chirps(1), tmp_path / f"clip {kind}").name for kind in KINDS]
    manifest, index = manifest_of_paths(tmp_path, *names), tmp_path / "index"
    first = scan(manifest, index, True)
    second = scan(manifest, index, False)
    assert second.n_opened == 0 and len(first.near) >= len(KINDS) - 1
    assert first.near.tolist() == second.near.tolist()
    assert first.copies == second.copies == [list(range(len(KINDS)))]


def test_a_file_that_changed_loses_its_print(tmp_path):
    names = [write_copy(kind, chirps(1), tmp_path / kind).name for kind in ("wav", "flac")]
    manifest, index = manifest_of_paths(tmp_path, *names), tmp_path / "index"
    assert len(scan(manifest, index, True).near) == 1
    write_copy("flac", chirps(2), tmp_path / "flac")
    assert len(scan(manifest, index, False).near) == 0
    assert len(scan(manifest, index, True).near) == 0


def test_sets_are_connected():
    pairs = np.array([[5, 3], [9, 8], [3, 1]])
    assert sorted(connect(pairs, [[8, 20], [30, 31]])) == [[1, 3, 5], [8, 9, 20], [30, 31]]


def test_only_the_same_stretch_of_copies_is_a_pair():
    manifest = make_manifest(["a", "b", "a", "b"], paths=["x", "x", "y", "y"], start=[0, 2, 0, 2])
    pairs = pairs_of_clips(manifest, np.array([0, 0, 1, 1]), np.array([[0, 1]]))
    assert pairs.tolist() == [[0, 2], [1, 3]]


def data_with_copies(folder):
    """20 recordings of 2 classes; 0 to 5 of class a again as MP3, 0 as FLAC in class b."""
    for i in range(20):
        write_copy("wav", chirps(i, 1.5), folder / "ab"[i % 2] / f"{i:02d}")
    for i in range(0, 12, 2):
        write_copy("mp3", chirps(i, 1.5), folder / "a" / f"again {i:02d}")
    write_copy("flac", chirps(0, 1.5), folder / "b" / "wrong")


def test_copies_share_a_split_and_are_named(tmp_path):
    data_with_copies(tmp_path / "data")
    for seed in range(3):
        lines = []
        manifest, _ = prepare(tmp_path / "data", cache_dir=tmp_path / "cache", seed=seed,
                              log=lines.append)
        split = dict(zip(manifest.paths, manifest.split.tolist()))
        for i in range(0, 12, 2):
            assert split[f"a/{i:02d}.wav"] == split[f"a/again {i:02d}.mp3"]
        assert split["b/wrong.flac"] == split["a/00.wav"]
        text = "\n".join(lines)
        assert "8 pairs of clips, 2 of them across classes" in text
        assert "b/wrong.flac (b)" in text
        assert sum("near-identical clips with two labels" in line for line in lines) == 1


def test_control_copies_leak_if_they_are_not_looked_for(tmp_path, monkeypatch):
    data_with_copies(tmp_path / "data")
    monkeypatch.setattr(data.scan, "near_pairs", lambda *_: np.zeros((0, 2), np.int64))
    n_divided = 0
    for seed in range(3):
        manifest, _ = prepare(tmp_path / "data", cache_dir=tmp_path / "cache", seed=seed,
                              log=lambda _: None)
        split = dict(zip(manifest.paths, manifest.split.tolist()))
        n_divided += sum(split[f"a/{i:02d}.wav"] != split[f"a/again {i:02d}.mp3"]
                         for i in range(0, 12, 2))
    assert n_divided > 0


def test_a_split_of_the_data_that_divides_copies_is_a_leak(tmp_path):
    data_with_copies(tmp_path / "data")
    rows = ["path,label,split"]
    for path in sorted((tmp_path / "data").rglob("*.*")):
        name = path.relative_to(tmp_path / "data").as_posix()
        split = "test" if "again" in name or name in ("b/01.wav", "b/03.wav") else "train"
        rows.append(f"{name},{name[0]},{split}")
    (tmp_path / "data/clips.csv").write_text("\n".join(rows) + "\n")
    lines = []
    prepare(tmp_path / "data/clips.csv", cache_dir=tmp_path / "cache", log=lines.append)
    leak = [line for line in lines if "LEAK" in line and "in two splits" in line]
    assert len(leak) == 1 and "near-identical" in leak[0]


def test_a_scan_of_headers_says_what_it_did_not_check(tmp_path):
    data_with_copies(tmp_path / "data")
    lines = []
    prepare(tmp_path / "data", cache_dir=tmp_path / "cache", scan_mode="headers",
            log=lines.append)
    assert any("not checked" in line and "--scan full" in line for line in lines)


def test_silence_has_no_print(tmp_path):
    sf.write(tmp_path / "silence.wav", np.zeros(RATE), RATE)
    assert check(tmp_path / "silence.wav").sound == b""


def test_an_older_split_that_divides_copies_can_still_be_extended(tmp_path):
    def split_of_run(**options):
        return prepare(tmp_path / "data", cache_dir=tmp_path / "cache", log=lines.append,
                       **options)[0]

    lines = []
    for i in range(20):
        write_copy("wav", chirps(i, 1.5), tmp_path / "data" / "ab"[i % 2] / f"{i:02d}")
    manifest = split_of_run()
    trained, tested = (manifest.paths[manifest.rows(split)[0]] for split in ("train", "test"))
    for path, gain in ((trained, 1), (tested, 0.5)):  # one sound in both splits
        write_copy("wav", gain * chirps(99, 1.5), tmp_path / "data" / path)
    split = dict(zip(manifest.paths, manifest.split.tolist()))
    grown = split_of_run(old=OldRun("--split-from run", manifest, True))
    after = dict(zip(grown.paths, grown.split.tolist()))
    assert {path: after[path] for path in split} == split
    assert any("LEAK" in line and "near-identical" in line for line in lines)
