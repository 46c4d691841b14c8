"""export.py --to onnx and --to torch against evaluate.py; the command line; what is refused."""
import contextlib
import io
import json
import re
import resource
import runpy
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
import soundfile as sf
import torch
from conftest import ROOT, tone
from export_runs import (
    FRONTENDS,
    TEMPERATURE,
    UNUSUAL_NAMES,
    Run,
    command,
    name_classes,
    onnx_metadata,
    onnx_scores,
    run_usage_code,
    softmax_at_temperature,
)
from transformers import AutoModelForAudioClassification

import export
from core.divergence import TrainingError
from core.run.checkpoint import CheckpointError
from export import DEFAULT_OUT, ExportError


@pytest.fixture(scope="module")
def runs(tones, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {frontend: Run(folder / frontend, tones, frontend) for frontend in FRONTENDS}


@pytest.fixture(scope="module")
def printed(runs, tmp_path_factory):
    """What each format's command line prints; all export the newest run, to its folder."""
    cwd = tmp_path_factory.mktemp("work")
    (cwd / "runs").mkdir()
    (cwd / "runs" / "a").symlink_to(runs["logmel"].folder)
    done = command(ROOT / "export.py", "--ckpt", "best.pt", "--to", "onnx", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    printed = {"onnx": done.stdout}
    for kind in ("hf", "torch"):  # in this process, since imports take seconds
        stdout = io.StringIO()
        with (contextlib.chdir(cwd), contextlib.redirect_stdout(stdout),
              pytest.MonkeyPatch.context() as patch):
            patch.setattr(sys, "argv", ["export.py", "--ckpt", "best.pt", "--to", kind])
            with pytest.raises(SystemExit) as ending:
                runpy.run_path(ROOT / "export.py", run_name="__main__")
        assert ending.value.code == 0
        printed[kind] = stdout.getvalue()
    return printed


@pytest.fixture(scope="module")
def exports(printed, runs):
    """The exports that the command lines wrote: {format: path}."""
    return {kind: runs["logmel"].folder / name for kind, name in DEFAULT_OUT.items()}


@pytest.mark.parametrize("kind", list(DEFAULT_OUT))
def test_command_line_checks_the_export_and_names_its_path(kind, printed):
    assert "checked: " in printed[kind]
    assert f"written: runs/a/{DEFAULT_OUT[kind]} " in printed[kind]


def test_hf_command_writes_the_card_with_metrics_and_clips(exports, runs):
    names = {file.name for file in exports["hf"].iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    card = (exports["hf"] / "README.md").read_text()
    metrics = json.loads((runs["logmel"].folder / "test" / "metrics.json").read_text())
    low, high = metrics["accuracy_ci95"]
    assert f"| accuracy | {metrics['accuracy']:.3f} | {low:.3f} to {high:.3f} |" in card
    classes = re.findall(r"^\| (\d) \| (\w+) \| (\d+) \|$", card, re.MULTILINE)
    assert [row[:2] for row in classes] == [("0", "high"), ("1", "low"), ("2", "mid")]
    data = runs["logmel"].files[0].parents[1]
    for _, name, n_train in classes:
        assert 0 < int(n_train) < len(list((data / name).iterdir()))


@pytest.mark.parametrize("kind", list(DEFAULT_OUT))
def test_exports_name_no_folder_of_this_machine(kind, exports):
    path = exports[kind]
    for file in [path / "config.json", path / "README.md"] if path.is_dir() else [path]:
        assert str(ROOT).encode() not in file.read_bytes()


# --- onnx ---

@pytest.mark.parametrize("n", [1, 3, 7])
def test_onnxruntime_gives_the_scores_of_evaluation(n, exports, runs):
    run = runs["logmel"]
    assert len(run.waves) >= 7
    scores = onnx_scores(exports["onnx"], run.waves[:n])
    np.testing.assert_allclose(scores, run.scores[:n], atol=1e-4)
    assert run.scores.std(axis=0).max() > 0.01


def test_onnx_with_fbank_and_a_temperature(runs, tmp_path):
    run, out = runs["fbank"], tmp_path / "new" / "a.onnx"
    calibration = {"temperature": TEMPERATURE, "thresholds": [0.1, 0.2, 0.3]}

    def edit(parts):
        name_classes(parts, UNUSUAL_NAMES)
        parts["calibration"] = calibration

    ckpt = run.change(edit, tmp_path / "a.pt")
    export.main(["--ckpt", str(ckpt), "--to", "onnx", str(out)])
    scores = onnx_scores(out, run.waves)
    np.testing.assert_allclose(scores, softmax_at_temperature(run.scores), atol=1e-4)
    assert np.abs(scores - run.scores).max() > 1e-2
    metadata = onnx_metadata(out)
    assert metadata["classes"] == UNUSUAL_NAMES
    assert metadata["temperature"] == TEMPERATURE


def test_onnx_file_describes_its_input(exports):
    session = onnxruntime.InferenceSession(exports["onnx"])
    [wave], [probabilities] = session.get_inputs(), session.get_outputs()
    assert (wave.name, wave.shape, wave.type) == (
        "waveform", ["batch", 22050], "tensor(float)")
    assert (probabilities.name, probabilities.shape) == ("probabilities", ["batch", 3])
    metadata = onnx_metadata(exports["onnx"])
    assert metadata["classes"] == ["high", "low", "mid"]
    assert metadata["sample_rate"] == 22050
    assert metadata["samples"] == 22050
    assert len(list(exports["onnx"].parent.glob("model.onnx*"))) == 1  # no file beside it
    wrong_length = np.zeros((1, 22049), np.float32)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="22050"):
        session.run(None, {"waveform": wrong_length})


# --- torch ---

RUN_PROGRAM = """
import json, sys, numpy, torch
extra = {'warble': ''}
score = torch.export.load(sys.argv[1], extra_files=extra).module()
waves = torch.from_numpy(numpy.load('waves.npy'))
numpy.save('one.npy', score(waves[:1]).numpy())
numpy.save('all.npy', score(waves).numpy())
print(json.loads(extra['warble'])['classes'])
print([name for name in sys.modules if name.split('.')[0] in ('model', 'core', 'export')])
"""


def test_torch_program_needs_only_torch(exports, runs, tmp_path):
    run = runs["logmel"]
    np.save(tmp_path / "waves.npy", run.waves)
    (tmp_path / "run_program.py").write_text(RUN_PROGRAM)
    done = command("run_program.py", exports["torch"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['high', 'low', 'mid']\n[]\n"
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), run.scores, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "one.npy"), run.scores[:1], atol=1e-5)


def test_torch_program_with_fbank_and_a_temperature(runs, tmp_path):
    run = runs["fbank"]
    export.main(["--ckpt", str(run.calibrated()), "--to", "torch", str(tmp_path / "a.pt2")])
    program = torch.export.load(tmp_path / "a.pt2").module()
    scores = program(torch.from_numpy(run.waves))
    np.testing.assert_allclose(scores, softmax_at_temperature(run.scores), atol=1e-5)


# --- several labels per clip ---

@pytest.fixture(scope="module")
def multi_label_run(tmp_path_factory):
    """A run over clips with one or two of three tones."""
    folder, lines = tmp_path_factory.mktemp("multi_label"), ["path,label"]
    hz_of = {"low": 300, "mid": 1200, "high": 4000}
    for i in range(24):
        labels = list(hz_of)[i % 3:][:1 + i % 2]
        wave = sum(tone(1.0, hz=hz_of[label], seed=i) for label in labels) / 2
        sf.write(folder / f"{i}.wav", wave, 16000)
        lines.append(f"{i}.wav,{';'.join(labels)}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return Run(folder / "run", folder / "clips.csv", "fbank", "--loss=bce", "--monitor=val_map")


@pytest.mark.parametrize("kind", list(DEFAULT_OUT))
def test_multi_label_model_has_a_sigmoid_per_class(kind, multi_label_run, tmp_path):
    run, out = multi_label_run, tmp_path / "out"
    export.main(["--ckpt", str(run.calibrated()), "--to", kind, str(out)])
    expected = run.scores.astype(np.float64)
    if kind == "hf":
        config = AutoModelForAudioClassification.from_pretrained(out).config
        assert config.problem_type == "multi_label_classification"
        sf.write(tmp_path / "recording.wav", run.waves[0], 16000, subtype="FLOAT")
        scores, expected = run_usage_code(out, tmp_path / "recording.wav"), expected[0]
    elif kind == "onnx":
        scores = onnx_scores(out, run.waves)
    else:
        scores = torch.export.load(out).module()(torch.from_numpy(run.waves))
    logits = np.log(expected / (1 - expected))
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits / TEMPERATURE)), atol=1e-4)
    assert abs(np.asarray(scores).sum(axis=-1) - 1).max() > 1e-2


