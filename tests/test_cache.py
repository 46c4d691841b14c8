"""The cache of decoded audio: same samples from everywhere, nothing stale, nothing half written, nothing in the way."""
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
from data.cache import HEAD, WaveCache, choose_cache, quantise
from data.clips import Clips, TrainLoader, evaluation_batches
from data.load import load_manifest
from data.scan import scan

RATE = 16000


@pytest.fixture
def manifest(tmp_path):
    """Eight clips of 0.05 to 0.75 s, PCM 16 at RATE and float at 22,050 Hz, loud and very quiet, two out of one file."""
    rng, rows = np.random.default_rng(0), ["path,label,start,end"]
    for i in range(7):
        rate = RATE if i % 2 else 22050
        wave = rng.uniform(-1, 1, int((0.05 + 0.1 * i) * rate)) * (1e-4 if i == 4 else 3 if i == 2 else 0.9)
        sf.write(tmp_path / f"{i}.wav", wave, rate, subtype="PCM_16" if i % 2 else "FLOAT")
        rows += [f"{i}.wav,{'ab'[i % 2]},0,"] if i < 6 else ["6.wav,a,0.1,0.3", "6.wav,b,0.25,0.65"]
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    found = load_manifest(tmp_path / "clips.csv")
    found.duration = scan(found, None, full=True).duration
    return found


def clips_of(manifest, folder=None, **how):
    return Clips(manifest, RATE, 4800, seed=3, cache=WaveCache(folder, RATE, **how) if folder else None)


def sound(clips, workers=0):
    """Two epochs of training batches and the evaluation's, in one tensor."""
    loader = TrainLoader(clips, np.arange(len(clips)), 3, 6, seed=3, workers=workers)
    batches = [batch for epoch in (0, 1) for window in loader.windows(epoch) for batch in window]
    batches += evaluation_batches(clips, np.arange(len(clips)), 3, workers=workers)
    assert not any(batch.broken for batch in batches)
    return torch.cat([batch.wave for batch in batches])


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_quantised_samples_against_float64():
    rng = np.random.default_rng(0)
    for loud in (1.0, 1e-4, 32767 / 32768, 3.0, 1e9, 2.0**-40):
        wave = (rng.uniform(-loud, loud, 5000)).astype(np.float32)
        samples, scale = quantise(wave)
        assert samples.dtype == np.int16 and np.log2(scale) == np.round(np.log2(scale))
        error = np.abs(samples.astype(np.float64) * scale - wave.astype(np.float64)).max()
        assert error <= scale / 2 and scale <= 2 * np.abs(wave).max() / 32767  # at least 15 of the 16 bits are used
    assert quantise(np.zeros(3, np.float32))[0].tolist() == [0, 0, 0]
    ends = np.array([-1, 32767 / 32768], np.float32)
    assert np.array_equal(quantise(ends)[0] * np.float32(quantise(ends)[1]), ends)
    assert quantise(np.array([1.0], np.float32))[0].tolist() == [16384]  # one bit less, or it would run over


def test_the_same_samples_from_everywhere(manifest, tmp_path):
    first = sound(clips_of(manifest, tmp_path / "cache"))
    assert len(entries(tmp_path / "cache")) == 8
    assert torch.equal(sound(clips_of(manifest, tmp_path / "cache")), first)  # from the disk
    assert torch.equal(sound(clips_of(manifest, tmp_path / "cache"), workers=2), first)
    assert torch.equal(sound(clips_of(manifest, tmp_path / "other", write=False)), first)  # decoded each time
    resident = clips_of(manifest, tmp_path / "cache")
    resident.reside(torch.device("cpu"))
    assert torch.equal(sound(resident), first)
    assert not (tmp_path / "other").exists()
    assert not torch.equal(sound(clips_of(manifest, tmp_path / "cache")).roll(1, 0), first)


class OnGPU:
    """Samples that are taken in one go, by index, as if they were on a GPU."""

    def __init__(self, samples):
        self.samples, self.device = samples, namedtuple("device", "type")("cuda")


