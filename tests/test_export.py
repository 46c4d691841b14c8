"""What export.py writes, read by transformers, onnxruntime and torch alone, against evaluate.py on real files."""
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
from safetensors.torch import load_file, save_file
from transformers import ASTForAudioClassification, AutoFeatureExtractor, AutoModelForAudioClassification

import evaluate
import export
import train
from conftest import ROOT, tone
from core.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from core.scoring import restore
from core.divergence import TrainingError
from data.audio import read
from data.manifest import Manifest
from export import ExportError
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.pretrained import WeightsError, load_pretrained, to_hub

SMALL = ["--weights=none", "--dim=32", "--depth=2", "--heads=2", "--device=cpu", "--amp=off", "--batch-size=6",
         "--effective-batch=6", "--lr-backbone=1e-3", "--lr-head=2e-3", "--cache=off"]
KINDS = ["logmel", "fbank"]


class Run:
    """A finished run whose weights and averages were then moved far from their start, so that each of them matters, and
    what evaluate.py says of its test clips."""

    def __init__(self, folder, data, kind, *flags):
        self.folder, self.ckpt = folder, folder / "best.pt"
        train.main([*SMALL, f"--data={data}", f"--run-dir={folder}", f"--frontend={kind}", "--seconds=1", "--epochs=1",
                    "--ema=0.9", *flags])
        self.change(shake)
        evaluate.main(["--ckpt", str(self.ckpt), "--device=cpu", "--amp=off"])
        state = load_checkpoint(self.ckpt)
        manifest, self.rate = Manifest.from_dict(state["manifest"]), state["frontend"]["sample_rate"]
        with np.load(folder / "test" / "scores.npz") as file:
            self.files, self.scores = [manifest.file(row) for row in file["rows"]], file["scores"]
        self.waves = np.stack([read(file, self.rate, 0, state["clip"]["samples"]) for file in self.files])
        self.model, self.frontend = restore(state, torch.device("cpu"))
        self.model.eval()

    def change(self, how, ckpt=None, source=None):
        """Write what `how(state)` makes of a checkpoint, by default of this run's and in its place -> the path."""
        state = dict(load_checkpoint(source or self.ckpt))
        how(state)
        save_checkpoint(ckpt or self.ckpt, state)
        return ckpt or self.ckpt

    @torch.inference_mode()
    def logits(self, spec):
        return self.model(spec)


def shake(state):
    generator = torch.Generator().manual_seed(3)
    state["calibration"] = None
    for part in ("model", "ema"):
        for name, value in state[part].items():
            scale = 0.6 if name == "head.1.weight" else 0.05 if value.dim() > 1 else 0.2
            state[part][name] = value + torch.randn(value.shape, generator=generator) * scale


@pytest.fixture(scope="module")
def runs(tones, tmp_path_factory):
    return {kind: Run(tmp_path_factory.mktemp("runs") / kind, tones, kind) for kind in KINDS}


def calibrated(run, temperature=1.7):
    """The run's checkpoint with a calibration, beside the other one."""
    thresholds = [0.1, 0.2, 0.3]
    return run.change(lambda state: state.update(calibration={"temperature": temperature, "thresholds": thresholds}),
                      run.folder / "calibrated.pt")


def at_temperature(scores, temperature):
    scores = np.exp(np.log(scores.astype(np.float64)) / temperature)
    return scores / scores.sum(axis=1, keepdims=True)


def command(*words, cwd):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


# --- transformers ---