# --- where it is written ---

@pytest.mark.parametrize("kind", list(DEFAULT_OUT))
def test_files_of_others_are_not_replaced(kind, runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for out in ("mine", "file", "file/below"):
        with pytest.raises(ExportError, match=out) as refused:
            export.main(["--ckpt", str(runs["logmel"].ckpt), "--to", kind, str(tmp_path / out)])
        assert "\n" not in str(refused.value)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["file", "mine", "thesis.tex"]
    assert (tmp_path / "file").read_text() == "more of it"


def test_older_export_is_replaced_as_a_whole(runs, tmp_path):
    words = ["--ckpt", str(runs["logmel"].ckpt), "--to", "hf", str(tmp_path / "hf")]
    (tmp_path / "hf").mkdir()  # an empty folder may be used
    export.main(words)
    (tmp_path / "hf" / "preprocessor_config.json").write_text("of another run")
    export.main(words)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["README.md", "config.json", "hf", "model.safetensors"]
    (tmp_path / "hf" / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"thesis\.tex"):
        export.main(words)
    assert (tmp_path / "hf" / "thesis.tex").read_text() == "years of work"


def test_only_an_export_of_the_same_format_may_be_replaced(exports):
    for kind, path in exports.items():
        export.check_target(path, kind)
        for other_kind in set(exports) - {kind}:
            with pytest.raises(ExportError):
                export.check_target(path, other_kind)


@pytest.mark.parametrize("kind", ["hf", "onnx"])
def test_export_that_fails_its_check_leaves_the_older_one(kind, exports, runs, tmp_path,
                                                          monkeypatch):
    out = tmp_path / "out"
    copy = shutil.copytree if kind == "hf" else shutil.copyfile
    copy(exports[kind], out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(TrainingError, match="nothing was written"):
        export.main(["--ckpt", str(runs["logmel"].ckpt), "--to", kind, str(out)])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_one_line_and_leaves_nothing(runs, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"out: .*File too large") as refused:
            export.main(["--ckpt", str(runs["logmel"].ckpt), "--to", "hf", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


# --- invalid input ---

def test_missing_onnx_packages_give_the_command_that_installs_them(runs, tmp_path, monkeypatch,
                                                                   capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", [
        "export.py", "--ckpt", str(runs["logmel"].ckpt), "--to", "onnx", str(tmp_path / "a.onnx")])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(ROOT / "export.py", run_name="__main__")
    assert ending.value.code == 2
    assert not list(tmp_path.iterdir())
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: --to onnx: needs onnxscript")
    assert error.endswith(f"pip install {export.ONNX_PACKAGES}\n")
    assert error.count("\n") == 1
    pinned = (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    assert set(export.ONNX_PACKAGES.split()) <= set(pinned)


@pytest.mark.parametrize("calibration", [
    {"temperature": 0.0, "thresholds": [0, 0, 0]},
    {"temperature": float("nan"), "thresholds": [0, 0, 0]},
    {"temperature": 1.0, "thresholds": [0]},
    {"temperature": 1.0},
    {"temperature": "x", "thresholds": []},
    [],
])
def test_checkpoints_with_an_invalid_calibration_are_refused(calibration, runs, tmp_path):
    ckpt = runs["logmel"].change(lambda parts: parts.update(calibration=calibration),
                                 tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        export.main(["--ckpt", str(ckpt), "--to", "torch", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_model_too_large_for_onnx_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONNX_MAX_BYTES", 10_000)
    with pytest.raises(ExportError, match=r"--to onnx: .* use --to torch"):
        export.main(["--ckpt", str(runs["logmel"].ckpt), "--to", "onnx", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