@pytest.mark.parametrize("short", ["repeat", "pad"])
def test_against_another_decoder(manifest, tmp_path, short, monkeypatch):
    """Each clip against soundfile and soxr over the whole file, to half a step of its own scale."""
    clips = Clips(manifest, RATE, 16000, short, cache=WaveCache(tmp_path / "cache", RATE))
    resident = Clips(manifest, RATE, 16000, short, cache=WaveCache(tmp_path / "cache", RATE))
    resident.reside(torch.device("cpu"))
    keys = [(row, 0) for row in range(len(manifest))]
    for row, wave in enumerate(clips.batch(keys).wave.numpy()):
        whole, rate = sf.read(manifest.file(row), dtype="float64")
        whole = soxr.resample(whole, rate, RATE)[:len(whole) * RATE // rate]
        begin = round(float(manifest.start[row]) * RATE)
        want = whole[begin:begin + round(float(manifest.duration[row]) * RATE)]
        assert np.abs(wave[:len(want)] - want).max() < 2e-5 * np.abs(want).max() + np.abs(want).max() / 32767
        assert np.array_equal(wave[len(want):], np.resize(wave[:len(want)], 16000)[len(want):] if short == "repeat" else
                              np.zeros(16000 - len(want)))
    assert torch.equal(resident.batch(keys).wave, clips.batch(keys).wave)
    gather = data.cache._gather
    monkeypatch.setattr(data.cache, "_gather", lambda flat, *how: gather(flat.samples, *how))  # the way that a GPU goes
    resident.resident._samples = OnGPU(resident.resident._samples)
    assert torch.equal(resident.batch(keys).wave, clips.batch(keys).wave)


def test_16_bit_recordings_at_the_rate_are_kept_bit_for_bit(manifest, tmp_path):
    keys = [(row, -1) for row in range(len(manifest)) if manifest.paths[row] in ("1.wav", "3.wav", "5.wav")]
    cached, direct = clips_of(manifest, tmp_path / "cache").batch(keys), clips_of(manifest).batch(keys)
    assert len(keys) == 3 and torch.equal(cached.wave, direct.wave)


def test_a_changed_recording_is_decoded_anew(manifest, tmp_path):
    clips, folder = clips_of(manifest, tmp_path / "cache"), tmp_path / "cache"
    old = clips.batch([(5, 0)]).wave
    there = entries(folder)
    status = os.stat(manifest.file(5))
    wave, rate = sf.read(manifest.file(5))
    sf.write(manifest.file(5), wave[::-1], rate, subtype="PCM_16")  # the same size
    os.utime(manifest.file(5), ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    for again in (clips, clips_of(manifest, folder)):
        assert torch.equal(again.batch([(5, 0)]).wave, torch.from_numpy(read(manifest.file(5), RATE, 0, 4800))[None])
    assert not torch.equal(clips.batch([(5, 0)]).wave, old) and entries(folder) == there  # it took the old one's place


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "head", "scale", "zeros", "longer", "a folder"])
def test_a_damaged_entry_is_not_believed(manifest, tmp_path, damage):
    folder = tmp_path / "cache"
    want = clips_of(manifest, folder).batch([(3, 0)]).wave
    [entry] = entries(folder)
    content = bytearray(entry.read_bytes())
    if damage == "flip":
        content[HEAD.size + 11] ^= 4
    elif damage == "head":
        content[2] ^= 1
    elif damage == "scale":
        content[46] ^= 1  # the exponent of the scale: twice as loud, or half
    elif damage == "zeros":  # a power cut after the rename
        content = bytearray(len(content))
    damaged = {"cut": content[:-2], "empty": b"", "longer": content + b"xx"}.get(damage, content)
    entry.write_bytes(damaged)
    if damage == "a folder":
        entry.unlink()
        entry.mkdir()
    clips = clips_of(manifest, folder)
    assert torch.equal(clips.batch([(3, 0)]).wave, want)
    if damage == "a folder":
        assert "kept no more" in clips.cache.trouble
    else:
        assert clips.cache.trouble is None and bytes(entry.read_bytes()) != bytes(damaged)  # and mended


def test_without_the_checksum_a_flipped_bit_would_be_heard(manifest, tmp_path, monkeypatch):
    """The control."""
    want = clips_of(manifest, tmp_path / "cache").batch([(3, 0)]).wave
    [entry] = entries(tmp_path / "cache")
    content = bytearray(entry.read_bytes())
    content[HEAD.size + 11] ^= 4
    entry.write_bytes(content)
    monkeypatch.setattr(data.cache, "_checksum", lambda *_: HEAD.unpack(content[:HEAD.size])[-1])
    assert not torch.equal(clips_of(manifest, tmp_path / "cache").batch([(3, 0)]).wave, want)


def no_space(path):
    return namedtuple("usage", "total used free")(10**12, 10**12, 10**6)


