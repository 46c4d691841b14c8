"""Broken audio, and audio that changes after the scan: named with a reason, left out, never replaced.

The fuzzer's own controls come first, then each kind of broken file through `prepare`, then files that change
between the scan and their use.
"""
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import data.prepare
from conftest import tone
from data.audio import AudioError, check, read
from data.cache import WaveCache
from data.clips import Clips, TrainLoader, evaluation_batches
from data.manifest import DataError
from data.scan import write_bad_files

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_audio  # noqa: E402

RATE = 16000


@pytest.fixture(autouse=True)
def nobody_waits_for_a_pipe(tmp_path):
    """Who waits for a FIFO is let go after 20 s, so that the test ends, and fails."""
    waited, over = [], threading.Event()

    def let_go():
        while not over.wait(0 if waited else 20):
            for pipe in filter(Path.is_fifo, tmp_path.rglob("*.wav")):
                waited.append(pipe)
                try:
                    os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
                except OSError:  # nobody waits just now
                    continue
            over.wait(0.2)

    watch = threading.Thread(target=let_go)
    watch.start()
    yield
    over.set()
    watch.join()
    assert not waited, "something waited for a pipe"


# ---- the fuzzer and its controls

def fuzzed(count, **options):
    """Table and failures of a run that says nothing, and what it would have said."""
    said = []
    table, failures = fuzz_audio.fuzz(count, say=said.append, **options)
    return table, failures, said


def outcomes(table):
    return {name: sum(found[name] for found in table.values()) for name in fuzz_audio.OUTCOMES}


def no_failure(count, seed):
    table, failures, said = fuzzed(count, seed=seed)
    assert not failures, "\n".join(said) + "\n" + fuzz_audio.as_text(table)
    found = outcomes(table)
    assert sum(found.values()) == found["accepted"] + found["refused"] == count
    assert min(found["accepted"], found["refused"]) > count / 5, found  # neither everything nor nothing
    return table


def test_a_few_hundred_mutants():
    no_failure(400, seed=1)


@pytest.mark.long
def test_ten_thousand_mutants():
    table = no_failure(10000, seed=0)
    for name, found in table.items():  # every format is got through, and damage is seen in every one
        assert found["accepted"] and found["refused"], name


def test_every_original_is_read_as_what_it_is(tmp_path):
    for name in fuzz_audio.ORIGINALS:
        path = tmp_path / ("a" + fuzz_audio.ORIGINALS[name][0])
        content = fuzz_audio.original(name)
        path.write_bytes(content)
        answer = fuzz_audio.project(path)
        assert fuzz_audio.wrong(answer, content, path) == "", name
        assert len(answer["whole"]) > 3000 and answer["whole"].std() > 0.03, name


def test_mutants_follow_from_seed_and_index():
    files = {name: fuzz_audio.original(name) for name in fuzz_audio.ORIGINALS}
    time.sleep(1.1)  # some headers hold the time
    again = {name: fuzz_audio.original(name) for name in fuzz_audio.ORIGINALS}
    assert files == again
    made = [fuzz_audio.mutant(0, index, files) for index in range(300)]
    assert made == [fuzz_audio.mutant(0, index, again) for index in range(300)]
    assert made != [fuzz_audio.mutant(1, index, files) for index in range(300)]
    assert {kind for _, kinds, _, _ in made for kind in kinds.split("+")} == {*fuzz_audio.KINDS, "sealed"}
    changed = sum(content != files[name] for name, _, _, content in made)
    assert changed > 285


def test_the_checksum_of_ogg_pages(tmp_path):
    content = noise(tmp_path / "a.ogg", seconds=1).read_bytes()
    assert fuzz_audio.seal_ogg(content) == content  # as libogg wrote them
    bare = bytearray(content)
    bare[22:26] = bytes(4)
    assert fuzz_audio.seal_ogg(bare) == content


@pytest.mark.parametrize("reader, outcome, words", [
    ("silence", "wrong", "soundfile"), ("neighbour", "wrong", "soundfile"), ("muted", "wrong", "silence"),
    ("padded", "wrong", "samples, where soundfile finds"), ("shifted", "wrong", "piece"),
    ("aborter", "crashes", "SIGABRT"), ("greedy", "errors", "MemoryError"), ("leaky", "errors", "RuntimeError")])
