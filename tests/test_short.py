"""--short place: at a random place in silence in training, in the middle in evaluation."""
import numpy as np
import pytest
import soundfile as sf
import torch

import data.cache
import train
from core.run.checkpoint import load_checkpoint
from data.audio import SHORT, fit, place_offset
from data.cache import WaveCache
from data.clips import Clips, CropKey, TileKey, TrainLoader, evaluation_batches
from data.load import load_manifest
from data.scan import scan
from tests.faults.harness import exit_code, outcome, stop_at, without_pictures

RATE, SAMPLES = 16000, 8000
SMALL = ["--weights", "none", "--dim", "16", "--depth", "1", "--heads", "2", "--seconds", "0.9",
         "--device", "cpu", "--amp", "off"]
LENGTHS = (500, 3000, 7999, 8000, 8001, 20000)


@pytest.fixture
def manifest(tmp_path):
    """Clips shorter than the window, as long, and longer. No sample is zero."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rng, table = np.random.default_rng(0), ["path,label"]
    for i, length in enumerate(LENGTHS):
        wave = rng.uniform(0.1, 0.9, length) * rng.choice([-1, 1], length)
        sf.write(folder / f"{i}.wav", wave, RATE, subtype="PCM_16")
        table.append(f"{i}.wav,{'ab'[i % 2]}")
    (folder / "clips.csv").write_text("\n".join(table))
    manifest = load_manifest(folder / "clips.csv")
    manifest.duration = scan(manifest, None, full=True).duration
    return manifest


def clips_of(manifest, short="place", **options):
    return Clips(manifest, RATE, SAMPLES, short, seed=3, **options)


def source_wave(manifest, row):
    return sf.read(manifest.file(row), dtype="float32")[0]


def training_waves(clips, epoch=0, clip_ids=range(6)):
    return clips.batch([CropKey(i, epoch) for i in clip_ids]).wave.numpy()


def placed_at(wave, sound):
    """Every offset at which `sound` among zeros gives the wave: tries them all."""
    return [offset for offset in range(len(wave) - len(sound) + 1)
            if np.array_equal(wave[offset:offset + len(sound)], sound)
            and not wave[:offset].any() and not wave[offset + len(sound):].any()]


def test_a_short_clip_is_somewhere_in_silence_and_elsewhere_in_the_next_epoch(manifest):
    clips, n = clips_of(manifest), len(LENGTHS)
    offsets = []
    for epoch in range(4):
        waves = training_waves(clips, epoch)
        for row in (0, 1, 2):
            [offset] = placed_at(waves[row], source_wave(manifest, row))
            offsets.append((row, offset))
    for row in (0, 1):
        assert len({offset for i, offset in offsets if i == row}) == 4
    # The second occurrence of a clip within an epoch has a place of its own.
    first, again = training_waves(clips, 0, [0, n])
    assert placed_at(first, source_wave(manifest, 0)) != placed_at(again, source_wave(manifest, 0))


def test_control_a_repeated_or_padded_clip_is_not_placed(manifest):
    sound = source_wave(manifest, 1)
    assert placed_at(training_waves(clips_of(manifest, "repeat"))[1], sound) == []
    assert placed_at(training_waves(clips_of(manifest, "pad"))[1], sound) == [0]


@pytest.mark.parametrize("n_samples, length", [(3, 7), (1, 2), (6, 7), (7, 7)])
def test_every_offset_is_equally_likely(n_samples, length):
    positions = (np.arange(7000) + 0.5) / 7000
    offsets = place_offset(np.full(7000, n_samples), length, positions)
    counts = np.bincount(offsets)
    assert len(counts) == length - n_samples + 1  # from the first place to the last
    assert counts.max() - counts.min() <= 1
    sound = np.arange(1, n_samples + 1, dtype=np.float32)
    for position in positions[::500]:
        wave = fit(sound, length, "place", position)
        assert len(wave) == length and len(placed_at(wave, sound)) == 1


def test_evaluation_takes_the_middle_whatever_the_seed_and_the_order(manifest):
    rows = [5, 2, 0, 1, 3, 4, 0]
    waves = torch.cat([b.wave for b in evaluation_batches(clips_of(manifest), rows, 2)])
    clips = Clips(manifest, RATE, SAMPLES, "place", seed=99)
    other = torch.cat([b.wave for b in evaluation_batches(clips, rows, 3, workers=1)])
    assert torch.equal(waves, other)
    for row in (0, 1, 2):
        wave = clips.batch([TileKey(row, 0)]).wave[0].numpy()
        [before] = placed_at(wave, source_wave(manifest, row))
        after = SAMPLES - LENGTHS[row] - before
        assert before - after in (0, 1)


@pytest.mark.parametrize("short", SHORT)
def test_clips_that_fill_the_window_do_not_depend_on_short(manifest, short):
    """Also: repeat and pad against numpy."""
    waves = training_waves(clips_of(manifest, short), 2)
    assert np.array_equal(waves[3:], training_waves(clips_of(manifest, "repeat"), 2)[3:])
    for row in (0, 1, 2):
        sound = source_wave(manifest, row)
        if short == "repeat":
            expected = [sound[i % len(sound)] for i in range(SAMPLES)]
            assert np.array_equal(waves[row], expected)
        elif short == "pad":
            assert np.array_equal(waves[row], [*sound, *[0] * (SAMPLES - len(sound))])


class FakeGPUTensor:
    """Samples on the CPU that claim to be on a GPU."""

    def __init__(self, samples):
        self.samples = samples
        self.device = type("Device", (), {"type": "cuda"})


def test_places_are_the_same_from_every_cache_worker_and_rank(manifest, tmp_path, monkeypatch):
    cache = WaveCache(tmp_path / "cache", RATE)
    expected = training_waves(clips_of(manifest, cache=cache), 1)

    def of_loader(clips, workers=0, n_ranks=1):
        waves = {}
        loader = TrainLoader(clips, range(len(LENGTHS)), 1, 2, seed=3, workers=workers)
        for rank in range(n_ranks):
            for step in loader.steps(1, 0, rank, n_ranks):
                for batch in step:
                    waves[int(batch.rows[0])] = batch.wave[0].numpy()
        return np.stack([waves[row] for row in range(len(LENGTHS))])

    clips = clips_of(manifest, cache=cache)
    assert np.array_equal(of_loader(clips), expected)
    assert np.array_equal(of_loader(clips, workers=2), expected)
    assert np.array_equal(of_loader(clips, n_ranks=2), expected)
    clips.load_into_memory(torch.device("cpu"))
    assert np.array_equal(of_loader(clips), expected)
    gather = data.cache._gather  # the code for GPUs
    monkeypatch.setattr(data.cache, "_gather", lambda flat, *rest: gather(flat.samples, *rest))
    clips.in_memory._samples = FakeGPUTensor(clips.in_memory._samples)
    assert np.array_equal(of_loader(clips), expected)


def test_background_noise_fills_the_whole_window(manifest):
    clips = clips_of(manifest)
    clips.set_noise(1.0, [0, 1, 2], clips_of(manifest))
    noise = clips.batch([CropKey(i, 0) for i in range(len(LENGTHS))]).noise
    assert (noise != 0).all()
    clips = clips_of(manifest, "pad")  # control: padded noise has zeros
    clips.set_noise(1.0, [0, 1, 2], clips_of(manifest, "pad"))
    assert (clips.batch([CropKey(3, 0)]).noise == 0).any()


def test_a_resumed_run_places_clips_as_an_uninterrupted_one(tmp_path, monkeypatch):
    folder, rng = tmp_path / "clips", np.random.default_rng(1)
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(10):
            sf.write(folder / name / f"{i}.wav", rng.uniform(-0.5, 0.5, 2000 + 700 * i), 22050)
    monkeypatch.setenv("HOME", str(tmp_path))
    without_pictures(monkeypatch)
    flags = ["--data", folder, *SMALL, "--epochs", 3, "--warmup-epochs", 1, "--batch-size", 2,
             "--effective-batch", 2]
    a, b, repeated = tmp_path / "a", tmp_path / "b", tmp_path / "repeated"
    assert exit_code(train.main, *flags, "--short", "place", "--run-dir", a) == 0
    with monkeypatch.context() as stopping:
        stop_at(10)(stopping)
        assert exit_code(train.main, *flags, "--short", "place", "--run-dir", b) == 143
    checkpoint = load_checkpoint(b / "last.pt")
    assert checkpoint["clip"]["short"] == "place"
    assert 7 < checkpoint["progress"]["step"] < 21  # within the second epoch or later
    assert exit_code(train.main, "--resume", "--run-dir", b, "--short", "pad") == 2
    assert exit_code(train.main, "--resume", "--run-dir", b) == 0
    assert outcome(a) == outcome(b)
    assert exit_code(train.main, *flags, "--run-dir", repeated) == 0  # control: it matters
    assert outcome(a) != outcome(repeated)