@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory):
    """Of both runs what --to hf writes."""
    out = tmp_path_factory.mktemp("hf")
    for kind, run in runs.items():
        export.main(["--ckpt", str(run.ckpt), "--to", "hf", str(out / kind)])
    return {kind: out / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_has_the_same_logits(kind, runs, folders):
    theirs, said = AutoModelForAudioClassification.from_pretrained(folders[kind], output_loading_info=True)
    assert type(theirs) is ASTForAudioClassification
    assert not any(said.values()), said  # nothing missing, left over or of another shape
    spec = runs[kind].frontend(torch.from_numpy(runs[kind].waves))
    spec = torch.cat([spec, torch.randn_like(spec)])
    with torch.inference_mode():
        logits = theirs(spec.transpose(1, 2)).logits
    ours = runs[kind].logits(spec)
    assert ours.std(dim=0).min() > 0.02  # so do these
    torch.testing.assert_close(logits, ours, atol=1e-4, rtol=0)
    assert list(theirs.config.id2label.items()) == [(0, "high"), (1, "low"), (2, "mid")]


def test_the_feature_extractor_and_the_model_give_the_probabilities_of_the_evaluation(runs, folders):
    extractor = AutoFeatureExtractor.from_pretrained(folders["fbank"])
    theirs = AutoModelForAudioClassification.from_pretrained(folders["fbank"])
    waves = [sf.read(file, dtype="float32")[0] for file in runs["fbank"].files]
    with torch.inference_mode():
        found = theirs(**extractor(waves, sampling_rate=16000, return_tensors="pt")).logits.softmax(dim=1)
    np.testing.assert_allclose(found, runs["fbank"].scores, atol=1e-4)
    assert found.std(dim=0).max() > 0.005  # the clips differ by far more than what is allowed


def test_without_audiosets_front_end_there_is_no_feature_extractor_and_it_is_said(runs, folders, tmp_path, capsys):
    assert not (folders["logmel"] / "preprocessor_config.json").exists()
    with pytest.raises(OSError):
        AutoFeatureExtractor.from_pretrained(folders["logmel"])
    ckpt = runs["fbank"].change(lambda state: state["frontend"].update(fmax=7000.0), tmp_path / "band.pt")
    export.main(["--ckpt", str(ckpt), "--to", "hf", str(tmp_path / "hf")])
    assert "no feature extractor for fbank of 20 to 7000 Hz" in capsys.readouterr().out
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("case", ["logmel", "fbank", "fbank, another band", "short, padded", "calibrated"])
def test_the_code_in_the_model_card_gives_the_probabilities_of_the_evaluation(case, runs, tmp_path):
    run = runs[case.split(",")[0] if case.startswith("fbank") else "logmel"]
    ckpt, band, scores = run.ckpt, {}, run.scores[0]
    if "band" in case:
        band = {"fmin": 300.0, "fmax": 7000.0}
        ckpt = run.change(lambda state: state["frontend"].update(band), tmp_path / "band.pt")
    if case == "calibrated":
        ckpt, scores = calibrated(run), at_temperature(run.scores[:1], 1.7)[0]
    if "padded" in case:
        ckpt = run.change(lambda state: state["clip"].update(short="pad"), tmp_path / "pad.pt")
    export.main(["--ckpt", str(ckpt), "--to", "hf", str(tmp_path / "hf")])
    wave, recording = read(run.files[0], 16000), tmp_path / "recording.wav"
    if "padded" in case:
        wave = wave[:8000]  # 11,025 samples at 22,050 Hz, without rounding
    sf.write(recording, np.stack([wave, wave], axis=1), 16000, subtype="FLOAT")
    if band or "padded" in case:
        frontend = build_frontend(FrontendConfig(**{**run.frontend.config.to_dict(), **band}))
        wave = torch.zeros(1, run.waves.shape[1])
        known = torch.from_numpy(read(recording, run.rate))
        wave[0, :len(known)] = known
        scores = run.logits(frontend(wave))[0].softmax(dim=0).numpy()
    code = re.search(r"```python\n(.*?)```", (tmp_path / "hf" / "README.md").read_text(), re.S)[1]
    names = {}
    exec(code.replace('"."', repr(str(tmp_path / "hf"))).replace('"recording.wav"', repr(str(recording))), names)
    np.testing.assert_allclose(names["probabilities"], scores, atol=2e-4)


def test_names_of_tensors_are_those_that_transformers_writes(folders, tmp_path):
    theirs = ASTForAudioClassification(transformers.ASTConfig.from_pretrained(folders["fbank"]))
    theirs.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "model.safetensors"), load_file(folders["fbank"] / "model.safetensors")
    assert {name: value.shape for name, value in theirs.items()} == {name: value.shape for name, value in ours.items()}


