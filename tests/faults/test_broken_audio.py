"""Broken audio files, and files that change after the scan.

They are reported with a reason and left out, and nothing replaces them.
"""
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import tone

import data.prepare
from data.audio import AudioError, check, read
from data.cache import WaveCache
from data.clips import Clips, CropKey, TileKey, TrainLoader, evaluation_batches
from data.manifest import DataError
from data.scan import write_bad_files

RATE = 16000


def prepare(folder, log=None, **options):
    """(manifest, bad files) of a folder. log: a list that receives the lines of the log."""
    lines = [] if log is None else log
    return data.prepare.prepare(folder, log=lines.append, **options)


@pytest.fixture(autouse=True)
def fail_if_a_pipe_blocks(tmp_path):
    """After 20 s, open every FIFO for writing, so that a blocked reader goes on; then fail."""
    blocked, done = [], threading.Event()

    def unblock(pipe):
        blocked.append(pipe)
        try:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads it at the moment
            pass
        else:
            done.wait(0.2)

    def watch():
        while not done.wait(0 if blocked else 20):
            for path in tmp_path.rglob("*.wav"):
                if path.is_fifo():
                    unblock(path)

    watchdog = threading.Thread(target=watch)
    watchdog.start()
    yield
    done.set()
    watchdog.join()
    assert not blocked, "the test waited for a pipe"


def write_noise(path, seconds=0.3, seed=0, channels=1, rate=RATE, **options):
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, (int(seconds * rate), channels))
    sf.write(path, wave, rate, **options)
    return path


