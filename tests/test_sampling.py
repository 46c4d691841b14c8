"""Samplers, crops and what has been heard, against counting."""
import csv
from fractions import Fraction

import numpy as np
import pytest
import soundfile as sf
import torch

from data.clips import Clips, TrainLoader, activity
from data.load import load_manifest
from data.manifest import DataError
from data.prepare import noise_recordings
from data.sampling import epoch_order, heard, quotas, tenths, write_heard
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
    assert all(sorted(order) == rows.tolist() for order in orders) and (orders[0] != orders[1]).sum() > 80


@pytest.mark.parametrize("power, often", [(0.0, [25, 25, 25, 25]), (0.5, [44, 28, 19, 9])])
def test_a_class_comes_as_often_as_its_quota_and_its_rows_in_turn(power, often):
    rows = np.arange(100) * 3 + 1  # of a manifest of 400 rows
    for epoch in (0, 1):
        clips = epoch_order(rows, 5, epoch, LABELS, power, 400)
        assert len(clips) == 100 == len(np.unique(clips))
        of = LABELS[(clips % 400 - 1) // 3]
        assert np.abs(np.bincount(of) - often).max() <= 1
        for c in range(4):
            times = np.unique(clips[of == c] % 400, return_counts=True)[1]
            assert times.max() - (times.min() if len(times) == (LABELS == c).sum() else 0) <= 1
        assert np.abs(np.diff(np.flatnonzero(of == 0))).max() < 20  # they are mixed
    seen = set().union(*(set((epoch_order(rows, 5, e, LABELS, 0.0, 400) % 400).tolist()) for e in range(8)))
    assert len(seen) > 95  # of a class that is cut down, others come in the next epoch


@pytest.fixture
def manifest(tmp_path):
    """Five recordings of 4 s at RATE: silence but for one second of noise, that of file i begins at i / 2 s."""
    rng = np.random.default_rng(0)
    for i in range(5):
        wave = 1e-4 * rng.standard_normal(4 * RATE)
        wave[i * RATE // 2:i * RATE // 2 + RATE] += 0.3 * rng.standard_normal(RATE)
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        sf.write(tmp_path / "ab"[i % 2] / f"{i}.wav", wave, RATE)
    found = load_manifest(tmp_path)
    found.duration = scan(found, None, full=False).duration
    return found


def events(manifest):
    return np.array([int(path[2]) for path in manifest.paths]) * RATE // 2  # where the noise begins


def test_active_crops_lie_where_something_goes_on(manifest):
    overlap = {}
    for crop in ("random", "active"):
        clips = Clips(manifest, RATE, RATE, crop=crop)
        starts = np.stack([clips.crop_start(np.arange(5), epoch) for epoch in range(200)])  # (epochs, rows)
        assert starts.min() >= 0 and starts.max() <= 3 * RATE
        overlap[crop] = (1 - np.abs(starts - events(manifest)[None, :]) / RATE).clip(0).mean(0)
    assert overlap["active"].min() > 0.6 > 0.35 > overlap["random"].max()
    assert len(np.unique(starts)) > 500  # and not always at the same place


def test_where_nothing_goes_on_active_crops_lie_anywhere(tmp_path, manifest):
    for path in manifest.paths:
        sf.write(manifest.root / path, np.zeros(4 * RATE), RATE)
    clips = Clips(manifest, RATE, RATE, crop="active")
    starts = np.sort(np.concatenate([clips.crop_start(np.arange(5), epoch) for epoch in range(200)]))
    assert np.abs(starts / (3 * RATE) - np.linspace(0, 1, 1000)).max() < 0.06


def test_activity_against_a_loop():
    wave = np.random.default_rng(0).standard_normal(1050).astype(np.float32) * np.repeat([1e-3, 1, 10, 1e-3, 1e-3], 210)
    level = [10 * np.log10(np.mean(wave[i:i + 100].astype(np.float64) ** 2)) for i in range(0, 1000, 100)]
    floor = np.quantile(level, 0.2) + 3
    want = np.cumsum([0] + [min(30, max(0, x - floor)) for x in level])
    assert np.allclose(activity(wave, 100), want, atol=1e-3) and want[-1] > 60


def test_start_crops_and_the_second_time_that_a_clip_comes(manifest):
    clips = Clips(manifest, RATE, RATE, crop="start")
    assert clips.crop_start([0, 7], 3).tolist() == [0, 0]
    clips = Clips(manifest, RATE, RATE)
    first, second = clips.batch([(1, -1), (1 + 5, -1)]).wave
    assert not torch.equal(first, second)
    batch = clips.batch([(1 + 10, -3), (2, -3)])
    assert batch.rows.tolist() == [1, 2] and batch.clips.tolist() == [11, 2]
    assert batch.target.tolist() == manifest.labels[[1, 2]].tolist()


def test_heard_against_marking_every_sample():
    rng = np.random.default_rng(0)
    total = np.array([50, 120, 10, 77, 30])
    rows = rng.integers(0, 4, 40)  # the last one is never taken
    starts = (rng.random(40) * np.maximum(1, total[rows] - 20)).astype(int)
    share, crops = heard(rows, starts, total, 20)
    for row in range(5):
        marks = np.zeros(total[row], bool)
        for start in starts[rows == row]:
            marks[start:start + 20] = True
        assert share[row] == pytest.approx(marks.mean()) and crops[row] == (rows == row).sum()


def test_where_crops_fell_against_exact_fractions():
    rng = np.random.default_rng(4)
    total = rng.integers(5, 400, 30)
    rows = rng.integers(0, 29, 500)  # the last one never comes
    starts = (rng.random(500) * np.maximum(total[rows] - 20, 0)).astype(np.int64)
    found, expected = tenths(rows, starts, total, 20), np.zeros((30, 10), int)
    for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
        middle = Fraction(start) + Fraction(min(20, int(total[row])), 2)
        expected[row, next(k for k in range(9, -1, -1) if middle >= Fraction(k, 10) * int(total[row]))] += 1
    assert (found == expected).all() and (found[:29].any(axis=0)).all()


def test_heard_csv(manifest, tmp_path):
    loader = TrainLoader(Clips(manifest, RATE, RATE, crop="start"), np.array([0, 2, 3]), 2, 2)
    line = write_heard(loader, 7, tmp_path / "heard.csv")
    with open(tmp_path / "heard.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["path"] for row in found] == [manifest.paths[i] for i in (0, 2, 3)]
    assert all(row["share_heard"] == "0.250" and row["crops"] == "7" for row in found)
    assert all(sum(map(int, row["crops_by_tenth"].split())) == 7 for row in found)
    assert line.startswith("heard in 7 epochs: 25% of the training audio")


def test_noise_comes_from_other_training_clips(manifest):
    clips = Clips(manifest, RATE, RATE, seed=1)
    clips.add_noise(0.5, [0, 3])
    batch = clips.batch([(clip, -1) for clip in range(100)])
    on = batch.noise.abs().amax(1) > 0
    assert 35 < on.sum() < 65 and batch.noise.shape == batch.wave.shape
    sources = {row: sf.read(manifest.file(row), dtype="float32")[0] for row in (0, 3)}
    for clip in torch.nonzero(on)[:, 0].tolist()[:20]:
        start = [(row, int(np.argmin([np.abs(wave[i:i + 50] - batch.noise[clip, :50].numpy()).max()
                                      for i in range(len(wave) - RATE + 1)]))) for row, wave in sources.items()]
        matches = [row for row, i in start if np.array_equal(sources[row][i:i + RATE], batch.noise[clip].numpy())]
        assert len(matches) == 1 and (matches[0] != clip % 5)
    assert clips.batch([(0, 0)]).noise is None  # none in evaluation
    again = clips.batch([(clip, -1) for clip in range(50, 100)])
    assert torch.equal(again.noise, batch.noise[50:])


def test_noise_out_of_a_folder(manifest, tmp_path):
    folder = tmp_path / "noise"
    (folder / "deep").mkdir(parents=True)
    hum = 0.1 * np.random.default_rng(5).standard_normal(2 * RATE)
    sf.write(folder / "deep" / "hum.wav", hum, RATE, subtype="FLOAT")
    (folder / "broken.wav").write_bytes(b"RIFF")
    found = noise_recordings(folder, tmp_path / "cache")
    assert found.paths == ["deep/hum.wav"]
    clips = Clips(manifest, RATE, RATE)
    clips.add_noise(1.0, [0], Clips(found, RATE, RATE))
    noise = clips.batch([(clip, -1) for clip in range(10)]).noise.numpy()
    places = [np.abs(hum[:RATE + 1] - row[0]).argmin() for row in noise]
    assert all(np.allclose(hum[i:i + RATE], row, atol=1e-6) for i, row in zip(places, noise, strict=True))
    assert len(set(places)) == 10
    (folder / "deep" / "hum.wav").unlink()
    for bad in (folder, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="--noise-dir"):
            noise_recordings(bad, tmp_path / "cache")
