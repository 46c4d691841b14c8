"""Headers that lie, hang or promise too much; each is bounded in time and memory."""
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import data.audio_file
from data.audio import AudioError, check, probe, read
from data.clips import Clips, TileKey
from data.containers import _mp3_frame
from data.files import IgnoredFiles, find_audio
from data.scan import scan, summary
from data.stream import Windows, find_recordings, read_headers, read_windows

sys.path.insert(0, str(Path(__file__).parents[1]))
from recordings import manifest_of_paths

sys.path.insert(0, str(Path(__file__).parent))
import audio_mutants

RNG = np.random.default_rng(0)
RATE = 16000


def write_noise(path, seconds=2.0, rate=RATE, channels=1, **options):
    sf.write(path, 0.2 * RNG.standard_normal((int(seconds * rate), channels)), rate, **options)
    return path


def write_flac_of(path, total, seconds=2.0, n_bytes=None):
    """A FLAC whose header declares `total` samples, in the 36 bits from the middle of byte 21."""
    content = bytearray(write_noise(path, seconds, format="FLAC").read_bytes())
    content[21] = content[21] & 0xF0 | total >> 32
    content[22:26] = (total & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(content[:n_bytes])
    return path


def test_a_flac_of_unknown_length_is_as_long_as_it_decodes(tmp_path):
    path = write_flac_of(tmp_path / "a.flac", 0)
    assert sf.info(path).frames > 1 << 62  # as libsndfile has it
    info = check(path)
    assert (info.frames, info.truncated) == (2 * RATE, False)
    assert probe(path).frames == 2 * RATE
    windows = Windows(RATE, 8000, 8000, "repeat")
    assert [start for start, _, _ in read_windows(path, windows)] == [0, 8000, 16000, 24000]
    assert len(read(path, RATE, 20000, 5000)) == 5000


def write_ogg_of_2_to_61(path):
    content = bytearray(write_noise(path).read_bytes())
    last_page = content.rfind(b"OggS")
    content[last_page + 6:last_page + 14] = struct.pack("<q", 1 << 61)
    path.write_bytes(audio_mutants.seal_ogg(bytes(content)))


LIES = {
    "a.flac": lambda path: write_flac_of(path, (1 << 36) - 1),
    "99.flac": lambda path: write_flac_of(path, (1 << 36) - 1, n_bytes=99),
    "a.ogg": write_ogg_of_2_to_61,
    "1000.wav": lambda path: write_noise(path, 5, 8000, 1000),
}
# What a scan, prediction and training do with a file, with 2 GB of memory.
USE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import data.stream as s
from data.audio import AudioError, check, probe, read
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    info = check(sys.argv[2])
    recordings = s.find_recordings([sys.argv[2]])
    windows = s.Windows(16000, 16000, 16000, "repeat")
    s.read_headers(recordings, windows)
    n = sum(1 for _ in s.read_windows(sys.argv[2], windows))
    print("windows", n, info.frames / info.rate)
except AudioError as error:
    print("refused", error)
print("peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("name", LIES)
def test_time_and_memory_are_bounded(tmp_path, name):
    LIES[name](tmp_path / name)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", USE, Path(data.audio_file.__file__).parents[1], tmp_path / name],
        capture_output=True, text=True, timeout=60, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)))
    assert done.stdout.startswith(("windows 2 ", "windows 5 ", "refused")), done.stdout
    assert int(done.stdout.split()[-1]) < 400  # MB
    assert time.monotonic() - started < 30


def test_a_small_file_of_endless_silence_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data.audio_file, "MAX_DENSE_SAMPLES", 1 << 22)
    sf.write(tmp_path / "a.flac", np.zeros(1 << 23, np.int16), RATE)
    assert 256 * (tmp_path / "a.flac").stat().st_size < 1 << 23
    with pytest.raises(AudioError, match="8,388,608 samples"):
        check(tmp_path / "a.flac")