def test_config_says_what_the_model_was_trained_for(runs, folders, tmp_path):
    said = json.loads((folders["fbank"] / "config.json").read_text())
    assert (said["max_length"], said["num_mel_bins"], said["hidden_size"], said["warble"]["samples"]) == (98, 128, 32, 16000)
    assert said["warble"]["temperature"] == 1.0 and said["warble"]["frontend"] == runs["fbank"].frontend.config.to_dict()
    export.main(["--ckpt", str(calibrated(runs["fbank"])), "--to", "hf", str(tmp_path / "hf")])
    theirs = AutoModelForAudioClassification.from_pretrained(tmp_path / "hf")
    assert theirs.config.warble["temperature"] == 1.7 and theirs.config.warble["thresholds"] == [0.1, 0.2, 0.3]


# --- back into this program ---

@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_comes_back_as_the_same_model(kind, runs, folders):
    run = runs[kind]
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2)).eval()
    report = load_pretrained(model, folders[kind], keep_head=True)
    assert set(report.loaded) | set(report.fitted) == set(model.state_dict()) and set(report.fitted) == {"pos_embed"}
    assert model.config.grid == run.model.config.patches(run.frontend.config.frames(run.waves.shape[1]))
    spec = run.frontend(torch.from_numpy(run.waves))
    with torch.inference_mode():
        assert torch.equal(model(spec), run.logits(spec))


def test_a_grid_that_looks_like_a_square_image_is_none(tmp_path):
    """12 x 48 patches are as many as 24 x 24."""
    model, other = (AST(ASTConfig(3, dim=32, depth=1, heads=2)).eval() for _ in range(2))
    torch.nn.init.normal_(model.pos_embed)
    save_file(to_hub(model.state_dict(), model.config, 490)[1], tmp_path / "model.safetensors")
    load_pretrained(other, tmp_path, keep_head=True)
    x = torch.randn(2, 128, 490)
    torch.testing.assert_close(other(x), model(x), atol=0, rtol=0)


def test_training_goes_on_from_the_folder(folders, tones, tmp_path, capsys):
    flags = [*SMALL, "--frontend=fbank", "--seconds=1", f"--data={tones}", f"--run-dir={tmp_path / 'run'}"]
    flags[0] = f"--weights={folders['fbank']}"
    assert train.main([*flags, "--epochs=1"]) == 0
    out = capsys.readouterr().out
    assert "tensors loaded" in out and "the weights' own grid 12x9, not 12x101" in out and "new: head.0.weight" in out
    state = load_checkpoint(tmp_path / "run" / "best.pt")
    assert state["config"]["time_patches"] == 9 and state["weights"].startswith(str(folders["fbank"]))
    evaluate.main(["--ckpt", str(tmp_path / "run" / "best.pt")])
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2))  # and on from there
    load_pretrained(model, tmp_path / "run" / "best.pt", keep_head=True, own_reader=load_checkpoint)
    assert torch.equal(model.pos_embed, state["model"]["pos_embed"])


