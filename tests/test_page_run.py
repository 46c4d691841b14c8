"""report.html of a real run, as train.py and evaluate.py write it."""
import base64
import io
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import soundfile as sf
from made_run import Text, read_page

import evaluate
import train
from data.audio import read as read_audio
from tests.faults.harness import TINY, without_pictures


def shown_commands(source):
    """The commands of the section Reproduce."""
    block = re.search(r"<pre>(.*?)</pre>", source, re.S)[1]
    return [" ".join(Text(code).text.split()) for code in re.findall(r"<code>.*?</code>", block)]


def check_cards(source, tones):
    """The sound of each card is the file's, at the second that the card gives."""
    n_cards = source.count('class="card"')
    assert n_cards == source.count("<audio") > 6
    for number in range(n_cards):
        card = re.search(rf'<article class="card" id="clip{number}">.*?</article>', source, re.S)[0]
        path, start, end = re.search(
            r'href="\.\./[^"]*/(\w+/\w+\.wav)"><bdi>[^<]*</bdi></a>\s([\d.]+) to ([\d.]+) s',
            card).groups()
        sound = re.search(r'data:audio/mpeg;base64,([^"]+)', card)[1]
        wave, rate = sf.read(io.BytesIO(base64.b64decode(sound)))
        expected = read_audio(tones / path, rate, round(float(start) * rate), len(wave))
        assert float(end) - float(start) == pytest.approx(0.9, abs=0.11)
        spectra = [np.abs(np.fft.rfft(part[:18000])) for part in (wave, expected)]
        assert np.corrcoef(*spectra)[0, 1] > 0.9, path


@pytest.fixture(scope="module")
def real_run(tones, tmp_path_factory):
    """Folder with a finished run in "run", whose page training has written."""
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        with without_pictures(patch) as quiet:
            quiet.setattr(train, "write_report", evaluate.write_report)
            assert train.main(["--data", str(tones), *TINY, "--run-dir", "run"]) == 0
    return folder


@pytest.fixture
def in_run(real_run, monkeypatch):
    """Its folder as working directory."""
    monkeypatch.chdir(real_run)
    monkeypatch.setenv("HOME", str(real_run))
    return real_run


CPU = ["--ckpt", "run/best.pt", "--device", "cpu", "--amp", "off"]


def test_training_writes_the_page(in_run, tones):
    run = in_run / "run"
    source = (run / "report.html").read_text(encoding="utf-8")
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    words = Text(source).text
    n_train = json.loads((run / "run.json").read_text())["clips"]["train"]
    assert f"{metrics['accuracy']:.1%} of {metrics['n']} test clips" in words
    assert f"All {n_train} training clips were checked" in words
    assert "leakage between the splits" in words.split("not found:")[1]
    assert source.count('class="over"') > 3
    check_cards(source, tones)


def test_shown_commands_repeat_the_run_and_the_evaluation(in_run, capsys):
    run = in_run / "run"
    source = (run / "report.html").read_text(encoding="utf-8")
    *_, training, evaluation = shown_commands(source)
    program, script, *words = shlex.split(training)
    assert (program, script) == ("python", "train.py")
    flags = json.loads((run / "run.json").read_text())["flags"]
    expected = {name: value for name, value in flags.items()
                if value not in (None, False) and name not in ("run_dir", "resume")}
    expected |= {name: value for name, value in flags.items() if value == 0 and value is not False}
    shown = dict(word.removeprefix("--").split("=", 1) for word in words)
    assert shown == {name.replace("_", "-"): str(value) for name, value in expected.items()}

    (run / "report.html").unlink()
    assert evaluation == "python evaluate.py --ckpt run/best.pt"
    evaluate.main([*shlex.split(evaluation)[2:], "--device", "cpu", "--amp", "off"])
    assert "written: run/report.html" in capsys.readouterr().out
    again = (run / "report.html").read_text(encoding="utf-8")
    assert re.sub(r"data:[^\"]*", "", again) == re.sub(r"data:[^\"]*", "", source)


def test_page_of_the_training_clips_goes_into_another_folder(in_run):
    before = (in_run / "run" / "report.html").read_bytes()
    evaluate.main([*CPU, "--split", "train", "--out", "else where"])
    source = (in_run / "else where" / "report.html").read_text(encoding="utf-8")
    assert "training clips" in source and "Most confident mistakes" not in source
    assert (in_run / "run" / "report.html").read_bytes() == before
    words = shlex.split(shown_commands(source)[-1])
    assert {"--split=train", "--out=else where"} <= set(words)


def test_page_of_other_data(in_run, tones):
    other = in_run / "other"
    for name in ("low", "high"):
        shutil.copytree(tones / name, other / name)
        for path in (other / name).iterdir():
            path.rename(path.with_name("x" + path.name))
    evaluate.main([*CPU, "--data", str(other)])
    words = read_page(in_run / "run" / "all" / "report.html").text
    assert "of 32 clips classified correctly" in words
    assert "other, not the data it was trained on" in words and "were checked" not in words
    assert "1 class without a clip in this split: mid" in words


def test_results_are_written_if_the_page_cannot_be(in_run, capsys):
    run = in_run / "run"
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    page_before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    (run / "test" / "metrics.json").unlink()
    evaluate.main(CPU)
    assert ("run/report.html: cannot be written (Is a directory); the results are in run/test"
            in capsys.readouterr().out)
    assert json.loads((run / "test" / "metrics.json").read_text()) == metrics
    (run / "report.html").rmdir()
    (run / "report.html").write_bytes(page_before)
