"""Exports, read by transformers, onnxruntime and torch alone, against evaluate.py on real files."""
import contextlib
import io
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import soundfile as sf
import torch
import transformers
from conftest import ROOT, tone
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from safetensors.torch import load_file, save_file
from transformers import (
    ASTForAudioClassification,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
)

import evaluate
import export
import train
from core.divergence import TrainingError
from core.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from core.scoring import restore
from data.audio import read
from data.manifest import Manifest
from export import ExportError
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.pretrained import WeightsError, load_pretrained, to_hub
from tests.faults.harness import without_pictures

SMALL = ["--weights=none", "--dim=32", "--depth=2", "--heads=2", "--device=cpu", "--amp=off",
         "--batch-size=6", "--effective-batch=6", "--lr-backbone=1e-3", "--lr-head=2e-3",
         "--cache=off"]
FRONTENDS = ["logmel", "fbank"]
FORMATS = list(export.DEFAULT_OUT)
TEMPERATURE, THRESHOLDS = 1.7, [0.1, 0.2, 0.3]
STRANGE_NAMES = ["a|b", "<img src=x>\n# title", "caf\udce9 `x` [y](z)"]


class Run:
    """A finished run with shaken weights, and the scores of its test clips by evaluate.py."""

    def __init__(self, folder, data, frontend, *flags):
        self.folder, self.ckpt = folder, folder / "best.pt"
        with pytest.MonkeyPatch.context() as patch, without_pictures(patch):
            train.main([*SMALL, f"--data={data}", f"--run-dir={folder}", f"--frontend={frontend}",
                        "--seconds=1", "--epochs=1", "--ema=0.9", *flags])
            self.change(shake_weights)
            evaluate.main(["--ckpt", str(self.ckpt), "--device=cpu", "--amp=off"])
        checkpoint = load_checkpoint(self.ckpt)
        manifest = Manifest.from_dict(checkpoint["manifest"])
        self.rate = checkpoint["frontend"]["sample_rate"]
        with np.load(folder / "test" / "scores.npz") as file:
            self.files = [manifest.file(row) for row in file["rows"]]
            self.scores = file["scores"]
        n_samples = checkpoint["clip"]["samples"]
        self.waves = np.stack([read(file, self.rate, 0, n_samples) for file in self.files])
        self.model, self.frontend = restore(checkpoint, torch.device("cpu"))
        self.model.eval()

    def change(self, edit, path=None):
        """Write the checkpoint after `edit(parts)`, by default in its place -> its path."""
        parts = dict(load_checkpoint(self.ckpt))
        edit(parts)
        save_checkpoint(path or self.ckpt, parts)
        return path or self.ckpt

    def calibrated(self):
        """The checkpoint with a calibration, in a file of its own -> its path."""
        calibration = {"temperature": TEMPERATURE, "thresholds": THRESHOLDS}
        return self.change(lambda parts: parts.update(calibration=calibration),
                           self.folder / "calibrated.pt")

    @torch.inference_mode()
    def logits(self, spec):
        return self.model(spec)


def shake_weights(parts):
    """Move weights and averages far from their start, so that each tensor changes the scores."""
    generator = torch.Generator().manual_seed(3)
    parts["calibration"] = None
    for part in ("model", "ema"):
        for name, value in parts[part].items():
            scale = 0.05 if value.dim() > 1 else 0.2
            if name == "head.1.weight":
                scale = 0.6
            parts[part][name] = value + scale * torch.randn(value.shape, generator=generator)


def set_class_names(parts, names):
    parts["classes"] = parts["manifest"]["classes"] = names


def at_temperature(scores, temperature=TEMPERATURE):
    scores = np.exp(np.log(scores.astype(np.float64)) / temperature)
    return scores / scores.sum(axis=1, keepdims=True)


def run_export(ckpt, to, out):
    export.main(["--ckpt", str(ckpt), "--to", to, str(out)])


def run_python(*words, cwd):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                          text=True, timeout=200, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_card_code(folder, recording):
    """Run the Python code in a model card -> the probabilities that it computes."""
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    code = code.replace('"."', repr(str(folder)))
    code = code.replace('"recording.wav"', repr(str(recording)))
    variables = {}
    exec(code, variables)
    return variables["probabilities"]


