"""The demo data: the same sounds everywhere, sane levels, and a folder that two runs may write."""
import ast
import hashlib
import multiprocessing
import os
import shutil
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data import demo, soundscape

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
# The same of some soundscape recordings.
SOUNDSCAPES = {1: "21acbf785561dde5", 2: "1c50d3a452ee1f34", 12: "9ac8da1496465eb3",
               24: "717baa3eb737a6c2"}


def white_noise(index, seed):
    """A stand-in for synthesise_soundscape that takes no time."""
    samples = np.random.default_rng([seed, index]).integers(-99, 99, soundscape.SAMPLES)
    return (samples / 32768).astype(np.float32)


def make_small(set_attribute):
    set_attribute(demo, "COUNTS", SMALL)
    set_attribute(soundscape, "RECORDINGS", 2)
    set_attribute(soundscape, "synthesise_soundscape", white_noise)


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch.setattr)


@pytest.fixture(scope="module")
def soundscapes():
    """Some of the recordings, by index: a second each."""
    return {i: soundscape.synthesise_soundscape(i) for i in (1, 2, 3, 6, 12, 18, 24)}


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


def test_soundscape_is_an_hour(soundscapes):
    assert {samples.shape for samples in soundscapes.values()} == {(150 * 22050,)}
    assert soundscape.RECORDINGS * 150 == 3600


def test_soundscape_recordings_are_frozen(soundscapes):
    hashes = {i: hashlib.sha256(int16(soundscapes[i]).tobytes()).hexdigest()[:16]
              for i in SOUNDSCAPES}
    assert hashes == SOUNDSCAPES


def test_a_soundscape_depends_on_index_and_seed_only(soundscapes):
    assert np.array_equal(soundscape.synthesise_soundscape(3), soundscapes[3])
    assert not np.array_equal(soundscape.synthesise_soundscape(3, seed=1), soundscapes[3])
    assert len({samples.tobytes() for samples in soundscapes.values()}) == len(soundscapes)


def test_soundscape_has_no_silence_and_no_clipping(soundscapes):
    medians, peaks = [], []
    for samples in soundscapes.values():
        assert samples.dtype == np.float32
        assert np.isfinite(samples).all()
        assert np.array_equal(int16(samples) / np.float32(32768), samples)  # fits 16 bits exactly
        levels = np.sqrt(np.mean(samples[:148 * 22050].reshape(37, -1) ** 2, axis=1))  # of 4 s
        assert levels.min() > 0.0003  # -70 dBFS: some 16-bit steps above silence
        assert levels.max() > 1.4 * levels.min()  # changes over time
        assert abs(samples.mean()) < 0.2 * levels.min()
        peak = np.abs(samples).max()
        assert (np.abs(samples) == peak).sum() < 5
        medians.append(np.median(levels))
        peaks.append(peak)
    assert min(peaks) > 0.08 and max(peaks) < 0.95
    assert max(medians) > 3 * min(medians)  # loud and quiet sites


def test_sites_differ_in_their_spectrum(soundscapes):
    # No recording is nearly the copy of another, so train and test are different sites.
    bands = []
    for samples in soundscapes.values():
        blocks = samples[:2048 * 1614].reshape(-1, 2048) * np.hanning(2048)
        power = np.mean(np.abs(np.fft.rfft(blocks)) ** 2, axis=0)[:1024].reshape(64, 16).sum(axis=1)
        bands.append(10 * np.log10(power / power.sum()))
    distance = np.abs(np.array(bands)[:, None] - np.array(bands)).mean(axis=2)  # in dB
    assert distance[~np.eye(len(bands), dtype=bool)].min() > 1


def test_soundscape_uses_no_sound_of_a_class():
    # Not one of the classes' functions, by import or by name ...
    tree = ast.parse(Path(soundscape.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", None) for node in imports} == {None, "synthesis"}
    for name, function in demo.FAMILIES.items():
        assert function.__name__ not in vars(soundscape), name
    # ... and every sound that it makes is one of these.
    assert set(soundscape.LAYERS) == {"wind", "leaves", "traffic", "mains hum", "crickets",
                                      "cicadas", "babble", "aeroplane"}
    assert {event.__name__ for event in soundscape.EVENTS} == {
        "_footsteps", "_thump", "_handling", "_creak", "_dry_leaves"}


@pytest.mark.parametrize("name", soundscape.LAYERS)
def test_a_layer_is_heard_for_whole_recordings(name):
    function, share, lowest, highest = soundscape.LAYERS[name]
    layer = function(np.random.default_rng(0))
    assert layer.shape == (soundscape.SAMPLES,)
    assert np.isfinite(layer).all() and np.abs(layer).max() > 0
    assert 0 < share < 1 and lowest < highest


@pytest.mark.parametrize("event", soundscape.EVENTS)
def test_an_event_is_short(event):
    for seed in range(20):
        sound = event(np.random.default_rng(seed))
        assert np.isfinite(sound).all() and np.abs(sound).max() > 0
        assert len(sound) < 15 * demo.SAMPLE_RATE


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
    assert wav_paths(root) == sorted([*expected, "noise/noise_0001.wav", "noise/noise_0002.wav"])
    for path in root.rglob("*.wav"):
        n_samples = 3307500 if path.parent.name == "noise" else 88200
        with wave.open(str(path)) as file:
            assert file.getparams()[:4] == (1, 2, 22050, n_samples)
    samples, _ = sf.read(root / "noise" / "noise_0002.wav", dtype="float32")
    assert np.array_equal(samples, white_noise(2, 0))
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
    "missing", "short", "short soundscape", "no soundscape", "no marker", "old version",
    "no folder", "no readme",
])
def test_an_incomplete_or_old_copy_is_renewed(tmp_path, small, harm):
    root = demo.write_demo(tmp_path / "demo")
    expected = contents(root)
    victim = root / "bell" / "bell_0002.wav"
    if harm == "missing":
        victim.unlink()
    elif harm == "short soundscape":
        with open(root / "noise" / "noise_0002.wav", "r+b") as file:
            file.truncate(44 + 2 * demo.SAMPLES)  # the length of a clip
    elif harm == "no soundscape":
        shutil.rmtree(root / "noise")
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
    "noise/noise_0003.wav",
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

    make_small(setattr)
    os.rename = rename_together
    demo.write_demo(root)
    assert len(wav_paths(root)) == sum(SMALL.values()) + 2


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