def load(clips, key):
    """((samples,), None) of a clip, or (None, reason)."""
    batch = clips.batch([key])
    if batch.broken:
        return None, batch.broken[0][1]
    return batch.wave[0].numpy(), None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of 20 valid files. The scan index goes to tmp_path, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for c, name in enumerate("ab"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            write_noise(tmp_path / "data" / name / f"{name}{i:02d}.wav", seed=100 * c + i)
    return tmp_path / "data"


VALID_PATHS = [f"{name}/{name}{i:02d}.wav" for name in "ab" for i in range(20)]


# --- broken files ---

def write_header_field(path, offset, layout, value, **options):
    """Write a valid WAV file and replace one field of its header."""
    content = bytearray(write_noise(path, **options).read_bytes())
    struct.pack_into(layout, content, offset, value)
    path.write_bytes(content)


def write_sample(path, value):
    """Write a float WAV file with this value as one of its samples."""
    wave = tone(0.3)
    wave[1000] = value
    sf.write(path, wave, RATE, subtype="FLOAT")


def write_truncated(path, share, **options):
    content = write_noise(path, seconds=1, **options).read_bytes()
    path.write_bytes(content[:int(share * len(content))])


def write_flac_of_2_to_31(path):
    """The header declares 2^31 frames, in 36 bits that start in the middle of byte 21."""
    content = bytearray(write_noise(path, format="FLAC").read_bytes())
    content[21] &= 0xF0
    content[22:26] = (2**31).to_bytes(4, "big")
    path.write_bytes(content)


def write_text(path):
    path.write_text("hello, I am not audio\n" * 50)


# kind -> (file name, function that writes it, part of the reason)
BROKEN = {
    "zero bytes": ("x.wav", Path.touch, "empty file"),
    "NaN": ("x.wav", lambda path: write_sample(path, np.nan), "not finite"),
    "infinity": ("x.wav", lambda path: write_sample(path, np.inf), "not finite"),
    "minus infinity": ("x.wav", lambda path: write_sample(path, -np.inf), "not finite"),
    "1e30": ("x.wav", lambda path: write_sample(path, 1e30), "has a sample of 1e+30"),
    "0 Hz": ("x.wav", lambda path: write_header_field(path, 24, "<I", 0), ""),
    "0 channels": ("x.wav", lambda path: write_header_field(path, 22, "<H", 0), ""),
    "text": ("x.wav", write_text, "not readable as audio"),
    "text called MP3": ("x.mp3", write_text, "not readable as audio"),
    "dangling link": ("x.wav", lambda path: path.symlink_to("nowhere.wav"), "cannot be opened"),
    "FIFO": ("x.wav", os.mkfifo, "not a regular file"),
    "no UTF-8 in the name": ("\udce9.wav", write_text, "not readable as audio"),
}


# kind -> (file name, function that writes it, seconds that decode)
TRUNCATED = {
    "truncated WAV": ("x.wav", lambda path: write_truncated(path, 0.5), 0.5),
    "truncated float WAV":
        ("x.wav", lambda path: write_truncated(path, 0.9, subtype="FLOAT"), 0.9),
    "truncated AIFF": ("x.aiff", lambda path: write_truncated(path, 0.5), 0.5),
    "truncated FLAC": ("x.flac", lambda path: write_truncated(path, 0.5), 0.5),
    "truncated MP3": ("x.mp3", lambda path: write_truncated(path, 0.5), 0.5),
    "2^31 bytes declared":
        ("x.wav", lambda path: write_header_field(path, 40, "<I", 2**31), 0.3),
    "2^31 frames of 16 bits":
        ("x.wav", lambda path: write_header_field(path, 40, "<I", 2**32 - 2), 0.3),
    "2^31 frames in a FLAC": ("x.flac", write_flac_of_2_to_31, 0.3),
}


@pytest.mark.parametrize("kind", TRUNCATED)
def test_the_sound_part_of_a_truncated_file_is_used_and_marked(folder, kind):
    name, write, seconds = TRUNCATED[kind]
    path = folder / "a" / name
    write(path)
    log = []
    manifest, bad = prepare(folder, log)
    assert bad == []
    row = manifest.paths.index(f"a/{name}")
    assert manifest.duration[row] == pytest.approx(seconds, abs=0.26)
    [line] = [line for line in log if "truncated" in line]
    assert "1 clip" in line and name in line
    assert any(name in note for note in manifest.notes)  # in run.json
    clips = Clips(manifest, RATE, 1600)
    for start in clips.tiles(row):
        assert load(clips, TileKey(row, start))[1] is None
    wave, expected = read(path, RATE), sf.read(write_noise(path.with_name("y.wav"), seconds=1))[0]
    if path.suffix not in (".mp3", ".aiff") and seconds != 0.9:
        assert np.abs(wave - expected[:len(wave)]).max() < 1e-4 or seconds == 0.3

    path.with_name("y.wav").unlink()
    manifest, bad = prepare(folder, truncated="refuse")
    assert [path for path, _ in bad] == [f"a/{name}"]
    assert "truncated" in bad[0][1]
    assert sorted(manifest.paths) == VALID_PATHS


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_reported_left_out_and_counted(folder, tmp_path, kind):
    name, write, words = BROKEN[kind]
    write(folder / "a" / name)
    log = []
    manifest, bad = prepare(folder, log)
    [(path, reason)] = bad
    assert path == f"a/{name}"
    assert reason.strip()
    assert words in reason
    assert "\n" not in reason

    used_rows = np.concatenate([manifest.rows(split) for split in ("train", "val", "test")])
    assert sorted(manifest.paths[row] for row in used_rows) == VALID_PATHS
    [line] = [line for line in log if reason in line]
    assert "1 unreadable clip" in line
    assert "\udce9" not in line
    write_bad_files(bad, tmp_path / "bad_files.csv")
    assert os.fsencode(f"a/{name},") in (tmp_path / "bad_files.csv").read_bytes()
    with pytest.raises(AudioError):  # nor can it be read in any other way
        read(folder / "a" / name, RATE)


# --- unusual files that are valid ---

def test_a_valid_file_whose_name_is_not_utf8_is_used(folder):
    write_noise(folder / "a/x.wav", seed=999).rename(folder / "a/\udce9.wav")
    assert b"\xe9.wav" in os.listdir(os.fsencode(folder / "a"))
    log = []
    manifest, bad = prepare(folder, log)
    assert bad == []
    assert not any("left out" in line for line in log)
    row = manifest.paths.index("a/\udce9.wav")
    assert [row in manifest.rows(split) for split in ("train", "val", "test")].count(True) == 1
    wave, reason = load(Clips(manifest, RATE, 4800), TileKey(row, 0))
    assert reason is None
    expected = sf.read(os.fsencode(folder) + b"/a/\xe9.wav", dtype="float32")[0]
    assert np.array_equal(wave, expected)


def test_64_channels_are_averaged(folder):
    write_noise(folder / "a/x.wav", channels=64, seed=999, subtype="FLOAT")
    manifest, bad = prepare(folder)
    assert bad == []
    row = manifest.paths.index("a/x.wav")
    wave, reason = load(Clips(manifest, RATE, 4800), TileKey(row, 0))
    assert reason is None
    assert np.abs(wave - sf.read(folder / "a/x.wav")[0].mean(axis=1)).max() < 1e-6


def test_a_wav_from_a_pipe_is_complete(folder):
    """ffmpeg and others write a length of 2^32 - 1 if they cannot seek back to correct it."""
    write_header_field(folder / "a/x.wav", 40, "<I", 2**32 - 1, seed=999)
    assert check(folder / "a/x.wav").frames == 4800
    manifest, bad = prepare(folder)
    assert bad == []
    assert manifest.duration[manifest.paths.index("a/x.wav")] == np.float32(0.3)


def test_too_many_broken_files_are_refused(folder):
    for name in ("x1.wav", "x2.wav", "x3.wav"):
        (folder / "b" / name).write_text("not audio")
    with pytest.raises(DataError) as caught:
        prepare(folder)
    message = str(caught.value)
    assert "3 of 43" in message
    assert "b/x1.wav" in message
    assert "--max-bad-share" in message
    assert "\n" not in message
    with pytest.raises(DataError):
        prepare(folder, max_bad_share=2.9 / 43)
    manifest, bad = prepare(folder, max_bad_share=3 / 43)
    assert len(bad) == 3
    assert len(manifest) == 40


# --- files that change between the scan and their use ---

def replace_by_nan(path):
    wave = sf.read(path)[0]
    sf.write(path, np.full_like(wave, np.nan), RATE, subtype="FLOAT")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere.wav")


CHANGES = {
    "deleted": Path.unlink,
    "text": lambda path: path.write_text("not audio any more\n" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "NaN": replace_by_nan,
    "pipe": replace_by_pipe,
    "folder": replace_by_folder,
    "dangling link": replace_by_dangling_link,
    "shorter than a tile's end": lambda path: write_noise(path, seconds=0.12, seed=7),
    "very short": lambda path: write_noise(path, seconds=0.05, seed=7),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("change, workers", [*((change, 0) for change in CHANGES), ("deleted", 2)])
def test_a_file_that_changes_is_reported_and_not_replaced(
    folder, change, workers, cached, tmp_path
):
    manifest, bad = prepare(folder)
    assert bad == []
    cache = WaveCache(tmp_path / "audio", RATE) if cached else None
    clips = Clips(manifest, RATE, 3200, seed=5, cache=cache)
    rows = np.arange(len(manifest))
    tile_keys = [TileKey(row, start) for row in rows for start in clips.tiles(row)]
    assert len(tile_keys) == 2 * len(rows)
    crops = {row: load(clips, CropKey(row, epoch=0))[0] for row in rows}
    tiles = {key: load(clips, key)[0] for key in tile_keys}
    victim = 7
    CHANGES[change](manifest.root / manifest.paths[victim])

    wave, reason = load(clips, CropKey(victim, epoch=0))
    assert wave is None
    assert reason

    steps = TrainLoader(clips, rows, 4, 8, seed=5, workers=workers).steps(0)
    batches = [batch for micro_batches in steps for batch in micro_batches]
    [(row, reason)] = [pair for batch in batches for pair in batch.broken]
    assert row == victim
    assert reason.strip()
    # The other clips are as before, with their own labels, and nothing fills the gap.
    others = [row for row in rows if row != victim]
    assert sorted(row for batch in batches for row in batch.rows) == others
    for batch in batches:
        assert len(batch.wave) == len(batch.rows) == len(batch.target)
        assert batch.target.tolist() == manifest.labels[batch.rows].tolist()
        for row, wave in zip(batch.rows, batch.wave.numpy()):
            assert np.array_equal(wave, crops[row])

    batches = list(evaluation_batches(clips, rows, 4, workers=workers))
    broken = [pair for batch in batches for pair in batch.broken]
    assert [row for row, _ in broken] == [victim, victim]
    assert all(reason.strip() for _, reason in broken)
    expected = [(key.row, wave) for key, wave in tiles.items() if key.row != victim]
    loaded = [pair for batch in batches for pair in zip(batch.rows, batch.wave.numpy())]
    assert [row for row, _ in loaded] == [row for row, _ in expected]
    for (_, wave), (_, expected_wave) in zip(loaded, expected):
        assert np.array_equal(wave, expected_wave)


def test_a_batch_of_deleted_files_is_empty(folder):
    manifest, _ = prepare(folder)
    clips = Clips(manifest, RATE, 3200)
    for row in range(4):
        (manifest.root / manifest.paths[row]).unlink()
    [batch] = evaluation_batches(clips, range(4), 8)
    assert batch.wave.shape == (0, 3200)
    assert len(batch.rows) == len(batch.target) == 0
    assert [row for row, _ in batch.broken] == [0, 0, 1, 1, 2, 2, 3, 3]
