"""Samplers, crops, coverage and background noise, against counting."""
import csv
from fractions import Fraction

import numpy as np
import pytest
import soundfile as sf
import torch

from data.clips import Clips, CropKey, TileKey, TrainLoader, activity
from data.load import load_manifest
from data.manifest import DataError
from data.prepare import noise_recordings
from data.sampling import (
    coverage,
    crops_by_tenth,
    epoch_order,
    epoch_steps,
    quotas,
    write_coverage,
)
from data.scan import scan

RATE = 8000
LABELS = np.repeat([0, 1, 2, 3], [60, 25, 12, 3])


def test_quotas():
    counts = np.array([60, 25, 12, 3, 0])
    assert quotas(counts, 100, 1.0).tolist() == [60, 25, 12, 3, 0]
    assert quotas(counts, 100, 0.0).tolist() == [25, 25, 25, 25, 0]
    root = np.sqrt(counts)
    assert np.abs(quotas(counts, 100, 0.5) - 100 * root / root.sum()).max() < 1
    for total in range(1, 40):
        assert quotas(counts, total, 0.5).sum() == total


def test_shuffle_has_every_row_once_in_another_order_each_epoch():
    rows = np.arange(100, 200)
    orders = [epoch_order(rows, 0, epoch) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == rows.tolist()
    assert (orders[0] != orders[1]).sum() > 80


@pytest.mark.parametrize("power, expected", [(0.0, [25, 25, 25, 25]), (0.5, [44, 28, 19, 9])])
def test_classes_occur_by_quota_and_their_rows_take_turns(power, expected):
    n_clips = 400
    rows = np.arange(100) * 3 + 1
    class_sizes = np.bincount(LABELS)
    for epoch in (0, 1):
        clip_ids = epoch_order(rows, 5, epoch, LABELS, power, n_clips)
        assert len(clip_ids) == 100
        assert len(np.unique(clip_ids)) == 100
        labels = LABELS[(clip_ids % n_clips - 1) // 3]
        assert np.abs(np.bincount(labels) - expected).max() <= 1
        for c in range(4):
            repeats = np.unique(clip_ids[labels == c] % n_clips, return_counts=True)[1]
            if len(repeats) == class_sizes[c]:
                assert repeats.max() - repeats.min() <= 1
            else:  # rows of a large class are left out
                assert repeats.max() == 1
        assert np.abs(np.diff(np.flatnonzero(labels == 0))).max() < 20  # classes are mixed


def test_rows_that_are_left_out_come_in_another_epoch():
    n_clips = 400
    seen = set()
    for epoch in range(8):
        clip_ids = epoch_order(np.arange(100) * 3 + 1, 5, epoch, LABELS, 0.0, n_clips)
        seen.update((clip_ids % n_clips).tolist())
    assert len(seen) > 95


def test_epoch_steps_have_every_clip_once():
    order = epoch_order(np.arange(100, 123), seed=0, epoch=4)
    steps = epoch_steps(order, 4, 8)
    sizes = [[len(clip_ids) for clip_ids in micro_batches] for micro_batches in steps]
    assert sizes == [[4, 4], [4, 4], [4, 3]]
    assert [clip_id for step in steps for batch in step for clip_id in batch] == order.tolist()


@pytest.fixture
def manifest(tmp_path):
    """Five recordings of 4 s at RATE, almost silent except for one second of noise.

    The noise of file i begins at i / 2 s.
    """
    rng = np.random.default_rng(0)
    for i in range(5):
        wave = 1e-4 * rng.standard_normal(4 * RATE)
        wave[i * RATE // 2:i * RATE // 2 + RATE] += 0.3 * rng.standard_normal(RATE)
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        sf.write(folder / f"{i}.wav", wave, RATE)
    manifest = load_manifest(tmp_path)
    manifest.duration = scan(manifest, None, full=False).duration
    return manifest


def noise_starts(manifest):
    return np.array([int(path[2]) for path in manifest.paths]) * RATE // 2


def crop_starts(clips, epochs=200):
    """(epochs, rows)"""
    return np.stack([clips.crop_start(np.arange(5), epoch) for epoch in range(epochs)])


def test_active_crops_prefer_active_segments(manifest):
    overlap = {}
    for crop in ("random", "active"):
        starts = crop_starts(Clips(manifest, RATE, RATE, crop=crop))
        assert starts.min() >= 0
        assert starts.max() <= 3 * RATE
        distance = np.abs(starts - noise_starts(manifest)[None, :])
        overlap[crop] = (1 - distance / RATE).clip(0).mean(0)  # (rows,)
    assert overlap["active"].min() > 0.6
    assert overlap["random"].max() < 0.35
    assert len(np.unique(starts)) > 500  # they still vary


def test_active_crops_of_silence_are_uniform(manifest):
    for path in manifest.paths:
        sf.write(manifest.root / path, np.zeros(4 * RATE), RATE)
    starts = np.sort(crop_starts(Clips(manifest, RATE, RATE, crop="active")).ravel())
    assert np.abs(starts / (3 * RATE) - np.linspace(0, 1, 1000)).max() < 0.06


def test_activity_against_a_loop():
    level = np.repeat([1e-3, 1, 10, 1e-3, 1e-3], 210)
    wave = np.random.default_rng(0).standard_normal(1050).astype(np.float32) * level
    decibels = []
    for i in range(0, 1000, 100):
        power = np.mean(wave[i:i + 100].astype(np.float64) ** 2)
        decibels.append(10 * np.log10(power))
    background = np.quantile(decibels, 0.2) + 3
    expected = np.cumsum([0] + [min(30, max(0, x - background)) for x in decibels])
    assert np.allclose(activity(wave, 100), expected, atol=1e-3)
    assert expected[-1] > 60


def test_start_crops_begin_at_the_start(manifest):
    clips = Clips(manifest, RATE, RATE, crop="start")
    assert clips.crop_start([0, 7], 3).tolist() == [0, 0]


def test_a_repeat_within_an_epoch_has_another_crop(manifest):
    clips = Clips(manifest, RATE, RATE)
    n = len(clips)
    first, second = clips.batch([CropKey(1, epoch=0), CropKey(1 + n, epoch=0)]).wave
    assert not torch.equal(first, second)
    batch = clips.batch([CropKey(1 + 2 * n, epoch=2), CropKey(2, epoch=2)])
    assert batch.rows.tolist() == [1, 2]
    assert batch.clip_ids.tolist() == [1 + 2 * n, 2]
    assert batch.target.tolist() == manifest.labels[[1, 2]].tolist()


def test_a_crop_is_another_one_in_each_epoch_and_a_tile_never_changes(manifest):
    clips = Clips(manifest, RATE, RATE)
    first, again, other = (clips.batch([CropKey(1, epoch)]).wave for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    start = int(clips.crop_start([1], 0)[0])
    assert torch.equal(clips.batch([TileKey(1, start)]).wave, first)
    assert torch.equal(clips.batch([(1, start)]).wave, first)  # a plain tuple is a tile


def test_coverage_against_marking_every_sample():
    rng = np.random.default_rng(0)
    total = np.array([50, 120, 10, 77, 30])
    rows = rng.integers(0, 4, 40)  # the last row has no crops
    starts = (rng.random(40) * np.maximum(1, total[rows] - 20)).astype(int)
    share, n_crops = coverage(rows, starts, total, 20)
    for row in range(5):
        covered = np.zeros(total[row], bool)
        for start in starts[rows == row]:
            covered[start:start + 20] = True
        assert share[row] == pytest.approx(covered.mean())
        assert n_crops[row] == (rows == row).sum()


def test_crops_by_tenth_against_exact_fractions():
    rng = np.random.default_rng(4)
    total = rng.integers(5, 400, 30)
    rows = rng.integers(0, 29, 500)  # the last row has no crops
    starts = (rng.random(500) * np.maximum(total[rows] - 20, 0)).astype(np.int64)
    expected = np.zeros((30, 10), int)
    for row, start in zip(rows.tolist(), starts.tolist()):
        length = int(total[row])
        middle = Fraction(start) + Fraction(min(20, length), 2)
        expected[row, min(9, int(10 * middle / length))] += 1
    counts = crops_by_tenth(rows, starts, total, 20)
    assert (counts == expected).all()
    assert counts[:29].any(axis=0).all()


def test_write_coverage(manifest, tmp_path):
    loader = TrainLoader(Clips(manifest, RATE, RATE, crop="start"), np.array([0, 2, 3]), 2, 2)
    summary = write_coverage(loader, 7, tmp_path / "coverage.csv")
    with open(tmp_path / "coverage.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["path"] for line in table] == [manifest.paths[i] for i in (0, 2, 3)]
    for line in table:
        assert line["share_covered"] == "0.250"
        assert line["crops"] == "7"
        assert sum(map(int, line["crops_by_tenth"].split())) == 7
    assert "7 epochs: 25% of the training audio" in summary


def test_noise_comes_from_other_training_clips(manifest):
    clips = Clips(manifest, RATE, RATE, seed=1)
    clips.set_noise(0.5, [0, 3])
    batch = clips.batch([CropKey(clip_id, epoch=0) for clip_id in range(100)])
    noisy = batch.noise.abs().amax(1) > 0
    assert 35 < noisy.sum() < 65
    assert batch.noise.shape == batch.wave.shape
    sources = {row: sf.read(manifest.file(row), dtype="float32")[0] for row in (0, 3)}
    for clip_id in torch.nonzero(noisy)[:, 0].tolist()[:20]:
        noise = batch.noise[clip_id].numpy()
        matches = []
        for row, wave in sources.items():
            windows = np.lib.stride_tricks.sliding_window_view(wave[:len(wave) - RATE + 50], 50)
            start = np.abs(windows - noise[:50]).max(axis=1).argmin()
            if np.array_equal(wave[start:start + RATE], noise):
                matches.append(row)
        assert len(matches) == 1
        assert matches[0] != clip_id % 5  # not the clip itself
    again = clips.batch([CropKey(clip_id, epoch=0) for clip_id in range(50, 100)])
    assert torch.equal(again.noise, batch.noise[50:])


def test_evaluation_has_no_noise(manifest):
    clips = Clips(manifest, RATE, RATE)
    clips.set_noise(1.0, [0, 3])
    assert clips.batch([TileKey(0, 0)]).noise is None


@pytest.fixture
def noise_folder(tmp_path):
    """One recording of noise in a subfolder, and a broken file."""
    folder = tmp_path / "noise"
    (folder / "deep").mkdir(parents=True)
    hum = 0.1 * np.random.default_rng(5).standard_normal(2 * RATE)
    sf.write(folder / "deep" / "hum.wav", hum, RATE, subtype="FLOAT")
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


def test_noise_from_a_folder(manifest, tmp_path, noise_folder):
    recordings = noise_recordings(noise_folder, tmp_path / "cache")
    assert recordings.paths == ["deep/hum.wav"]
    hum = sf.read(noise_folder / "deep" / "hum.wav")[0]
    clips = Clips(manifest, RATE, RATE)
    clips.set_noise(1.0, [0], Clips(recordings, RATE, RATE))
    noise = clips.batch([CropKey(clip_id, epoch=0) for clip_id in range(10)]).noise.numpy()
    starts = [np.abs(hum[:RATE + 1] - wave[0]).argmin() for wave in noise]
    for start, wave in zip(starts, noise):
        assert np.allclose(hum[start:start + RATE], wave, atol=1e-6)
    assert len(set(starts)) == 10


def test_a_noise_folder_without_recordings_is_refused(tmp_path, noise_folder):
    (noise_folder / "deep" / "hum.wav").unlink()
    for folder in (noise_folder, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="--noise-dir"):
            noise_recordings(folder, tmp_path / "cache")
