"""The cache of decoded audio: same samples from every mode, no stale or incomplete entries."""
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr
import torch

import data.cache
from data.audio import AudioError, read
from data.cache import HEADER, WaveCache, choose_cache, quantise
from data.clips import Clips, CropKey, TileKey, TrainLoader, evaluation_batches
from data.load import load_manifest
from data.scan import scan

RATE = 16000


@pytest.fixture
def manifest(tmp_path):
    """Eight clips of 0.05 to 0.75 s: PCM 16 at RATE or float at 22,050 Hz, two in one file.

    Clip 2 is louder than full scale, clip 4 very quiet.
    """
    rng = np.random.default_rng(0)
    level = {2: 3, 4: 1e-4}
    for i in range(7):
        rate, subtype = (RATE, "PCM_16") if i % 2 else (22050, "FLOAT")
        wave = rng.uniform(-1, 1, int((0.05 + 0.1 * i) * rate)) * level.get(i, 0.9)
        sf.write(tmp_path / f"{i}.wav", wave, rate, subtype=subtype)
    table = ["path,label,start,end"]
    table += [f"{i}.wav,{'ab'[i % 2]},0," for i in range(6)]
    table += ["6.wav,a,0.1,0.3", "6.wav,b,0.25,0.65"]
    (tmp_path / "clips.csv").write_text("\n".join(table))
    manifest = load_manifest(tmp_path / "clips.csv")
    manifest.duration = scan(manifest, None, full=True).duration
    return manifest


def clips_of(manifest, folder=None, write=True):
    cache = WaveCache(folder, RATE, write) if folder else None
    return Clips(manifest, RATE, 4800, seed=3, cache=cache)


def in_memory(manifest, folder):
    clips = clips_of(manifest, folder)
    clips.load_into_memory(torch.device("cpu"))
    return clips


def first_tiles(clips):
    return [TileKey(row, 0) for row in range(len(clips))]


def all_waves(clips, workers=0):
    """The waves of two epochs of training and of an evaluation, in one tensor."""
    rows = np.arange(len(clips))
    loader = TrainLoader(clips, rows, 3, 6, seed=3, workers=workers)
    batches = []
    for epoch in (0, 1):
        for micro_batches in loader.steps(epoch):
            batches += micro_batches
    batches += evaluation_batches(clips, rows, 3, workers=workers)
    assert not any(batch.broken for batch in batches)
    return torch.cat([batch.wave for batch in batches])


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_quantised_samples_against_float64():
    rng = np.random.default_rng(0)
    for level in (1.0, 1e-4, 32767 / 32768, 3.0, 1e9, 2.0**-40):
        wave = (rng.uniform(-level, level, 5000)).astype(np.float32)
        samples, scale = quantise(wave)
        assert samples.dtype == np.int16
        assert np.log2(scale) == np.round(np.log2(scale))
        error = np.abs(samples.astype(np.float64) * scale - wave.astype(np.float64)).max()
        assert error <= scale / 2
        assert scale <= 2 * np.abs(wave).max() / 32767  # at least 15 of the 16 bits are used


def test_quantised_extremes():
    assert quantise(np.zeros(3, np.float32))[0].tolist() == [0, 0, 0]
    extremes = np.array([-1, 32767 / 32768], np.float32)
    samples, scale = quantise(extremes)
    assert np.array_equal(samples * np.float32(scale), extremes)
    # 32768 would overflow, so the scale doubles.
    assert quantise(np.array([1.0], np.float32))[0].tolist() == [16384]


def test_all_modes_give_the_same_samples(manifest, tmp_path):
    folder = tmp_path / "cache"
    waves = all_waves(clips_of(manifest, folder))
    assert len(entries(folder)) == 8
    assert not torch.equal(waves.roll(1, 0), waves)  # control: the clips differ
    assert torch.equal(all_waves(clips_of(manifest, folder)), waves)  # from the files
    assert torch.equal(all_waves(clips_of(manifest, folder), workers=2), waves)
    assert torch.equal(all_waves(clips_of(manifest, tmp_path / "unwritten", write=False)), waves)
    assert torch.equal(all_waves(in_memory(manifest, folder)), waves)
    assert not (tmp_path / "unwritten").exists()


class FakeGPUTensor:
    """Samples on the CPU that claim to be on a GPU."""

    def __init__(self, samples):
        self.samples = samples
        self.device = namedtuple("device", "type")("cuda")