def no_write(*args, **how):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where, what", [("shutil.disk_usage", no_space), ("os.replace", no_write), ("tempfile.mkstemp", no_write)])
def test_a_full_disk_costs_time_alone(manifest, tmp_path, monkeypatch, where, what):
    want = sound(clips_of(manifest, tmp_path / "other"))
    module, name = where.split(".")
    monkeypatch.setattr(getattr(data.cache, module), name, what)
    clips = clips_of(manifest, tmp_path / "cache")
    assert torch.equal(sound(clips), want) and entries(tmp_path / "cache") == []
    assert clips.batch([(0, 0)]).trouble == clips.cache.trouble and "kept no more" in clips.cache.trouble


def test_threads_and_a_single_slot(manifest, tmp_path):
    """Many threads that decode at once, with nothing written, get each its own clip."""
    clips = clips_of(manifest, tmp_path / "cache", write=False)
    rows = [row for _ in range(40) for row in range(len(manifest))]
    want = [clips.batch([(row, 0)]).wave for row in range(len(manifest))]
    with ThreadPoolExecutor(8) as pool:
        for row, batch in zip(rows, pool.map(lambda row: clips.batch([(row, 0)]), rows), strict=True):
            assert torch.equal(batch.wave, want[row])


def test_a_recording_that_changes_while_it_is_decoded_is_not_kept(manifest, tmp_path, monkeypatch):
    def slowly(path, *how):
        wave = read(path, *how)
        os.utime(path, (1, 1))
        return wave
    monkeypatch.setattr(data.cache, "read", slowly)
    clips = clips_of(manifest, tmp_path / "cache")
    assert len(clips.batch([(0, 0)]).rows) == 1 and not entries(tmp_path / "cache")


def test_what_is_lost_or_broken_is_named(manifest, tmp_path):
    Path(manifest.file(0)).unlink()
    Path(manifest.file(1)).write_bytes(b"RIFF nothing")
    resident = clips_of(manifest, tmp_path / "cache")
    resident.reside(torch.device("cpu"))
    for clips in (clips_of(manifest, tmp_path / "cache"), resident):
        batch = clips.batch([(row, 0) for row in range(len(manifest))])
        assert [row for row, _ in batch.broken] == [0, 1] and "opened" in batch.broken[0][1]
        assert batch.rows.tolist() == list(range(2, 8)) and len(batch.wave) == len(batch.target) == 6
    with pytest.raises(AudioError, match="before the wanted end"):  # it has become shorter
        clips.cache.read(manifest.file(2), 0, 99999)


def test_a_long_clip_is_read_by_the_stretch(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("data.clips.LONGEST", 0.2)
    assert torch.equal(clips_of(manifest, tmp_path / "cache").batch([(5, 100)]).wave, clips_of(manifest).batch([(5, 100)]).wave)
    assert entries(tmp_path / "cache") == []


def test_the_choice(tmp_path, monkeypatch):
    cpu, folder = torch.device("cpu"), tmp_path / "not/there/yet"
    assert choose_cache("auto", 10**6, 10, cpu, folder)[0] == "disk"
    assert choose_cache("auto", 10**16, 10, cpu, folder)[0] == "off"
    for mode in ("off", "disk", "ram", "device"):
        assert choose_cache(mode, 10**16, 10, cpu, folder)[0] == mode
    assert choose_cache("ram", 10**6, 10**4, cpu, folder)[0] == "disk"  # a clip longer than may be cached
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 8 * 10**9))
    gpu = torch.device("cuda")
    assert [choose_cache("auto", size, 10, gpu, folder)[0] for size in (2 * 10**9, 3 * 10**9)] == ["device", "disk"]
    assert [choose_cache("device", size, 10, gpu, folder)[0] for size in (4 * 10**9, 5 * 10**9)] == ["device", "disk"]
    monkeypatch.setattr(shutil, "disk_usage", no_space)
    assert choose_cache("auto", 10**6, 10, cpu, folder)[0] == "off"


def test_pinning_keeps_everything(manifest, monkeypatch):
    """What DataLoader calls on a batch; a tensor that it did not know stayed unpinned."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 0)
    clips = Clips(manifest, RATE, 4800)
    clips.add_noise(1.0, [0, 1])
    batch = clips.batch([(2, -1), (3, -1)])
    pinned = batch.pin_memory()
    for name in ("wave", "target", "noise"):
        assert torch.equal(getattr(pinned, name), getattr(batch, name)) and getattr(pinned, name) is not getattr(batch, name)
    assert pinned.rows is batch.rows and pinned.clips is batch.clips and pinned.broken == batch.broken