@pytest.fixture(scope="module")
def runs(tones, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {frontend: Run(folder / frontend, tones, frontend) for frontend in FRONTENDS}


# --- transformers ---

@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory):
    """The hf exports of both runs."""
    out = tmp_path_factory.mktemp("hf")
    for frontend, run in runs.items():
        run_export(run.ckpt, "hf", out / frontend)
    return {frontend: out / frontend for frontend in FRONTENDS}


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_transformers_computes_the_same_logits(frontend, runs, folders):
    model, problems = AutoModelForAudioClassification.from_pretrained(
        folders[frontend], output_loading_info=True)
    assert type(model) is ASTForAudioClassification
    assert not any(problems.values()), problems  # no tensor missing, left over or of another shape
    run = runs[frontend]
    spec = run.frontend(torch.from_numpy(run.waves))
    spec = torch.cat([spec, torch.randn_like(spec)])
    with torch.inference_mode():
        logits = model(spec.transpose(1, 2)).logits
    expected = run.logits(spec)
    assert expected.std(dim=0).min() > 0.02  # the inputs differ
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert list(model.config.id2label.items()) == [(0, "high"), (1, "low"), (2, "mid")]


def test_feature_extractor_and_model_give_the_scores_of_evaluate(runs, folders):
    run, folder = runs["fbank"], folders["fbank"]
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = AutoModelForAudioClassification.from_pretrained(folder)
    waves = [sf.read(file, dtype="float32")[0] for file in run.files]
    inputs = extractor(waves, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        probabilities = model(**inputs).logits.softmax(dim=1)
    np.testing.assert_allclose(probabilities, run.scores, atol=1e-4)
    assert probabilities.std(dim=0).max() > 0.005  # clips differ by more than the tolerance


def test_other_front_ends_have_no_feature_extractor(runs, folders, tmp_path, capsys):
    assert (folders["fbank"] / "preprocessor_config.json").exists()
    assert not (folders["logmel"] / "preprocessor_config.json").exists()
    with pytest.raises(OSError):
        AutoFeatureExtractor.from_pretrained(folders["logmel"])
    ckpt = runs["fbank"].change(lambda parts: parts["frontend"].update(fmax=7000.0),
                                tmp_path / "band.pt")
    run_export(ckpt, "hf", tmp_path / "hf")
    assert "no preprocessor_config.json" in capsys.readouterr().out
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_code_of_the_model_card_gives_the_scores_of_evaluate(frontend, runs, folders, tmp_path):
    run = runs[frontend]
    write_stereo(tmp_path / "recording.wav", read(run.files[0], 16000))
    probabilities = run_card_code(folders[frontend], tmp_path / "recording.wav")
    np.testing.assert_allclose(probabilities, run.scores[0], atol=2e-4)


def test_code_of_the_model_card_applies_the_temperature(runs, tmp_path):
    run = runs["logmel"]
    run_export(run.calibrated(), "hf", tmp_path / "hf")
    write_stereo(tmp_path / "recording.wav", read(run.files[0], 16000))
    probabilities = run_card_code(tmp_path / "hf", tmp_path / "recording.wav")
    np.testing.assert_allclose(probabilities, at_temperature(run.scores[:1])[0], atol=2e-4)


def test_code_of_the_model_card_computes_an_fbank_of_another_band(runs, tmp_path):
    run, band = runs["fbank"], {"fmin": 300.0, "fmax": 7000.0}
    ckpt = run.change(lambda parts: parts["frontend"].update(band), tmp_path / "band.pt")
    assert_card_agrees_with_the_model(run, ckpt, band, read(run.files[0], 16000), tmp_path)


@pytest.mark.parametrize("short, before", [("pad", 0), ("place", 5513)])  # of 11,025 missing
def test_code_of_the_model_card_lengthens_short_recordings(runs, tmp_path, short, before):
    run = runs["logmel"]
    assert run.waves.shape[1] == 22050
    ckpt = run.change(lambda parts: parts["clip"].update(short=short), tmp_path / "short.pt")
    wave = read(run.files[0], 16000)[:8000]  # 11,025 samples at 22,050 Hz, without rounding
    assert_card_agrees_with_the_model(run, ckpt, {}, wave, tmp_path, before)


def assert_card_agrees_with_the_model(run, ckpt, settings, wave, folder, before=0):
    """wave: mono, at 16 kHz. settings: of the front end that differ from the run's.

    before: zeros before a wave that is too short.
    """
    run_export(ckpt, "hf", folder / "hf")
    recording = folder / "recording.wav"
    write_stereo(recording, wave)
    frontend = build_frontend(FrontendConfig(**{**run.frontend.config.to_dict(), **settings}))
    known = torch.from_numpy(read(recording, run.rate))
    padded = torch.zeros(1, run.waves.shape[1])
    padded[0, before:before + len(known)] = known
    expected = run.logits(frontend(padded))[0].softmax(dim=0).numpy()
    probabilities = run_card_code(folder / "hf", recording)
    np.testing.assert_allclose(probabilities, expected, atol=2e-4)


def write_stereo(path, wave):
    sf.write(path, np.stack([wave, wave], axis=1), 16000, subtype="FLOAT")


def test_tensors_have_the_names_and_shapes_that_transformers_writes(folders, tmp_path):
    config = transformers.ASTConfig.from_pretrained(folders["fbank"])
    ASTForAudioClassification(config).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    ours = load_file(folders["fbank"] / "model.safetensors")
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()}