@pytest.mark.parametrize("short", ["repeat", "pad"])
def test_samples_against_soundfile_and_soxr(manifest, tmp_path, short):
    """Each clip against its range of the whole file, to half a step of its own scale."""
    clips = Clips(manifest, RATE, 16000, short, cache=WaveCache(tmp_path / "cache", RATE))
    for row, wave in enumerate(clips.batch(first_tiles(clips)).wave.numpy()):
        whole, rate = sf.read(manifest.file(row), dtype="float64")
        whole = soxr.resample(whole, rate, RATE)[:len(whole) * RATE // rate]
        begin = round(float(manifest.start[row]) * RATE)
        expected = whole[begin:begin + round(float(manifest.duration[row]) * RATE)]
        n, peak = len(expected), np.abs(expected).max()
        assert np.abs(wave[:n] - expected).max() < 2e-5 * peak + peak / 32767
        rest = np.resize(wave[:n], 16000)[n:] if short == "repeat" else np.zeros(16000 - n)
        assert np.array_equal(wave[n:], rest)


@pytest.mark.parametrize("short", ["repeat", "pad"])
def test_clips_in_memory_are_cut_as_from_files(manifest, tmp_path, short, monkeypatch):
    clips = Clips(manifest, RATE, 16000, short, cache=WaveCache(tmp_path / "cache", RATE))
    expected = clips.batch(first_tiles(clips)).wave
    clips.load_into_memory(torch.device("cpu"))
    assert torch.equal(clips.batch(first_tiles(clips)).wave, expected)

    gather = data.cache._gather  # the code for GPUs
    monkeypatch.setattr(data.cache, "_gather", lambda flat, *rest: gather(flat.samples, *rest))
    clips.in_memory._samples = FakeGPUTensor(clips.in_memory._samples)
    assert torch.equal(clips.batch(first_tiles(clips)).wave, expected)


def test_16_bit_recordings_at_the_models_rate_stay_the_same(manifest, tmp_path):
    pcm16_rows = [row for row, path in enumerate(manifest.paths) if path[0] in "135"]
    assert len(pcm16_rows) == 3
    keys = [CropKey(row, epoch=0) for row in pcm16_rows]
    cached = clips_of(manifest, tmp_path / "cache").batch(keys)
    assert torch.equal(cached.wave, clips_of(manifest).batch(keys).wave)


def test_a_changed_recording_is_decoded_again(manifest, tmp_path):
    folder, file, key = tmp_path / "cache", manifest.file(5), TileKey(5, 0)
    clips = clips_of(manifest, folder)
    old_wave = clips.batch([key]).wave
    old_entries = entries(folder)
    status = os.stat(file)
    wave, rate = sf.read(file)
    sf.write(file, wave[::-1], rate, subtype="PCM_16")  # the same size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    expected = torch.from_numpy(read(file, RATE, 0, 4800))[None]
    assert not torch.equal(expected, old_wave)
    for other in (clips, clips_of(manifest, folder)):
        assert torch.equal(other.batch([key]).wave, expected)
    assert entries(folder) == old_entries  # replaced


def flip_bit(content, position, bit):
    content = bytearray(content)
    content[position] ^= bit
    return bytes(content)


DAMAGE = {
    "cut": lambda content: content[:-2],
    "empty": lambda content: b"",
    "flipped sample": lambda content: flip_bit(content, HEADER.size + 11, 4),
    "flipped header": lambda content: flip_bit(content, 2, 1),
    "flipped scale": lambda content: flip_bit(content, 46, 1),  # twice or half as loud
    "zeros": lambda content: bytes(len(content)),  # after a power cut
    "longer": lambda content: content + b"xx",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_corrupt_entry_is_ignored_and_replaced(manifest, tmp_path, kind):
    folder, keys = tmp_path / "cache", [TileKey(3, 0)]
    expected = clips_of(manifest, folder).batch(keys).wave
    [entry] = entries(folder)
    good = entry.read_bytes()
    entry.write_bytes(DAMAGE[kind](good))
    clips = clips_of(manifest, folder)
    assert torch.equal(clips.batch(keys).wave, expected)
    assert clips.cache.problem is None
    assert entry.read_bytes() == good


def test_a_folder_in_place_of_an_entry_disables_caching(manifest, tmp_path):
    folder, keys = tmp_path / "cache", [TileKey(3, 0)]
    expected = clips_of(manifest, folder).batch(keys).wave
    [entry] = entries(folder)
    entry.unlink()
    entry.mkdir()
    clips = clips_of(manifest, folder)
    assert torch.equal(clips.batch(keys).wave, expected)
    assert str(folder) in clips.cache.problem


def test_control_without_checksum_a_flipped_bit_changes_samples(manifest, tmp_path, monkeypatch):
    folder, keys = tmp_path / "cache", [TileKey(3, 0)]
    expected = clips_of(manifest, folder).batch(keys).wave
    [entry] = entries(folder)
    damaged = DAMAGE["flipped sample"](entry.read_bytes())
    entry.write_bytes(damaged)
    stored_checksum = HEADER.unpack(damaged[:HEADER.size])[-1]
    monkeypatch.setattr(data.cache, "_checksum", lambda *_: stored_checksum)
    assert not torch.equal(clips_of(manifest, folder).batch(keys).wave, expected)


def fake_disk_usage(path):
    return namedtuple("usage", "total used free")(10**12, 10**12, 10**6)


def raise_disk_full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("module, function, replacement", [
    (shutil, "disk_usage", fake_disk_usage),
    (os, "replace", raise_disk_full),
    (data.cache.tempfile, "mkstemp", raise_disk_full),
])
def test_a_full_disk_only_disables_caching(
    manifest, tmp_path, monkeypatch, module, function, replacement
):
    folder = tmp_path / "cache"
    expected = all_waves(clips_of(manifest, tmp_path / "other"))
    monkeypatch.setattr(module, function, replacement)
    clips = clips_of(manifest, folder)
    assert torch.equal(all_waves(clips), expected)
    assert entries(folder) == []
    assert str(folder) in clips.cache.problem
    assert clips.batch([TileKey(0, 0)]).cache_problem == clips.cache.problem


def test_threads_share_the_last_clip_safely(manifest, tmp_path):
    clips = clips_of(manifest, tmp_path / "cache", write=False)
    rows = list(range(len(manifest))) * 40
    expected = [clips.batch([TileKey(row, 0)]).wave for row in range(len(manifest))]
    with ThreadPoolExecutor(8) as pool:
        batches = pool.map(lambda row: clips.batch([TileKey(row, 0)]), rows)
        for row, batch in zip(rows, batches):
            assert torch.equal(batch.wave, expected[row])


def test_a_recording_that_changes_during_decoding_is_not_cached(manifest, tmp_path, monkeypatch):
    def read_and_touch(path, *args):
        wave = read(path, *args)
        os.utime(path, (1, 1))
        return wave

    monkeypatch.setattr(data.cache, "read", read_and_touch)
    clips = clips_of(manifest, tmp_path / "cache")
    assert len(clips.batch([TileKey(0, 0)]).rows) == 1
    assert entries(tmp_path / "cache") == []


def test_missing_and_broken_files_are_reported(manifest, tmp_path):
    Path(manifest.file(0)).unlink()
    Path(manifest.file(1)).write_bytes(b"RIFF nothing")
    folder = tmp_path / "cache"
    for clips in (clips_of(manifest, folder), in_memory(manifest, folder)):
        batch = clips.batch(first_tiles(clips))
        assert [row for row, _ in batch.broken] == [0, 1]
        assert "opened" in batch.broken[0][1]
        assert batch.rows.tolist() == list(range(2, 8))
        assert len(batch.wave) == len(batch.target) == 6


def test_a_recording_that_became_shorter_raises(manifest, tmp_path):
    with pytest.raises(AudioError, match="before the requested end"):
        WaveCache(tmp_path / "cache", RATE).read(manifest.file(2), 0, 99999)


def test_only_the_needed_part_of_a_long_clip_is_read(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("data.clips.MAX_SECONDS", 0.2)
    keys = [TileKey(5, 100)]
    wave = clips_of(manifest, tmp_path / "cache").batch(keys).wave
    assert torch.equal(wave, clips_of(manifest).batch(keys).wave)
    assert entries(tmp_path / "cache") == []


def test_choose_cache(tmp_path, monkeypatch):
    folder = tmp_path / "not/there/yet"

    def mode(asked, size, device="cpu", longest=10):
        return choose_cache(asked, size, longest, torch.device(device), folder)[0]

    assert mode("auto", 10**6) == "disk"
    assert mode("auto", 10**16) == "off"
    for asked in ("off", "disk", "ram", "device"):
        assert mode(asked, 10**16) == asked
    assert mode("ram", 10**6, longest=10**4) == "disk"  # a clip too long for the cache
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 8 * 10**9))
    assert mode("auto", 2 * 10**9, "cuda") == "device"
    assert mode("auto", 3 * 10**9, "cuda") == "disk"
    assert mode("device", 4 * 10**9, "cuda") == "device"
    assert mode("device", 5 * 10**9, "cuda") == "disk"
    monkeypatch.setattr(shutil, "disk_usage", fake_disk_usage)
    assert mode("auto", 10**6) == "off"


def test_pin_memory_pins_every_tensor(manifest, monkeypatch):
    """DataLoader pins no tensors of classes that it does not know."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 0)
    clips = Clips(manifest, RATE, 4800)
    clips.set_noise(1.0, [0, 1])
    batch = clips.batch([CropKey(2, epoch=0), CropKey(3, epoch=0)])
    pinned = batch.pin_memory()
    for name in ("wave", "target", "noise"):
        assert torch.equal(getattr(pinned, name), getattr(batch, name))
        assert getattr(pinned, name) is not getattr(batch, name)
    assert pinned.rows is batch.rows
    assert pinned.clip_ids is batch.clip_ids
    assert pinned.broken == batch.broken