def test_a_reader_without_its_protection_fails(reader, outcome, words):
    table, failures, said = fuzzed(16, seed=3, reader=f"fuzz_audio:{reader}")
    found = outcomes(table)
    assert len(failures) == found[outcome] > 2, found
    assert sum(found.values()) == 16  # it goes on after each
    assert any(words in why for *_, why in failures), failures
    for index, *_ in failures:
        assert any(f"--seed 3 --only {index}:" in line for line in said)


def test_a_failure_is_made_again_by_its_number():
    _, failures, _ = fuzzed(16, seed=3, reader="fuzz_audio:leaky")
    for failure in (failures[0], failures[-1]):
        assert fuzzed(0, seed=3, reader="fuzz_audio:leaky", only=[failure[0]])[1] == [failure]


def test_the_command_line():
    def run(*flags):
        return subprocess.run([sys.executable, fuzz_audio.HERE, "--seed", "3", *flags], capture_output=True, text=True)
    good, bad = run("--count", "20"), run("--count", "20", "--reader", "fuzz_audio:leaky")
    assert (good.returncode, bad.returncode) == (0, 1)
    assert good.stdout.splitlines()[1].split() == ["format", "mutants", *fuzz_audio.OUTCOMES]
    assert good.stdout.splitlines()[-2].split()[:2] == ["all", "20"] and "FAIL --seed 3 --only" in bad.stdout


def test_a_reader_that_hangs_fails():
    table, failures, _ = fuzzed(6, seed=3, reader="fuzz_audio:sleeper", watchdog=1)
    assert outcomes(table)["hangs"] == len(failures) > 1 and sum(outcomes(table).values()) == 6


# ---- broken files through prepare

def noise(path, seconds=0.3, seed=0, channels=1, rate=RATE, **how):
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, (int(seconds * rate), channels))
    sf.write(path, wave, rate, **how)
    return path