def test_config_describes_the_input_and_the_calibration(runs, folders, tmp_path):
    run = runs["fbank"]
    config = json.loads((folders["fbank"] / "config.json").read_text())
    assert config["max_length"] == 98 and config["num_mel_bins"] == 128
    assert config["hidden_size"] == 32
    assert config["warble"]["samples"] == 16000 and config["warble"]["temperature"] == 1.0
    assert config["warble"]["frontend"] == run.frontend.config.to_dict()
    run_export(run.calibrated(), "hf", tmp_path / "hf")
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "hf")
    assert model.config.warble["temperature"] == TEMPERATURE
    assert model.config.warble["thresholds"] == THRESHOLDS


# --- back into this program ---

@pytest.mark.parametrize("frontend", FRONTENDS)
def test_an_export_loads_as_the_same_model(frontend, runs, folders):
    run = runs[frontend]
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2)).eval()
    report = load_pretrained(model, folders[frontend], keep_head=True)
    assert set(report.fitted) == {"pos_embed"}
    assert set(report.loaded) | set(report.fitted) == set(model.state_dict())
    n_frames = run.frontend.config.frames(run.waves.shape[1])
    assert model.config.grid == run.model.config.patches(n_frames)
    spec = run.frontend(torch.from_numpy(run.waves))
    with torch.inference_mode():
        assert torch.equal(model(spec), run.logits(spec))


def test_a_grid_with_the_number_of_patches_of_a_square_is_not_taken_for_an_image(tmp_path):
    """12 x 48 patches are as many as 24 x 24."""
    model, loaded = (AST(ASTConfig(3, dim=32, depth=1, heads=2)).eval() for _ in range(2))
    torch.nn.init.normal_(model.pos_embed)
    _, tensors = to_hub(model.state_dict(), model.config, 490)
    save_file(tensors, tmp_path / "model.safetensors")
    load_pretrained(loaded, tmp_path, keep_head=True)
    spec = torch.randn(2, 128, 490)
    torch.testing.assert_close(loaded(spec), model(spec), atol=0, rtol=0)


def test_training_starts_from_an_export(folders, tones, tmp_path, monkeypatch, capsys):
    folder, run_folder = folders["fbank"], tmp_path / "run"
    flags = [*SMALL[1:], f"--weights={folder}", "--frontend=fbank", "--seconds=1", "--epochs=1"]
    with without_pictures(monkeypatch):
        assert train.main([*flags, f"--data={tones}", f"--run-dir={run_folder}"]) == 0
    printed = capsys.readouterr().out
    assert str(folder) in printed and "12x9" in printed and "head.0.weight" in printed
    checkpoint = load_checkpoint(run_folder / "best.pt")
    assert checkpoint["config"]["time_patches"] == 9
    assert checkpoint["weights"].startswith(str(folder))
    with without_pictures(monkeypatch):
        evaluate.main(["--ckpt", str(run_folder / "best.pt")])
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2))
    load_pretrained(model, run_folder / "best.pt", keep_head=True, own_reader=load_checkpoint)
    assert torch.equal(model.pos_embed, checkpoint["model"]["pos_embed"])


def test_an_export_for_another_number_of_heads_is_refused(folders):
    model = AST(ASTConfig(3, dim=32, depth=2, heads=4))
    with pytest.raises(WeightsError, match=r"num_attention_heads.*--heads 2"):
        load_pretrained(model, folders["fbank"])