@pytest.mark.parametrize("size", [0xFFFFFFF7, 0xFFFFFFF8, 0xFFFFFFFF, 0x7FFFFFFF])
@pytest.mark.parametrize("body", [b"", b"INFO", b"INFOISFT\xff\xff\xff\xff"])
def test_a_list_chunk_without_end(tmp_path, size, body):
    wav = write_noise(tmp_path / "a.wav", 0.1).read_bytes()
    chunk = b"LIST" + struct.pack("<I", size) + body
    (tmp_path / "before.wav").write_bytes(wav[:36] + chunk)
    (tmp_path / "empty.wav").write_bytes(wav[:40] + bytes(4) + chunk)
    (tmp_path / "after.wav").write_bytes(wav + chunk)
    started = time.monotonic()
    for name in ("before.wav", "empty.wav"):
        with pytest.raises(AudioError):
            check(tmp_path / name)
    assert check(tmp_path / "after.wav").frames == 1600
    assert time.monotonic() - started < 5


def test_a_header_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(data.audio_file, "OPEN_SECONDS", 0.2)
    monkeypatch.setattr(data.audio_file, "_Decoder", lambda _: time.sleep(3))
    with pytest.raises(AudioError, match=r"within 0\.2 s"):
        check(write_noise(tmp_path / "a.wav"))


def test_a_wav_whose_length_was_never_written(tmp_path):
    wav = bytearray(write_noise(tmp_path / "a.wav", 1).read_bytes())
    expected = sf.read(tmp_path / "a.wav", dtype="float32")[0]
    for riff, size in ((0, 0), (36, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0, 0xFFFFFFFF)):
        wav[4:8], wav[40:44] = struct.pack("<I", riff), struct.pack("<I", size)
        (tmp_path / "b.wav").write_bytes(wav)
        assert np.array_equal(read(tmp_path / "b.wav", RATE), expected)
        assert not check(tmp_path / "b.wav").truncated


# --- MP3 ---

def write_mp3(path):
    """20 s of noise, then 40 s of silence, at a varying bit rate. -> (path, size of the header)."""
    wave = np.zeros(60 * 44100, np.float32)
    wave[:20 * 44100] = 0.3 * RNG.standard_normal(20 * 44100)
    with sf.SoundFile(path, "w", 44100, 1, bitrate_mode="VARIABLE", compression_level=0.5) as file:
        file.write(wave)
    return path, _mp3_frame(path.read_bytes()[:4]).size


def test_an_mp3_of_varying_bit_rate_without_a_length_header_is_heard_to_its_end(tmp_path):
    path, header = write_mp3(tmp_path / "a.mp3")
    path.write_bytes(path.read_bytes()[header:])
    assert sf.info(path).duration < 15  # as libsndfile estimates
    info = check(path)
    assert info.seconds == pytest.approx(60, abs=0.05) and not info.truncated
    assert probe(path).seconds == info.seconds
    assert len(read(path, 22050, 50 * 22050, 22050)) == 22050


def test_two_mp3s_in_one_file_are_both_heard(tmp_path):
    path, _ = write_mp3(tmp_path / "a.mp3")
    path.write_bytes(2 * path.read_bytes())
    assert check(path).seconds == pytest.approx(120, abs=0.1)


@pytest.mark.parametrize("kind", ["mp3", "wav"])
def test_the_length_of_an_mp3_is_the_same_in_scan_and_training(tmp_path, kind):
    """Its header declares 35 ms more than it has; every tile can be read, cached or not."""
    from data.cache import WaveCache
    mp3 = write_noise(tmp_path / "a.mp3", 1.74, 44100).read_bytes()[:-700]
    if kind == "wav":
        fields = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 44100, 16000, 1, 0, 12, 1, 2, 417, 1, 1393)
        mp3 = (b"RIFF" + struct.pack("<I", 50 + len(mp3)) + b"WAVEfmt "
               + struct.pack("<I", len(fields)) + fields + b"data" + struct.pack("<I", len(mp3))
               + mp3)
    (tmp_path / f"b.{kind}").write_bytes(mp3)
    for full in (True, False):
        manifest = manifest_of_paths(tmp_path, f"b.{kind}")
        manifest.duration = scan(manifest, None, full).duration
        for cache in (None, WaveCache(tmp_path / f"cache{full}", 22050)):
            clips = Clips(manifest, 22050, 8000, cache=cache)
            for start in clips.tiles(0):
                assert clips.batch([TileKey(0, start)]).broken == []


