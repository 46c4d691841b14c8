"""The fuzzer of audio files, and controls that show that it detects bad readers."""
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data.audio import read

sys.path.insert(0, str(Path(__file__).parent))
import audio_mutants
import fuzz_audio


def fuzz(count, **options):
    """(table, failures, log) of a run without output."""
    log = []
    table, failures = fuzz_audio.fuzz(count, log=log.append, **options)
    return table, failures, log


def count_outcomes(table):
    outcomes = fuzz_audio.OUTCOMES
    return {name: sum(counter[name] for counter in table.values()) for name in outcomes}


def fuzz_without_failure(count, seed):
    table, failures, log = fuzz(count, seed=seed)
    assert not failures, "\n".join(log) + "\n" + fuzz_audio.as_text(table)
    outcomes = count_outcomes(table)
    assert outcomes["accepted"] + outcomes["refused"] == sum(outcomes.values()) == count
    assert outcomes["accepted"] > count / 5
    assert outcomes["refused"] > count / 5
    return table


def test_a_few_hundred_mutants():
    fuzz_without_failure(400, seed=1)


@pytest.mark.long
def test_ten_thousand_mutants():
    table = fuzz_without_failure(10000, seed=0)
    for name, outcomes in table.items():
        assert outcomes["accepted"], name
        assert outcomes["refused"], name


def test_every_original_is_read_correctly(tmp_path):
    for name, original in audio_mutants.ORIGINALS.items():
        path = tmp_path / ("a" + original.suffix)
        content = audio_mutants.original(name)
        path.write_bytes(content)
        answer = fuzz_audio.project(path)
        assert fuzz_audio.wrong(answer, content, path) == "", name
        assert len(answer["whole"]) > 3000, name
        assert answer["whole"].std() > 0.03, name


def make_originals():
    return {name: audio_mutants.original(name) for name in audio_mutants.ORIGINALS}


def test_mutants_follow_from_seed_and_index():
    originals = make_originals()
    time.sleep(1.1)  # some headers contain the time
    again = make_originals()
    assert originals == again
    mutants = [audio_mutants.mutant(0, index, originals) for index in range(300)]
    assert mutants == [audio_mutants.mutant(0, index, again) for index in range(300)]
    assert mutants != [audio_mutants.mutant(1, index, originals) for index in range(300)]
    kinds = {kind for mutant in mutants for kind in mutant.kind.split("+")}
    assert kinds == {*audio_mutants.KINDS, "sealed"}
    changed = [mutant for mutant in mutants if mutant.data != originals[mutant.name]]
    assert len(changed) > 285


def test_checksums_of_ogg_pages_are_those_of_libogg(tmp_path):
    path = tmp_path / "a.ogg"
    sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 16000), 16000)
    content = path.read_bytes()
    assert audio_mutants.seal_ogg(content) == content
    without_checksum = bytearray(content)
    without_checksum[22:26] = bytes(4)
    assert audio_mutants.seal_ogg(without_checksum) == content


@pytest.mark.parametrize("reader, outcome, words", [
    ("silence", "wrong", "soundfile"),
    ("neighbour", "wrong", "soundfile"),
    ("muted", "wrong", "silence"),
    ("padded", "wrong", "samples, but soundfile finds"),
    ("shifted", "wrong", "piece"),
    ("aborter", "crashes", "SIGABRT"),
    ("greedy", "errors", "MemoryError"),
    ("leaky", "errors", "RuntimeError"),
])
def test_control_a_bad_reader_fails(reader, outcome, words):
    table, failures, log = fuzz(16, seed=3, reader=f"fuzz_audio:{reader}")
    outcomes = count_outcomes(table)
    assert len(failures) == outcomes[outcome] > 2, outcomes
    assert sum(outcomes.values()) == 16  # the run continues after a failure
    assert any(words in failure.reason for failure in failures), failures
    for failure in failures:
        assert any(f"--seed 3 --only {failure.index}:" in line for line in log)


def test_control_a_reader_that_hangs_fails():
    table, failures, _ = fuzz(4, seed=3, reader="fuzz_audio:sleeper", watchdog=0.5)
    outcomes = count_outcomes(table)
    assert outcomes["hangs"] == len(failures) > 1
    assert sum(outcomes.values()) == 4


def test_a_failure_is_repeated_by_its_number():
    _, failures, _ = fuzz(16, seed=3, reader="fuzz_audio:leaky")
    for failure in (failures[0], failures[-1]):
        _, repeated, _ = fuzz(0, seed=3, reader="fuzz_audio:leaky", only=[failure.index])
        assert repeated == [failure]


def test_the_command_line():
    def run(*flags):
        command = [sys.executable, fuzz_audio.HERE, "--seed", "3", "--count", "20", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    good, bad = run(), run("--reader", "fuzz_audio:leaky")
    assert good.returncode == 0
    assert bad.returncode == 1
    lines = good.stdout.splitlines()
    assert lines[1].split() == ["format", "mutants", *fuzz_audio.OUTCOMES]
    assert lines[-2].split()[:2] == ["all", "20"]
    assert "FAIL --seed 3 --only" in bad.stdout


@pytest.mark.parametrize("name", ["WAV G721_32", "WAV GSM610", "WAV NMS_ADPCM_24", "AU G723_24"])
def test_formats_that_cannot_seek_are_read_at_any_place(tmp_path, name):
    path = tmp_path / "a.wav"
    path.write_bytes(audio_mutants.original(name))
    assert not sf.SoundFile(path).seekable()
    whole = sf.read(path, dtype="float32")[0]
    np.testing.assert_array_equal(read(path, 8000, 2000, 1500), whole[2000:3500])