def test_an_export_of_another_stride_is_refused(folders, tmp_path):
    config = json.loads((folders["fbank"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "time_stride": 5}))
    shutil.copy(folders["fbank"] / "model.safetensors", tmp_path)
    with pytest.raises(WeightsError, match=r"time_stride.* 5\b"):
        load_pretrained(AST(ASTConfig(3, dim=32, depth=2, heads=2)), tmp_path)


def test_folders_that_are_no_export_are_refused(tmp_path):
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_pretrained(model, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors") as caught:
        load_pretrained(model, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


# --- the command line, for the newest run under runs/ ---

@pytest.fixture(scope="module")
def command_line(runs, tmp_path_factory):
    """(run folder, {format: what the command printed}), with an export in each format."""
    cwd = tmp_path_factory.mktemp("work")
    (cwd / "runs").mkdir()
    (cwd / "runs" / "a").symlink_to(runs["logmel"].folder)
    done = run_python(ROOT / "export.py", "--ckpt", "best.pt", "--to", "onnx", cwd=cwd)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    printed = {"onnx": done.stdout}
    for kind in ("hf", "torch"):  # in this process, which has already imported what is slow
        output = io.StringIO()
        with (contextlib.chdir(cwd), contextlib.redirect_stdout(output),
              pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop):
            patch.setattr(sys, "argv", ["export.py", "--ckpt", "best.pt", "--to", kind])
            runpy.run_path(ROOT / "export.py", run_name="__main__")
        assert stop.value.code == 0
        printed[kind] = output.getvalue()
    return runs["logmel"].folder, printed


def test_the_command_line_writes_into_the_newest_run(command_line):
    folder, printed = command_line
    for kind, name in (("hf", "hf"), ("onnx", "model.onnx"), ("torch", "model.pt2")):
        assert (folder / name).exists() and f"runs/a/{name}" in printed[kind]
        assert "checked: " in printed[kind]  # the export was compared with the checkpoint
    hf_files = {file.name for file in (folder / "hf").iterdir()}
    assert hf_files == {"config.json", "model.safetensors", "README.md"}
    assert "README.md" in printed["hf"]


def test_the_model_card_has_the_metrics_and_the_training_clips(command_line, runs):
    folder, _ = command_line
    card = (folder / "hf" / "README.md").read_text()
    metrics = json.loads((folder / "test" / "metrics.json").read_text())
    low, high = metrics["accuracy_ci95"]
    assert f"| accuracy | {metrics['accuracy']:.3f} | {low:.3f} to {high:.3f} |" in card
    data = runs["logmel"].files[0].parents[1]
    n_clips = [len(list(path.iterdir())) for path in sorted(data.iterdir())]
    table = re.findall(r"^\| (\d) \| (\w+) \| (\d+) \|$", card, re.M)
    assert [row[:2] for row in table] == [("0", "high"), ("1", "low"), ("2", "mid")]
    assert all(0 < int(row[2]) < n for row, n in zip(table, n_clips, strict=True))


def test_exports_do_not_contain_folders_of_this_machine(command_line):
    for name in ("model.onnx", "model.pt2", "hf/config.json", "hf/README.md"):
        assert str(ROOT).encode() not in (command_line[0] / name).read_bytes(), name


# --- onnx ---

def onnx_scores(path, waves):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"waveform": waves})[0]