def heard(clips, row, start=0):
    """(samples,) of one clip or None, and why not."""
    batch = clips.batch([(row, start)])
    return (None, batch.broken[0][1]) if batch.broken else (batch.wave[0].numpy(), None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of 20 good files; the scan's memory is kept away from the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for c, name in enumerate(("a", "b")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            noise(tmp_path / "data" / name / f"{name}{i:02d}.wav", seed=100 * c + i)
    return tmp_path / "data"


def wav_with(path, at, layout, value, **how):
    """A good file with one header field replaced."""
    content = bytearray(noise(path, **how).read_bytes())
    struct.pack_into(layout, content, at, value)
    path.write_bytes(content)


def floats(path, value):
    wave = tone(0.3)
    wave[1000] = value
    sf.write(path, wave, RATE, subtype="FLOAT")


def cut(path, share, **how):
    content = noise(path, seconds=1, **how).read_bytes()
    path.write_bytes(content[:int(share * len(content))])


def flac_of_2_to_31(path):
    """The header says 2^31 frames, in 36 bits that start in the middle of byte 21."""
    content = bytearray(noise(path, format="FLAC").read_bytes())
    content[21] &= 0xF0
    content[22:26] = (2**31).to_bytes(4, "big")
    path.write_bytes(content)


# Kind of damage -> (file name, what makes it, part of the reason).
BROKEN = {
    "zero bytes": ("x.wav", lambda path: path.touch(), "empty file"),
    "truncated WAV": ("x.wav", lambda path: cut(path, 0.5), "truncated: 15978 of 32000 promised bytes"),
    "truncated float WAV": ("x.wav", lambda path: cut(path, 0.9, subtype="FLOAT"), "truncated"),
    "truncated AIFF": ("x.aiff", lambda path: cut(path, 0.5), "truncated"),
    "truncated FLAC": ("x.flac", lambda path: cut(path, 0.5), "decoding fails"),
    "truncated MP3": ("x.mp3", lambda path: cut(path, 0.5), "truncated"),
    "2^31 bytes promised": ("x.wav", lambda path: wav_with(path, 40, "<I", 2**31), "truncated"),
    "2^31 frames of 16 bits": ("x.wav", lambda path: wav_with(path, 40, "<I", 2**32 - 2), "truncated"),
    "2^31 frames in a FLAC": ("x.flac", flac_of_2_to_31, "decoding fails"),
    "NaN": ("x.wav", lambda path: floats(path, np.nan), "not finite"),
    "infinity": ("x.wav", lambda path: floats(path, np.inf), "not finite"),
    "minus infinity": ("x.wav", lambda path: floats(path, -np.inf), "not finite"),
    "1e30": ("x.wav", lambda path: floats(path, 1e30), "has a sample of 1e+30"),
    "0 Hz": ("x.wav", lambda path: wav_with(path, 24, "<I", 0), ""),
    "0 channels": ("x.wav", lambda path: wav_with(path, 22, "<H", 0), ""),
    "text": ("x.wav", lambda path: path.write_text("hello, I am not audio\n" * 50), "not readable as audio"),
    "text called MP3": ("x.mp3", lambda path: path.write_text("hello, I am not audio\n" * 50), "not readable as audio"),
    "directory": ("x.wav", lambda path: path.mkdir(), "not a regular file"),
    "dangling link": ("x.wav", lambda path: path.symlink_to("nowhere.wav"), "cannot be opened"),
    "FIFO": ("x.wav", lambda path: os.mkfifo(path), "not a regular file"),
    "no UTF-8 in the name": ("\udce9.wav", lambda path: path.write_text("not audio"), "not readable as audio"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_listed_left_out_and_counted(folder, tmp_path, kind):
    name, make, words = BROKEN[kind]
    make(folder / "a" / name)
    said = []
    manifest, bad = data.prepare.prepare(folder, log=said.append)
    assert [path for path, _ in bad] == [f"a/{name}"] and bad[0][1].strip() and words in bad[0][1], bad
    assert "\n" not in bad[0][1]
    rows = np.concatenate([manifest.rows(split) for split in ("train", "val", "test")])
    assert sorted(manifest.paths[row] for row in rows) == sorted(
        f"{c}/{c}{i:02d}.wav" for c in "ab" for i in range(20))  # every good one, and only those
    told = [line for line in said if "left out: 1 unreadable clip:" in line]
    assert len(told) == 1 and bad[0][1] in told[0] and "\udce9" not in told[0]
    write_bad_files(bad, tmp_path / "bad_files.csv")
    assert os.fsencode(f"a/{name},") in (tmp_path / "bad_files.csv").read_bytes()
    with pytest.raises(AudioError):  # whoever reads it all the same gets no samples
        read(folder / "a" / name, RATE)


def test_a_good_file_whose_name_is_not_utf8_is_used(folder):
    noise(folder / "a/x.wav", seed=999).rename(folder / "a/\udce9.wav")
    assert b"\xe9.wav" in os.listdir(os.fsencode(folder / "a"))
    said = []
    manifest, bad = data.prepare.prepare(folder, log=said.append)
    assert bad == [] and not any("broken" in line for line in said)
    row = manifest.paths.index("a/\udce9.wav")
    assert sum(row in manifest.rows(split) for split in ("train", "val", "test")) == 1
    wave, reason = heard(Clips(manifest, RATE, 4800), row)
    want = sf.read(os.fsencode(folder) + b"/a/\xe9.wav", dtype="float32")[0]
    assert reason is None and np.array_equal(wave, want)


def test_64_channels_are_used_as_their_mean(folder):
    noise(folder / "a/x.wav", channels=64, seed=999, subtype="FLOAT")
    manifest, bad = data.prepare.prepare(folder, log=lambda line: None)
    assert bad == []
    wave, reason = heard(Clips(manifest, RATE, 4800), manifest.paths.index("a/x.wav"))
    want = sf.read(folder / "a/x.wav")[0].mean(axis=1)
    assert reason is None and np.abs(wave - want).max() < 1e-6


def test_a_wav_from_a_pipe_is_whole(folder):
    """ffmpeg and others leave 2^32 - 1 for a length that they could not go back to write."""
    wav_with(folder / "a/x.wav", 40, "<I", 2**32 - 1, seed=999)
    assert check(folder / "a/x.wav").frames == 4800
    manifest, bad = data.prepare.prepare(folder, log=lambda line: None)
    assert bad == [] and manifest.duration[manifest.paths.index("a/x.wav")] == np.float32(0.3)


@pytest.mark.parametrize("name", ["WAV GSM610", "WAV G721_32", "WAV NMS_ADPCM_24", "AU G723_24"])
def test_codings_that_cannot_seek_are_read_anywhere(tmp_path, name):
    path = tmp_path / "a.wav"
    path.write_bytes(fuzz_audio.original(name))
    assert not sf.SoundFile(path).seekable()
    whole = sf.read(path, dtype="float32")[0]
    np.testing.assert_array_equal(read(path, 8000, 2000, 1500), whole[2000:3500])


def test_above_the_stated_share_it_refuses_and_names_the_first(folder):
    for name in ("x1.wav", "x2.wav", "x3.wav"):
        (folder / "b" / name).write_text("not audio")
    with pytest.raises(DataError) as caught:
        data.prepare.prepare(folder, log=lambda line: None)
    message = str(caught.value)
    assert "3 of 43 clips cannot be read" in message and "b/x1.wav: not readable as audio" in message
    assert "--max-bad-share 0.05" in message and "\n" not in message
    manifest, bad = data.prepare.prepare(folder, max_bad_share=3 / 43, log=lambda line: None)
    assert len(bad) == 3 and len(manifest) == 40
    with pytest.raises(DataError):
        data.prepare.prepare(folder, max_bad_share=2.9 / 43, log=lambda line: None)


# ---- between the scan and the use

def vanish(path):
    path.unlink()


def become_text(path):
    path.write_text("not audio any more\n" * 100)


def become_empty(path):
    path.write_bytes(b"")


def become_cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def become_nan(path):
    wave = sf.read(path)[0]
    wave[:] = np.nan
    sf.write(path, wave, RATE, subtype="FLOAT")


def become_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def become_a_folder(path):
    path.unlink()
    path.mkdir()


def become_a_lost_link(path):
    path.unlink()
    path.symlink_to("nowhere.wav")


def become_shorter(path):
    noise(path, seconds=0.12, seed=7)


def become_a_blip(path):
    noise(path, seconds=0.05, seed=7)


CHANGES = [vanish, become_text, become_empty, become_cut, become_nan, become_a_pipe, become_a_folder, become_a_lost_link,
           become_shorter, become_a_blip]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("change, workers", [*((change, 0) for change in CHANGES), (vanish, 2)])
def test_a_file_that_changes_is_named_and_not_replaced(folder, change, workers, cached, tmp_path):
    samples = 3200
    manifest, bad = data.prepare.prepare(folder, log=lambda line: None)
    assert bad == []
    clips = Clips(manifest, RATE, samples, seed=5, cache=WaveCache(tmp_path / "audio", RATE) if cached else None)
    rows = np.arange(len(manifest))
    victim = 7
    crops = {row: heard(clips, row, -1)[0] for row in rows}  # as they are before anything changes
    tiles = {(row, start): heard(clips, row, start)[0] for row in rows for start in clips.tiles(row)}
    assert all(len(clips.tiles(row)) == 2 for row in rows)
    change(manifest.root / manifest.paths[victim])

    wave, reason = heard(clips, victim, -1)
    assert wave is None and reason
    batches = [batch for window in TrainLoader(clips, rows, 4, 8, seed=5, workers=workers).windows(0) for batch in window]
    broken = [pair for batch in batches for pair in batch.broken]
    assert [row for row, _ in broken] == [victim] and broken[0][1].strip()
    assert sorted(row for batch in batches for row in batch.rows) == [row for row in rows if row != victim]
    for batch in batches:  # the others sound as before, under their own labels, and nothing fills the gap
        assert len(batch.wave) == len(batch.rows) == len(batch.target)
        assert batch.target.tolist() == manifest.labels[batch.rows].tolist()
        for row, wave in zip(batch.rows, batch.wave.numpy(), strict=True):
            assert np.array_equal(wave, crops[row])

    batches = list(evaluation_batches(clips, rows, 4, workers=workers))
    broken = [pair for batch in batches for pair in batch.broken]
    assert [row for row, _ in broken] == [victim] * 2 and all(reason.strip() for _, reason in broken)
    pairs = [(row, wave) for batch in batches for row, wave in zip(batch.rows, batch.wave.numpy(), strict=True)]
    left = [(key, wave) for key, wave in tiles.items() if key[0] != victim]
    assert [row for row, _ in pairs] == [row for (row, _), _ in left]
    assert all(np.array_equal(wave, want) for (_, wave), (_, want) in zip(pairs, left, strict=True))


def test_a_batch_of_nothing_but_lost_files(folder):
    manifest, _ = data.prepare.prepare(folder, log=lambda line: None)
    clips = Clips(manifest, RATE, 3200)
    for row in range(4):
        vanish(manifest.root / manifest.paths[row])
    batch = next(iter(evaluation_batches(clips, range(4), 8)))
    assert batch.wave.shape == (0, 3200) and len(batch.rows) == len(batch.target) == 0
    assert [row for row, _ in batch.broken] == [0, 0, 1, 1, 2, 2, 3, 3]
