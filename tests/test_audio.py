"""Decoding against soundfile and soxr on the whole file, and every broken file that we could think of."""
import os

import numpy as np
import pytest
import soundfile as sf
import soxr

from data.audio import AudioError, check, fit, length_at, probe, read, tile_starts

RNG = np.random.default_rng(0)


def write(path, rate=48000, seconds=3.0, channels=1, subtype=None, format=None):
    wave = 0.2 * RNG.standard_normal((int(seconds * rate), channels))
    sf.write(path, wave, rate, subtype=subtype, format=format)
    return path


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 44101, 48000, 96000])
@pytest.mark.parametrize("target", [16000, 22050])
def test_a_stretch_equals_that_stretch_of_the_whole_resampled(tmp_path, rate, target):
    path = write(tmp_path / "a.wav", rate, channels=2, subtype="FLOAT")
    mono = sf.read(path, dtype="float32")[0].mean(axis=1)
    whole = soxr.resample(mono, rate, target, quality="HQ") if rate != target else mono
    assert abs(len(whole) - length_at(probe(path), target)) <= 1
    for start in (0, 1, 777, target, 2 * target + 5):
        part = read(path, target, start, 9000)
        assert part.dtype == np.float32 and len(part) == 9000
        np.testing.assert_allclose(part, whole[start:start + 9000], atol=1e-5)
    np.testing.assert_allclose(read(path, target), whole[:len(read(path, target))], atol=1e-5)


@pytest.mark.parametrize("name, subtype", [
    ("a.wav", "PCM_U8"), ("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "PCM_32"), ("a.wav", "FLOAT"),
    ("a.wav", "DOUBLE"), ("a.flac", "PCM_16"), ("a.flac", "PCM_24"), ("a.ogg", "VORBIS"), ("a.ogg", "OPUS"),
    ("a.mp3", "MPEG_LAYER_III"), ("a.aiff", "PCM_16")])
def test_formats(tmp_path, name, subtype):
    path = write(tmp_path / name, 48000, channels=2, subtype=subtype)
    info = check(path)
    assert (info.rate, info.channels) == (48000, 2) and info.seconds == pytest.approx(3, abs=0.1)
    whole = read(path, 22050)
    assert np.isfinite(whole).all() and 0.05 < whole.std() < 0.3
    np.testing.assert_allclose(read(path, 22050, 20000, 5000), whole[20000:25000], atol=2e-4)


def test_mp3_inside_wav(tmp_path):
    mp3 = write(tmp_path / "a.mp3", 44100).read_bytes()
    head = b"RIFF" + (50 + len(mp3)).to_bytes(4, "little") + b"WAVEfmt " + (30).to_bytes(4, "little")
    fmt = (b"\x55\0" + b"\1\0" + (44100).to_bytes(4, "little") + (16000).to_bytes(4, "little") + b"\1\0\0\0"
           + (12).to_bytes(2, "little") + b"\1\0" + b"\2\0\0\0" + (417).to_bytes(2, "little") + b"\1\0" + b"\x71\5")
    path = tmp_path / "inside.wav"
    path.write_bytes(head + fmt + b"data" + len(mp3).to_bytes(4, "little") + mp3)
    assert len(read(path, 22050)) == pytest.approx(3 * 22050, rel=0.05)


def test_64_channels_become_one(tmp_path):
    assert read(write(tmp_path / "a.wav", 16000, channels=64), 16000).shape == (48000,)


def damaged(folder, kind):
    path = folder / "a.wav"
    if kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello, I am not audio\n" * 50)
    elif kind == "header only":
        path.write_bytes(write(path).read_bytes()[:44])
    elif kind == "no samples":
        sf.write(path, np.zeros(0), 16000)
    elif kind == "truncated flac":
        data = write(folder / "b.flac").read_bytes()
        path.write_bytes(data[:len(data) // 2])
    elif kind == "nan":
        wave = np.zeros(16000, np.float32)
        wave[9000] = np.nan
        sf.write(path, wave, 16000, subtype="FLOAT")
    elif kind == "0 Hz":
        data = bytearray(write(path).read_bytes())
        data[24:28] = bytes(4)
        path.write_bytes(data)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(folder / "nowhere.wav")
    elif kind == "fifo":
        os.mkfifo(path)
    return path


@pytest.mark.parametrize("kind", ["zero bytes", "text", "header only", "no samples", "truncated flac", "nan", "0 Hz",
                                  "folder", "dangling link", "fifo"])
def test_broken_files_say_why(tmp_path, kind):
    path = damaged(tmp_path, kind)
    for use in (check, lambda path: read(path, 22050)):
        with pytest.raises(AudioError) as caught:
            use(path)
        assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_header_that_promises_too_much(tmp_path):
    data = bytearray(write(tmp_path / "a.wav", 16000).read_bytes())
    data[40:44] = (2**31).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    try:
        info = check(tmp_path / "a.wav")  # libsndfile may correct the length by the size of the file
    except AudioError:
        return
    assert info.frames == 48000


def test_names_that_are_not_utf8(tmp_path):
    raw = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        with open(raw, "wb") as file:
            file.write(write(tmp_path / "a.wav", 16000).read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert check(os.fsdecode(raw)).frames == 48000


def test_start_beyond_the_end(tmp_path):
    with pytest.raises(AudioError, match="ends at 3.00 s"):
        read(write(tmp_path / "a.wav", 16000), 16000, 60000, 100)


def test_short_clips():
    wave = np.arange(1, 4, dtype=np.float32)
    assert fit(wave, 7, "repeat").tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert fit(wave, 5, "pad").tolist() == [1, 2, 3, 0, 0]
    assert fit(wave, 2, "pad").tolist() == [1, 2]


def test_tiles_hear_every_sample_and_pad_none():
    for total in range(1, 60):
        starts = tile_starts(total, 10)
        heard = {i for start in starts for i in range(start, start + 10)}
        assert heard >= set(range(total))
        assert total <= 10 or max(heard) == total - 1
    assert tile_starts(25, 10) == [0, 10, 15]
