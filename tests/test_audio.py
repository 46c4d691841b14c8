"""Decoding, against soundfile and soxr on the whole file, and broken files of many kinds."""
import os

import numpy as np
import pytest
import soundfile as sf
import soxr

from data.audio import AudioError, check, clip_range, fit, length_at, probe, read, tile_starts

RNG = np.random.default_rng(0)


def write(path, rate=48000, seconds=3.0, channels=1, subtype=None):
    wave = 0.2 * RNG.standard_normal((int(seconds * rate), channels))
    sf.write(path, wave, rate, subtype=subtype)
    return path


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 44101, 48000, 96000])
@pytest.mark.parametrize("target", [16000, 22050])
def test_a_clip_equals_that_range_of_the_whole_file_resampled(tmp_path, rate, target):
    path = write(tmp_path / "a.wav", rate, channels=2, subtype="FLOAT")
    whole = sf.read(path, dtype="float32")[0].mean(axis=1)
    if rate != target:
        whole = soxr.resample(whole, rate, target, quality="HQ")
    assert abs(len(whole) - length_at(probe(path), target)) <= 1
    for start in (0, 1, 777, target, 2 * target + 5):
        clip = read(path, target, start, 9000)
        assert clip.dtype == np.float32
        assert len(clip) == 9000
        np.testing.assert_allclose(clip, whole[start:start + 9000], atol=1e-5)
    wave = read(path, target)
    np.testing.assert_allclose(wave, whole[:len(wave)], atol=1e-5)


@pytest.mark.parametrize("name, subtype", [
    ("a.wav", "PCM_U8"), ("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "PCM_32"),
    ("a.wav", "FLOAT"), ("a.wav", "DOUBLE"), ("a.flac", "PCM_16"), ("a.flac", "PCM_24"),
    ("a.ogg", "VORBIS"), ("a.ogg", "OPUS"), ("a.mp3", "MPEG_LAYER_III"), ("a.aiff", "PCM_16"),
])
def test_formats(tmp_path, name, subtype):
    path = write(tmp_path / name, 48000, channels=2, subtype=subtype)
    info = check(path)
    assert (info.rate, info.channels) == (48000, 2)
    assert info.seconds == pytest.approx(3, abs=0.1)
    whole = read(path, 22050)
    assert np.isfinite(whole).all()
    assert 0.05 < whole.std() < 0.3
    np.testing.assert_allclose(read(path, 22050, 20000, 5000), whole[20000:25000], atol=2e-4)


def test_mp3_inside_wav(tmp_path):
    mp3 = write(tmp_path / "a.mp3", 44100).read_bytes()

    def integer(value, size):
        return value.to_bytes(size, "little")

    format_chunk = (integer(0x55, 2) + integer(1, 2) + integer(44100, 4) + integer(16000, 4)
                    + integer(1, 2) + integer(0, 2) + integer(12, 2) + integer(1, 2)
                    + integer(2, 4) + integer(417, 2) + integer(1, 2) + integer(1393, 2))
    content = (b"RIFF" + integer(50 + len(mp3), 4) + b"WAVE"
               + b"fmt " + integer(len(format_chunk), 4) + format_chunk
               + b"data" + integer(len(mp3), 4) + mp3)
    path = tmp_path / "inside.wav"
    path.write_bytes(content)
    assert len(read(path, 22050)) == pytest.approx(3 * 22050, rel=0.05)


def test_64_channels_become_one(tmp_path):
    assert read(write(tmp_path / "a.wav", 16000, channels=64), 16000).shape == (48000,)


def write_header_only(path):
    path.write_bytes(write(path).read_bytes()[:44])


def write_nan(path):
    wave = np.zeros(16000, np.float32)
    wave[9000] = np.nan
    sf.write(path, wave, 16000, subtype="FLOAT")


def write_0_hz(path):
    content = bytearray(write(path).read_bytes())
    content[24:28] = bytes(4)
    path.write_bytes(content)


BROKEN = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello, I am not audio\n" * 50),
    "header only": write_header_only,
    "no samples": lambda path: sf.write(path, np.zeros(0), 16000),
    "nan": write_nan,
    "0 Hz": write_0_hz,
    "folder": lambda path: path.mkdir(),
    "dangling link": lambda path: path.symlink_to(path.with_name("missing.wav")),
    "fifo": os.mkfifo,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_raise_with_a_reason_of_one_line(tmp_path, kind):
    path = tmp_path / "a.wav"
    BROKEN[kind](path)
    for use in (check, lambda path: read(path, 22050)):
        with pytest.raises(AudioError) as caught:
            use(path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)  # the caller adds the name


def test_a_header_that_declares_too_much(tmp_path):
    path = write(tmp_path / "a.wav", 16000)
    content = bytearray(path.read_bytes())
    content[40:44] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    try:
        info = check(path)
    except AudioError:
        return
    assert info.frames == 48000  # libsndfile may correct the length by the size of the file


def test_names_that_are_not_utf8(tmp_path):
    raw = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        with open(raw, "wb") as file:
            file.write(write(tmp_path / "a.wav", 16000).read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert check(os.fsdecode(raw)).frames == 48000


def test_a_clip_beyond_the_end_is_refused(tmp_path):
    path = write(tmp_path / "a.wav", 16000)
    with pytest.raises(AudioError, match=r"3\.00 s"):
        read(path, 16000, 60000, 100)
    with pytest.raises(AudioError, match=r"3\.00 s"):
        read(path, 16000, 47000, 1161)
    assert len(read(path, 16000, 47000, 1160)) == 1000  # times in seconds are rounded to 10 ms


def test_clip_range():
    assert clip_range(48000, 100, None, 16000) == (100, 48000)
    assert clip_range(48000, 100, 200, 16000) == (100, 300)
    assert clip_range(48000, 47000, 1160, 16000) == (47000, 48000)


def test_fit_repeats_pads_and_cuts():
    wave = np.arange(1, 4, dtype=np.float32)
    assert fit(wave, 7, "repeat").tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert fit(wave, 5, "pad").tolist() == [1, 2, 3, 0, 0]
    assert fit(wave, 2, "pad").tolist() == [1, 2]


def test_tiles_cover_every_sample_and_need_no_padding():
    for total in range(1, 60):
        starts = tile_starts(total, 10)
        covered = {i for start in starts for i in range(start, start + 10)}
        assert covered >= set(range(total))
        assert total <= 10 or max(covered) == total - 1
    assert tile_starts(25, 10) == [0, 10, 15]