def onnx_metadata(session):
    metadata = session.get_modelmeta().custom_metadata_map
    return {key: json.loads(value) for key, value in metadata.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_onnxruntime_gives_the_scores_of_evaluate(batch_size, command_line, runs):
    run = runs["logmel"]
    assert len(run.waves) >= 7
    probabilities = onnx_scores(command_line[0] / "model.onnx", run.waves[:batch_size])
    np.testing.assert_allclose(probabilities, run.scores[:batch_size], atol=1e-4)
    assert run.scores.std(axis=0).max() > 0.01  # the clips differ


def test_onnx_with_a_temperature_and_strange_class_names(runs, tmp_path):
    run = runs["fbank"]
    calibration = {"temperature": TEMPERATURE, "thresholds": THRESHOLDS}

    def edit(parts):
        set_class_names(parts, STRANGE_NAMES)
        parts["calibration"] = calibration

    out = tmp_path / "new" / "a.onnx"
    run_export(run.change(edit, tmp_path / "a.pt"), "onnx", out)
    probabilities = onnx_scores(out, run.waves)
    np.testing.assert_allclose(probabilities, at_temperature(run.scores), atol=1e-4)
    assert np.abs(probabilities - run.scores).max() > 1e-2  # the temperature changes them
    metadata = onnx_metadata(onnxruntime.InferenceSession(out))
    assert metadata["classes"] == STRANGE_NAMES and metadata["temperature"] == TEMPERATURE


def test_the_onnx_file_describes_its_input_and_output(command_line):
    folder, _ = command_line
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (wave,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (wave.name, wave.shape, wave.type) == ("waveform", ["batch", 22050], "tensor(float)")
    assert (probabilities.name, probabilities.shape) == ("probabilities", ["batch", 3])
    metadata = onnx_metadata(session)
    assert metadata["classes"] == ["high", "low", "mid"]
    assert metadata["sample_rate"] == 22050 and metadata["samples"] == 22050
    onnx_files = [file.name for file in folder.iterdir() if file.name.startswith("model.onnx")]
    assert onnx_files == ["model.onnx"]  # no second file with weights
    with pytest.raises(InvalidArgument, match="22050"):
        session.run(None, {"waveform": np.zeros((1, 22049), np.float32)})


def test_without_the_onnx_packages_their_installation_is_advised(
        runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.onnx"
    words = ["export.py", "--ckpt", str(runs["logmel"].ckpt), "--to", "onnx", str(out)]
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(ROOT / "export.py", run_name="__main__")
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: --to onnx: ")
    assert "onnxscript" in printed.err and printed.err.count("\n") == 1
    assert f"pip install {export.ONNX_PACKAGES}" in printed.err


def test_the_advised_onnx_packages_are_those_of_the_tests():
    pins = (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    assert set(export.ONNX_PACKAGES.split()) <= set(pins)


def test_weights_that_do_not_fit_an_onnx_file_are_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONNX_MAX_BYTES", 10_000)
    with pytest.raises(ExportError, match="--to onnx"):
        run_export(runs["logmel"].ckpt, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- torch.export ---

PROGRAM = """
import json, sys, numpy, torch
files = {"warble": ""}
score = torch.export.load(sys.argv[1], extra_files=files).module()
waves = torch.from_numpy(numpy.load("waves.npy"))
numpy.save("one.npy", score(waves[:1]).numpy())
numpy.save("all.npy", score(waves).numpy())
ours = [name for name in sys.modules if name.startswith(("model", "core", "evaluate"))]
print(json.dumps({"classes": json.loads(files["warble"])["classes"], "ours": ours}))
"""


def test_the_torch_program_needs_torch_only(command_line, runs, tmp_path):
    run = runs["logmel"]
    np.save(tmp_path / "waves.npy", run.waves)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_python("program.py", command_line[0] / "model.pt2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"classes": ["high", "low", "mid"], "ours": []}
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), run.scores, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "one.npy"), run.scores[:1], atol=1e-5)


def test_the_torch_program_applies_the_temperature(runs, tmp_path):
    run = runs["fbank"]
    run_export(run.calibrated(), "torch", tmp_path / "a.pt2")
    score = torch.export.load(tmp_path / "a.pt2").module()
    probabilities = score(torch.from_numpy(run.waves))
    np.testing.assert_allclose(probabilities, at_temperature(run.scores), atol=1e-5)


# --- several labels ---

@pytest.fixture(scope="module")
def multi_label_run(tmp_path_factory):
    """A run over clips with one or two of three tones."""
    folder, lines = tmp_path_factory.mktemp("multi_label"), ["path,label"]
    tones = [("low", 300), ("mid", 1200), ("high", 4000)]
    for i in range(24):
        present = tones[i % 3:][:1 + i % 2]
        waves = [tone(1.0, hz=hz, seed=i) for _, hz in present]
        sf.write(folder / f"{i}.wav", sum(waves) / 2, 16000)
        lines.append(f"{i}.wav,{';'.join(name for name, _ in present)}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return Run(folder / "run", folder / "clips.csv", "fbank", "--loss=bce", "--monitor=val_map")


@pytest.mark.parametrize("kind", FORMATS)
def test_each_of_several_labels_has_its_own_probability(kind, multi_label_run, tmp_path):
    run, out, scores = multi_label_run, tmp_path / "out", multi_label_run.scores
    run_export(run.calibrated(), kind, out)
    if kind == "hf":
        model = AutoModelForAudioClassification.from_pretrained(out)
        assert model.config.problem_type == "multi_label_classification"
        sf.write(tmp_path / "recording.wav", run.waves[0], 16000, subtype="FLOAT")
        probabilities = run_card_code(out, tmp_path / "recording.wav")[None]
        scores = scores[:1]
    elif kind == "onnx":
        probabilities = onnx_scores(out, run.waves)
    else:
        probabilities = torch.export.load(out).module()(torch.from_numpy(run.waves))
    logits = np.log(scores / (1 - scores.astype(np.float64)))
    expected = 1 / (1 + np.exp(-logits / TEMPERATURE))
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    assert abs(np.asarray(probabilities).sum(axis=1) - 1).max() > 1e-2  # they are no softmax


# --- what is at the place of the export ---

@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_others_are_not_replaced(kind, runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for out in ("mine", "file", "file/below"):
        with pytest.raises(ExportError) as caught:
            run_export(runs["logmel"].ckpt, kind, tmp_path / out)
        assert str(tmp_path / out) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.tex"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more of it"


def test_an_older_export_is_replaced_as_a_whole(runs, tmp_path):
    ckpt, out = runs["logmel"].ckpt, tmp_path / "hf"
    out.mkdir()  # an empty folder may be used
    run_export(ckpt, "hf", out)
    (out / "preprocessor_config.json").write_text("of another run")
    run_export(ckpt, "hf", out)
    files = sorted(path.name for path in tmp_path.rglob("*"))
    assert files == ["README.md", "config.json", "hf", "model.safetensors"]
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"thesis\.tex"):
        run_export(ckpt, "hf", out)
    assert (out / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("kind", FORMATS)
def test_only_an_export_of_the_same_format_may_be_replaced(kind, command_line):
    out = command_line[0] / export.DEFAULT_OUT[kind]
    export.check_target(out, kind)
    for other in set(FORMATS) - {kind}:
        with pytest.raises(ExportError):
            export.check_target(out, other)


@pytest.mark.parametrize("kind", ["hf", "onnx"])
def test_an_export_that_differs_from_the_checkpoint_leaves_the_old_one(
        kind, command_line, runs, tmp_path, monkeypatch):
    old, out = command_line[0] / export.DEFAULT_OUT[kind], tmp_path / "out"
    if kind == "hf":
        shutil.copytree(old, out)
    else:
        shutil.copyfile(old, out)

    def content():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = content()
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(TrainingError):
        run_export(runs["logmel"].ckpt, kind, out)
    assert content() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_reported_in_one_line_and_leaves_nothing(runs, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(ExportError) as caught:
            run_export(runs["logmel"].ckpt, "hf", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert str(tmp_path / "out") in message and "File too large" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


# --- what is exported ---

@pytest.mark.parametrize("calibration", [
    {"temperature": 0.0, "thresholds": [0, 0, 0]},
    {"temperature": float("nan"), "thresholds": [0, 0, 0]},
    {"temperature": 1.0, "thresholds": [0]},
    {"temperature": 1.0},
    {"temperature": "x", "thresholds": []},
    [],
])
def test_a_checkpoint_with_an_invalid_calibration_is_refused(calibration, runs, tmp_path):
    ckpt = runs["logmel"].change(lambda parts: parts.update(calibration=calibration),
                                 tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        run_export(ckpt, "torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_of_another_checkpoint_has_no_metrics_of_best_pt(runs, folders, tmp_path, capsys):
    run_export(runs["logmel"].folder / "last.pt", "hf", tmp_path / "last")
    assert "best.pt" in capsys.readouterr().out  # whose metrics are left out
    assert "## Test" not in (tmp_path / "last" / "README.md").read_text()


def test_control_the_card_of_best_pt_has_metrics(folders):
    assert "## Test" in (folders["logmel"] / "README.md").read_text()


def test_class_names_do_not_act_as_markup(runs, tmp_path):
    ckpt = runs["fbank"].change(lambda parts: set_class_names(parts, STRANGE_NAMES),
                                tmp_path / "names.pt")
    run_export(ckpt, "hf", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert r"| 0 | a\|b | " in card
    assert r"| 1 | \<img src\=x\>\n\# title | " in card
    assert r"| 2 | caf\udce9 \`x\` \[y\]\(z\) | " in card
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "hf")
    assert [model.config.id2label[i] for i in range(3)] == STRANGE_NAMES
