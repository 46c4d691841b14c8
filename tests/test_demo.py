"""The demo data: the same clips everywhere, sane levels, and a folder that two runs may write."""
import hashlib
import multiprocessing
import os
import time
import wave

import numpy as np
import pytest
import soundfile as sf

from data import demo

SMALL = {name: 0 for name in demo.CLASSES} | {"rain": 3, "bell": 2, "siren": 1}

# SHA-256 of the int16 samples of each class's first clip. If you changed the sounds on purpose,
# raise demo.VERSION.
FIRST_CLIPS = {
    "bell": "b03fc4906abad90f",
    "chirp_down": "afb222c2cbdd8293",
    "chirp_up": "a34784c21be692b5",
    "clicks": "52a455ad34f4031c",
    "engine": "0b7695d006c7e594",
    "harmonic_call": "5dbf82900e4181c9",
    "rain": "53cd6dcd55940db2",
    "siren": "22f268d706765fb5",
    "surf": "dacc67890ff30a47",
    "trill": "b056590f3a188555",
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "COUNTS", SMALL)


def int16(clip):
    return np.rint(clip * 32768).astype("<i2")


def wav_paths(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.wav"))


def contents(root):
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def refuse_to_synthesise(*args):
    raise AssertionError("demo data was written again")


def test_class_sizes_are_uneven():
    assert len(demo.CLASSES) == 10
    assert set(demo.CLASSES) == set(demo.COUNTS) == set(demo.FAMILIES)
    smallest, largest = min(demo.COUNTS.values()), max(demo.COUNTS.values())
    assert smallest >= 16
    assert 3 <= largest / smallest <= 5
    assert 380 <= sum(demo.COUNTS.values()) <= 420


def test_a_clip_depends_on_name_index_and_seed_only():
    arguments = [("siren", 3, 0), ("rain", 1, 0), ("siren", 4, 0), ("siren", 3, 1), ("surf", 3, 0)]
    clips = [demo.synthesise(*arg) for arg in arguments]
    in_reverse = [demo.synthesise(*arg) for arg in reversed(arguments)]
    for clip, again in zip(clips, reversed(in_reverse)):
        assert np.array_equal(clip, again)
    assert len({clip.tobytes() for clip in clips}) == len(clips)
    assert np.array_equal(demo.synthesise("rain", 1), clips[1])  # seed 0 by default


def test_the_sounds_are_frozen():
    hashes = {}
    for name in demo.CLASSES:
        samples = int16(demo.synthesise(name, 1)).tobytes()
        hashes[name] = hashlib.sha256(samples).hexdigest()[:16]
    assert hashes == FIRST_CLIPS


@pytest.mark.parametrize("name", demo.CLASSES)
def test_no_silence_and_no_clipping(name):
    peaks = []
    for index in range(1, 5):
        clip = demo.synthesise(name, index)
        assert clip.shape == (88200,)
        assert clip.dtype == np.float32
        assert np.isfinite(clip).all()
        assert np.array_equal(int16(clip) / np.float32(32768), clip)  # fits a 16-bit file exactly
        assert np.sqrt(np.mean(clip**2)) > 0.001  # -60 dBFS
        peak = np.abs(clip).max()
        assert (np.abs(clip) == peak).sum() < 5  # not clipped
        peaks.append(peak)
    assert min(peaks) > 0.06
    assert max(peaks) < 0.95
    assert max(peaks) > 1.5 * min(peaks)


@pytest.mark.parametrize("name", demo.FAMILIES)
def test_sounds_have_the_length_of_a_clip(name):
    for seed in range(5):
        sound = demo.FAMILIES[name](np.random.default_rng(seed))
        assert sound.shape == (demo.SAMPLES,)
        assert sound.dtype == np.float64
        assert np.abs(sound).max() > 0


def test_layout_of_the_folder(tmp_path, small):
    root = demo.write_demo(tmp_path / "deep" / "demo")
    assert root == tmp_path / "deep" / "demo"
    expected = [f"{name}/{name}_{i:04d}.wav" for name, n in SMALL.items() for i in range(1, n + 1)]
    assert wav_paths(root) == sorted(expected)
    for path in root.rglob("*.wav"):
        with wave.open(str(path)) as file:
            assert file.getparams()[:4] == (1, 2, 22050, 88200)
    samples, rate = sf.read(root / "rain" / "rain_0003.wav", dtype="float32")
    assert rate == 22050
    assert np.array_equal(samples, demo.synthesise("rain", 3))
    assert "your own" in (root / "README.txt").read_text("utf-8").lower()
    assert [path.name for path in root.parent.iterdir()] == ["demo"]  # no temporary folder is left
    assert root.stat().st_mode & 0o777 == root.parent.stat().st_mode & 0o777  # others may read it


def test_a_complete_copy_is_not_written_again(tmp_path, small, monkeypatch):
    root = demo.write_demo(tmp_path / "demo")
    (root / "rain" / "mine.wav").write_bytes(b"")  # other files are not looked for, either
    monkeypatch.setattr(demo, "synthesise", refuse_to_synthesise)
    assert demo.write_demo(str(root)) == root


@pytest.mark.parametrize("harm", [
    "missing", "short", "no marker", "old version", "no folder", "no readme",
])
def test_an_incomplete_or_old_copy_is_renewed(tmp_path, small, harm):
    root = demo.write_demo(tmp_path / "demo")
    expected = contents(root)
    victim = root / "bell" / "bell_0002.wav"
    if harm == "missing":
        victim.unlink()
    elif harm == "short":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif harm == "no folder":
        (root / "siren" / "siren_0001.wav").unlink()
        (root / "siren").rmdir()
    else:
        victim.write_bytes(bytes(len(victim.read_bytes())))  # the same size, but other sounds
        (root / ".complete").unlink()
        if harm == "old version":
            (root / ".complete").write_text("warble demo 0\n")
        if harm == "no readme":
            (root / "README.txt").unlink()
    (root / ".DS_Store").write_bytes(b"hidden files stay")
    assert demo.write_demo(root) == root
    assert contents(root) == expected | {".DS_Store": b"hidden files stay"}
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_another_seed_replaces_every_clip(tmp_path, small):
    root = demo.write_demo(tmp_path / "demo")
    seed_0 = contents(root)
    seed_1 = contents(demo.write_demo(root, seed=1))
    assert seed_0.keys() == seed_1.keys()
    for file in wav_paths(root):
        assert seed_0[file] != seed_1[file]


@pytest.mark.parametrize("file", [
    "dog/dog_0001.wav",
    "rain/storm.wav",
    "labels.csv",
    "rain/rain_0004.wav",
    "",  # a file in place of the folder
])
def test_other_data_is_never_changed(tmp_path, small, monkeypatch, file):
    root = tmp_path / "mine"
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(demo, "synthesise", refuse_to_synthesise)
    with pytest.raises(FileExistsError, match="another folder") as error:
        demo.write_demo(root)
    assert str(path) in str(error.value)
    assert path.read_bytes() == b"mine"
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interruption_leaves_no_files(tmp_path, small, monkeypatch):
    def stop_at_rain(name, index, seed):
        if name == "rain":
            raise KeyboardInterrupt
        return np.zeros(demo.SAMPLES, np.float32)

    monkeypatch.setattr(demo, "synthesise", stop_at_rain)
    with pytest.raises(KeyboardInterrupt):
        demo.write_demo(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def write_together(root, barrier, delay):
    """In its own process: write the data and move it into place when the other process does."""
    rename = os.rename

    def rename_together(source, target):
        barrier.wait(30)
        time.sleep(delay)
        rename(source, target)

    demo.COUNTS = SMALL
    os.rename = rename_together
    demo.write_demo(root)
    assert len(wav_paths(root)) == sum(SMALL.values())


@pytest.mark.parametrize("before", ["nothing", "old copy"])
def test_two_processes_may_write_at_once(tmp_path, small, before):
    root = tmp_path / "demo"
    if before == "old copy":
        demo.write_demo(root, seed=7)
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    processes = []
    for delay in (0.0, 0.05):
        process = spawn.Process(target=write_together, args=(root, barrier, delay))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert contents(root) == contents(demo.write_demo(tmp_path / "alone"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "demo"]