def test_folders_that_are_no_weights(folders, tmp_path, capsys):
    model = AST(ASTConfig(3, dim=32, depth=2, heads=4))
    with pytest.raises(WeightsError, match="num_attention_heads is 2, the model's is 4; use --heads 2"):
        load_pretrained(model, folders["fbank"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="config.json cannot be read"):
        load_pretrained(model, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match="a folder without model.safetensors; give one that export.py --to hf wrote") as caught:
        load_pretrained(model, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    said = json.loads((folders["fbank"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "time_stride": 5, "num_attention_heads": 4}))
    save_file(load_file(folders["fbank"] / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="time_stride is 5, the model's is 10"):
        load_pretrained(model, tmp_path)


# --- onnx and torch.export ---

@pytest.fixture(scope="module")
def by_command(runs, tmp_path_factory):
    """What the three command lines write for the newest run under runs/, and what they say."""
    cwd = tmp_path_factory.mktemp("work")
    (cwd / "runs").mkdir()
    (cwd / "runs" / "a").symlink_to(runs["logmel"].folder)
    done = command(ROOT / "export.py", "--ckpt", "best.pt", "--to", "onnx", cwd=cwd)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    said = {"onnx": done.stdout}
    for kind in ("hf", "torch"):  # in this process, which has imported all that takes so long
        heard = io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(heard), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["export.py", "--ckpt", "best.pt", "--to", kind])
            runpy.run_path(ROOT / "export.py", run_name="__main__")
        said[kind] = heard.getvalue()
    assert all("checked: " in text and "written: runs/a/" in text for text in said.values()), said
    return runs["logmel"].folder, said


def onnx_scores(path, waves):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"waveform": waves})[0]


def test_hf_by_the_command_line(by_command, runs):
    folder, said = by_command
    assert "written: runs/a/hf" in said["hf"] and "README.md has the lines of Python" in said["hf"]
    assert {file.name for file in (folder / "hf").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    card = (folder / "hf" / "README.md").read_text()
    metrics = json.loads((folder / "test" / "metrics.json").read_text())
    assert f"| accuracy | {metrics['accuracy']:.3f} | {metrics['accuracy_ci95'][0]:.3f} to " in card
    counts = [len(list(path.iterdir())) for path in sorted(runs["logmel"].files[0].parents[1].iterdir())]
    rows = re.findall(r"^\| (\d) \| (\w+) \| (\d+) \|$", card, re.M)
    assert [row[:2] for row in rows] == [("0", "high"), ("1", "low"), ("2", "mid")]
    assert all(0 < int(row[2]) < count for row, count in zip(rows, counts, strict=True))


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_onnxruntime_gives_the_probabilities_of_the_evaluation(batch, by_command, runs):
    run = runs["logmel"]
    assert len(run.waves) >= 7
    found = onnx_scores(by_command[0] / "model.onnx", run.waves[:batch])
    np.testing.assert_allclose(found, run.scores[:batch], atol=1e-4)
    assert run.scores.std(axis=0).max() > 0.01


def test_onnx_of_the_other_front_end_with_a_temperature(runs, tmp_path):
    run = runs["fbank"]
    ckpt = run.change(lambda state: name_classes(state, STRANGE), tmp_path / "a.pt", calibrated(run))
    export.main(["--ckpt", str(ckpt), "--to", "onnx", str(tmp_path / "new" / "a.onnx")])
    found = onnx_scores(tmp_path / "new" / "a.onnx", run.waves)
    np.testing.assert_allclose(found, at_temperature(run.scores, 1.7), atol=1e-4)
    assert np.abs(found - run.scores).max() > 1e-2
    said = onnxruntime.InferenceSession(tmp_path / "new" / "a.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == STRANGE and json.loads(said["temperature"]) == 1.7


def test_onnx_file_says_what_it_takes(by_command):
    session = onnxruntime.InferenceSession(by_command[0] / "model.onnx")
    (wave,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (wave.name, wave.shape, wave.type) == ("waveform", ["batch", 22050], "tensor(float)")
    assert (probabilities.name, probabilities.shape) == ("probabilities", ["batch", 3])
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said["classes"] == ["high", "low", "mid"] and said["sample_rate"] == 22050 and said["samples"] == 22050
    assert [file.name for file in by_command[0].iterdir() if file.name.startswith("model.onnx")] == ["model.onnx"]
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="22050"):
        session.run(None, {"waveform": np.zeros((1, 22049), np.float32)})


def test_the_torch_program_runs_with_torch_alone(by_command, runs, tmp_path):
    run = runs["logmel"]
    np.save(tmp_path / "waves.npy", run.waves)
    code = ("import json, sys, numpy, torch\n"
            "said = {'warble': ''}\n"
            "score = torch.export.load(sys.argv[1], extra_files=said).module()\n"
            "waves = torch.from_numpy(numpy.load('waves.npy'))\n"
            "numpy.save('one.npy', score(waves[:1]).numpy())\n"
            "numpy.save('all.npy', score(waves).numpy())\n"
            "print(json.loads(said['warble'])['classes'], [m for m in sys.modules if m.startswith(('model', 'evaluate'))])\n")
    (tmp_path / "score.py").write_text(code)
    done = command("score.py", by_command[0] / "model.pt2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['high', 'low', 'mid'] []\n"
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), run.scores, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "one.npy"), run.scores[:1], atol=1e-5)