def test_what_a_decoder_prints_is_given_to_the_file(tmp_path, capfd):
    write_noise(tmp_path / "good.mp3")
    content = write_noise(tmp_path / "bad.mp3", 5).read_bytes()
    (tmp_path / "bad.mp3").write_bytes(content[:-3000])
    manifest = manifest_of_paths(tmp_path, *["good.mp3", "bad.mp3"])
    lines = summary(scan(manifest, None, True), manifest)
    [line] = [line for line in lines if "decoder complains" in line]
    assert "bad.mp3" in line and "good.mp3" not in line
    assert capfd.readouterr().err == ""
    sf.read(tmp_path / "bad.mp3")
    assert capfd.readouterr().err  # control: without the collector it is printed


# --- channels, names and folders ---

def test_channels_of_opposite_phase_are_heard(tmp_path):
    wave = 0.3 * RNG.standard_normal(2 * RATE)
    sf.write(tmp_path / "a.wav", np.stack([wave, -wave], 1), RATE, subtype="FLOAT")
    sf.write(tmp_path / "b.wav", RNG.standard_normal((RATE, 2)), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read(tmp_path / "a.wav", RATE), wave, atol=1e-6)
    [(_, _, window), *_] = read_windows(tmp_path / "a.wav", Windows(RATE, RATE, RATE, "repeat"))
    np.testing.assert_allclose(window, wave[:RATE], atol=1e-6)
    manifest = manifest_of_paths(tmp_path, "a.wav", "b.wav")
    result = scan(manifest, tmp_path / "index", True)
    assert result.opposite.tolist() == [True, False]
    assert scan(manifest, tmp_path / "index", True).opposite.tolist() == [True, False]
    assert any("opposite phase" in line and "a.wav" in line for line in summary(result, manifest))


@pytest.mark.parametrize("name, content, words", [
    ("a.mp3", b"\xff\xf1\x50\x80\x2e\x7f\xfc" + bytes(range(256)) * 9, "AAC"),
    ("a.wav", b"\0\0\0\x20ftypM4A " + bytes(range(256)), "AAC"),
    ("b.wav", b"<!DOCTYPE html><html>", "web page"),
    ("c.wav", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("d.wav", bytes(5000), "zero bytes"),
    ("e.au", b"no audio" * 100, "text file"),
])
def test_a_file_that_is_something_else_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=words):
        probe(tmp_path / name)


def test_recordings_that_cannot_be_decoded_are_counted_and_their_class_named(tmp_path, capsys):
    for name in ("data/cat/1.wav", "data/dog/1.m4a", "data/dog/2.m4a", "data/dog/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    ignored = IgnoredFiles()
    paths = find_audio(tmp_path, "data", ignored)
    text = "\n".join(ignored.describe(paths))
    assert "2 recordings that cannot be decoded here: convert to wav or flac (2 .m4a)" in text
    assert "data/dog" in text and "1 .txt" in text
    find_recordings([str(tmp_path / "data")])
    assert "2 .m4a" in capsys.readouterr().out


def test_a_mesh_of_links_and_a_link_to_the_root_end(tmp_path):
    for i in range(9):
        (tmp_path / f"data/{i}").mkdir(parents=True)
        (tmp_path / f"data/{i}/x.wav").touch()
    for i in range(9):
        for j in range(9):
            (tmp_path / f"data/{i}/to{j}").symlink_to(tmp_path / f"data/{j}")
    (tmp_path / "data/root").symlink_to("/")
    (tmp_path / "data/@eaDir/0.wav").mkdir(parents=True)
    (tmp_path / "data/@eaDir/0.wav/SYNO.wav").touch()
    started = time.monotonic()
    paths = find_audio(tmp_path, "data", IgnoredFiles())
    assert sorted(paths) == [f"data/{i}/x.wav" for i in range(9)]
    assert time.monotonic() - started < 5


def test_headers_of_recordings_that_lie_give_a_bounded_number_of_windows(tmp_path):
    write_ogg_of_2_to_61(tmp_path / "a.ogg")
    [recording] = find_recordings([str(tmp_path / "a.ogg")])
    read_headers([recording], Windows(RATE, RATE, RATE, "repeat"))
    assert recording.windows == 2
