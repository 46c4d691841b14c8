"""The generated data set: the same clips everywhere, sane levels, a folder that two runs may write at once."""
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

# sha256 of the int16 samples of each class's first clip. If the recipe was changed on purpose, raise demo.VERSION.
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


def wavs(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.wav"))


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def no_writing(*args):
    raise AssertionError("a complete copy was written again")


def test_counts_are_uneven():
    counts = sorted(demo.COUNTS.values())
    assert set(demo.CLASSES) == set(demo.COUNTS) == set(demo.FAMILIES) and len(demo.CLASSES) == 10
    assert counts[0] >= 16 and 3 <= counts[-1] / counts[0] <= 5 and 380 <= sum(counts) <= 420


def test_a_clip_depends_on_name_index_and_seed_only():
    clips = [("siren", 3, 0), ("rain", 1, 0), ("siren", 4, 0), ("siren", 3, 1), ("surf", 3, 0)]
    forward = [demo.synthesise(*clip) for clip in clips]
    backward = [demo.synthesise(*clip) for clip in clips[::-1]][::-1]
    for one, other in zip(forward, backward):
        assert np.array_equal(one, other)
    for i, one in enumerate(forward):
        assert not any(np.array_equal(one, other) for other in forward[:i])
    assert np.array_equal(demo.synthesise("rain", 1), forward[1])  # seed 0 unless told


def test_the_recipe_is_frozen():
    firsts = {name: int16(demo.synthesise(name, 1)).tobytes() for name in demo.CLASSES}
    found = {name: hashlib.sha256(samples).hexdigest()[:16] for name, samples in firsts.items()}
    assert found == FIRST_CLIPS


@pytest.mark.parametrize("name", demo.CLASSES)
def test_no_silence_and_no_clipping(name):
    peaks = []
    for index in range(1, 5):
        clip = demo.synthesise(name, index)
        assert clip.shape == (88200,) and clip.dtype == np.float32 and np.isfinite(clip).all()
        assert np.array_equal(int16(clip) / np.float32(32768), clip)  # a 16-bit file holds it exactly
        assert np.sqrt(np.mean(clip**2)) > 0.001  # -60 dBFS
        assert (np.abs(clip) == np.abs(clip).max()).sum() < 5  # no flat top
        peaks.append(np.abs(clip).max())
    assert 0.06 < min(peaks) and max(peaks) < 0.95 and max(peaks) > 1.5 * min(peaks)


def test_families_never_overrun_a_clip():
    for name, family in demo.FAMILIES.items():
        for seed in range(5):
            sound = family(np.random.default_rng(seed))
            assert sound.shape == (demo.SAMPLES,) and sound.dtype == np.float64 and np.abs(sound).max() > 0, name


def test_layout(tmp_path, small):
    root = demo.write_demo(tmp_path / "deep" / "demo")
    assert root == tmp_path / "deep" / "demo"
    assert wavs(root) == sorted(f"{c}/{c}_{i:04d}.wav" for c, n in SMALL.items() for i in range(1, n + 1))
    for path in root.rglob("*.wav"):
        with wave.open(str(path)) as file:
            assert file.getparams()[:4] == (1, 2, 22050, 88200)
    heard, rate = sf.read(root / "rain" / "rain_0003.wav", dtype="float32")
    assert rate == 22050 and np.array_equal(heard, demo.synthesise("rain", 3))
    assert "your own" in (root / "README.txt").read_text("utf-8").lower()
    assert [path.name for path in root.parent.iterdir()] == ["demo"]  # no temporary folder left behind
    assert root.stat().st_mode & 0o777 == root.parent.stat().st_mode & 0o777  # not for this user alone


def test_a_complete_copy_is_left_alone(tmp_path, small, monkeypatch):
    root = demo.write_demo(tmp_path / "demo")
    (root / "rain" / "mine.wav").write_bytes(b"")  # nor is a stranger looked for
    monkeypatch.setattr(demo, "synthesise", no_writing)
    assert demo.write_demo(str(root)) == root


@pytest.mark.parametrize("harm", ["missing", "short", "no marker", "old version", "no folder", "no readme"])
def test_a_partial_or_old_copy_is_renewed(tmp_path, small, harm):
    root = demo.write_demo(tmp_path / "demo")
    good = contents(root)
    victim = root / "bell" / "bell_0002.wav"
    if harm == "missing":
        victim.unlink()
    elif harm == "short":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif harm == "no folder":
        (root / "siren" / "siren_0001.wav").unlink()
        (root / "siren").rmdir()
    else:
        victim.write_bytes(bytes(len(victim.read_bytes())))  # the right size, from another recipe
        (root / ".complete").unlink()
        if harm == "old version":
            (root / ".complete").write_text("warble demo 0\n")
        if harm == "no readme":
            (root / "README.txt").unlink()
    (root / ".DS_Store").write_bytes(b"hidden files are no concern")
    assert demo.write_demo(root) == root
    assert contents(root) == good | {".DS_Store": b"hidden files are no concern"}
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_another_seed_is_another_copy(tmp_path, small):
    root = demo.write_demo(tmp_path / "demo")
    zero = contents(root)
    one = contents(demo.write_demo(root, seed=1))
    assert zero.keys() == one.keys() and all(zero[file] != one[file] for file in wavs(root))


@pytest.mark.parametrize("file", ["dog/dog_0001.wav", "rain/storm.wav", "labels.csv", "rain/rain_0004.wav", ""])
def test_other_data_is_never_touched(tmp_path, small, monkeypatch, file):
    mine = tmp_path / "mine" / file  # the last case: a file where the folder should be
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_bytes(b"mine")
    monkeypatch.setattr(demo, "synthesise", no_writing)
    with pytest.raises(FileExistsError, match="another folder") as error:
        demo.write_demo(tmp_path / "mine")
    assert str(mine) in str(error.value)
    assert mine.read_bytes() == b"mine" and len(list(tmp_path.rglob("*"))) == len(mine.relative_to(tmp_path).parts)


def test_an_interrupted_writing_leaves_nothing(tmp_path, small, monkeypatch):
    def stop(name, index, seed):
        if name == "rain":
            raise KeyboardInterrupt
        return np.zeros(demo.SAMPLES, np.float32)

    monkeypatch.setattr(demo, "synthesise", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.write_demo(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def _write_beside_another(root, barrier, slow):
    """In a process of its own: writes the set and moves it into place when the other process does."""
    rename = os.rename

    def rename_together(source, target):
        barrier.wait(30)
        time.sleep(slow)
        rename(source, target)

    demo.COUNTS, os.rename = SMALL, rename_together
    demo.write_demo(root)
    assert len(wavs(root)) == sum(SMALL.values())


@pytest.mark.parametrize("before", ["nothing", "old copy"])
def test_two_writers_at_once(tmp_path, small, before):
    root = tmp_path / "demo"
    if before == "old copy":
        demo.write_demo(root, seed=7)
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    both = [spawn.Process(target=_write_beside_another, args=(root, barrier, slow)) for slow in (0.0, 0.05)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert contents(root) == contents(demo.write_demo(tmp_path / "alone"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "demo"]