def test_the_torch_program_of_the_other_front_end_with_a_temperature(runs, tmp_path):
    run = runs["fbank"]
    export.main(["--ckpt", str(calibrated(run)), "--to", "torch", str(tmp_path / "a.pt2")])
    found = torch.export.load(tmp_path / "a.pt2").module()(torch.from_numpy(run.waves))
    np.testing.assert_allclose(found, at_temperature(run.scores, 1.7), atol=1e-5)


def test_no_folder_of_this_machine_is_told(by_command):
    for name in ("model.onnx", "model.pt2", "hf/config.json", "hf/README.md"):
        assert str(ROOT).encode() not in (by_command[0] / name).read_bytes(), name


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A run over clips that hold one or two of three tones."""
    folder, lines = tmp_path_factory.mktemp("several"), ["path,label"]
    for i in range(24):
        held = [("low", 300), ("mid", 1200), ("high", 4000)][i % 3:][:1 + i % 2]
        sf.write(folder / f"{i}.wav", sum(tone(1.0, hz=hz, seed=i) for _, hz in held) / 2, 16000)
        lines.append(f"{i}.wav,{';'.join(name for name, _ in held)}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return Run(folder / "run", folder / "clips.csv", "fbank", "--loss=bce", "--monitor=val_map")


@pytest.mark.parametrize("kind", list(export.DEFAULT_OUT))
def test_of_several_labels_each_has_a_probability_of_its_own(kind, several, tmp_path):
    out = tmp_path / "out"
    export.main(["--ckpt", str(calibrated(several)), "--to", kind, str(out)])
    if kind == "hf":
        theirs = AutoModelForAudioClassification.from_pretrained(out)
        assert theirs.config.problem_type == "multi_label_classification"
        sf.write(tmp_path / "recording.wav", several.waves[0], 16000, subtype="FLOAT")
        code, names = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)[1], {}
        exec(code.replace('"."', repr(str(out))).replace('"recording.wav"', repr(str(tmp_path / "recording.wav"))), names)
        found, scores = names["probabilities"], several.scores[0]
    elif kind == "onnx":
        found, scores = onnx_scores(out, several.waves), several.scores
    else:
        found, scores = torch.export.load(out).module()(torch.from_numpy(several.waves)), several.scores
    odds = np.log(scores / (1 - scores.astype(np.float64)))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-odds / 1.7)), atol=1e-4)
    assert abs(np.asarray(found).sum(axis=-1) - 1).max() > 1e-2


# --- what is refused ---

@pytest.mark.parametrize("kind", list(export.DEFAULT_OUT))
def test_what_is_not_ours_stays(kind, runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for out in ("mine", "file", "file/below"):
        with pytest.raises(ExportError, match=out) as caught:
            export.main(["--ckpt", str(runs["logmel"].ckpt), "--to", kind, str(tmp_path / out)])
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.tex"]
    assert (tmp_path / "file").read_text() == "more of it"


def test_what_is_ours_is_replaced_whole(by_command, runs, tmp_path):
    words = ["--ckpt", str(runs["logmel"].ckpt), "--to", "hf", str(tmp_path / "hf")]
    (tmp_path / "hf").mkdir()  # an empty folder is nobody's
    export.main(words)
    (tmp_path / "hf" / "preprocessor_config.json").write_text("of another run")
    export.main(words)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", "config.json", "hf", "model.safetensors"]
    (tmp_path / "hf" / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="holds thesis.tex, which export.py did not write; remove it"):
        export.main(words)
    for kind, name in export.DEFAULT_OUT.items():
        export.check_target(by_command[0] / name, kind)
        for other in set(export.DEFAULT_OUT) - {kind}:
            with pytest.raises(ExportError):
                export.check_target(by_command[0] / name, other)


@pytest.mark.parametrize("kind", ["hf", "onnx"])
def test_numbers_that_differ_leave_the_old_export(kind, by_command, runs, tmp_path, monkeypatch):
    old = by_command[0] / export.DEFAULT_OUT[kind]
    shutil.copytree(old, tmp_path / "out") if kind == "hf" else shutil.copyfile(old, tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(TrainingError, match="more than -1; nothing was written"):
        export.main(["--ckpt", str(runs["logmel"].ckpt), "--to", kind, str(tmp_path / "out")])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(runs, tmp_path):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, usual[1]))
    try:
        with pytest.raises(ExportError, match=r"out: cannot be written \(File too large\); free some space"):
            export.main(["--ckpt", str(runs["logmel"].ckpt), "--to", "hf", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list(tmp_path.iterdir()) == []


def test_without_the_onnx_packages_there_is_the_command_that_installs_them(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["export.py", "--ckpt", str(runs["logmel"].ckpt), "--to", "onnx", str(tmp_path / "a.onnx")])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(ROOT / "export.py", run_name="__main__")
    assert left.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", f"error: --to onnx: needs onnxscript, which is not installed: pip install {export.ONNX_PACKAGES}\n")
    pins = (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    assert set(export.ONNX_PACKAGES.split()) <= set(pins)


def test_other_bad_input(runs, tmp_path, monkeypatch):
    for calibration in ({"temperature": 0.0, "thresholds": [0, 0, 0]}, {"temperature": float("nan"), "thresholds": [0, 0, 0]},
                        {"temperature": 1.0, "thresholds": [0]}, {"temperature": 1.0}, {"temperature": "x", "thresholds": []},
                        []):
        ckpt = runs["logmel"].change(lambda state: state.update(calibration=calibration), tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="a.pt"):
            export.main(["--ckpt", str(ckpt), "--to", "torch", str(tmp_path / "out")])
    monkeypatch.setattr(export, "ONNX_LIMIT", 10_000)
    with pytest.raises(ExportError, match="weights do not fit one .onnx file, which holds 2; use --to torch"):
        export.main(["--ckpt", str(runs["logmel"].ckpt), "--to", "onnx", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_figures_of_another_checkpoint_are_not_told(runs, tmp_path, capsys):
    run = runs["logmel"]
    export.main(["--ckpt", str(run.folder / "last.pt"), "--to", "hf", str(tmp_path / "last")])
    assert "without test figures" in capsys.readouterr().out
    assert "bootstrap" not in (tmp_path / "last" / "README.md").read_text()


STRANGE = ["a|b", "<img src=x>\n# title", "caf\udce9 `x` [y](z)"]


def name_classes(state, names):
    state["classes"] = state["manifest"]["classes"] = names


def test_class_names_are_text(runs, tmp_path):
    ckpt = runs["fbank"].change(lambda state: name_classes(state, STRANGE), tmp_path / "names.pt")
    export.main(["--ckpt", str(ckpt), "--to", "hf", str(tmp_path / "hf")])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert r"| 0 | a\|b | " in card and r"| 1 | \<img src\=x\>\n\# title | " in card
    assert r"| 2 | caf\udce9 \`x\` \[y\]\(z\) | " in card
    theirs = AutoModelForAudioClassification.from_pretrained(tmp_path / "hf")
    assert [theirs.config.id2label[i] for i in range(3)] == STRANGE
