"""export.py --to hf: read by transformers, by the code of its model card and by train.py."""
import json

import numpy as np
import pytest
import soundfile as sf
import torch
import transformers
from export_runs import (
    FRONTENDS,
    SMALL,
    TEMPERATURE,
    UNUSUAL_NAMES,
    Run,
    name_classes,
    run_usage_code,
    softmax_at_temperature,
)
from harness import without_pictures
from safetensors.torch import load_file, save_file
from transformers import (
    ASTForAudioClassification,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
)

import evaluate
import export
import train
from core.run.checkpoint import load_checkpoint
from data.audio import read
from model.ast import AST, ASTConfig
from model.frontend import FrontendConfig, build_frontend
from model.pretrained import WeightsError, load_pretrained, to_hub


@pytest.fixture(scope="module")
def runs(tones, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {frontend: Run(folder / frontend, tones, frontend) for frontend in FRONTENDS}


def export_hf(ckpt, out):
    export.main(["--ckpt", str(ckpt), "--to", "hf", str(out)])
    return out


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory):
    """The exports of both runs."""
    out = tmp_path_factory.mktemp("hf")
    return {frontend: export_hf(run.ckpt, out / frontend) for frontend, run in runs.items()}


# --- transformers ---

@pytest.mark.parametrize("frontend", FRONTENDS)
def test_transformers_computes_the_same_logits(frontend, runs, folders):
    run = runs[frontend]
    theirs, loading = AutoModelForAudioClassification.from_pretrained(
        folders[frontend], output_loading_info=True)
    assert type(theirs) is ASTForAudioClassification
    assert not any(loading.values()), loading  # no tensor missing, left over or of another shape
    spec = run.frontend(torch.from_numpy(run.waves))
    spec = torch.cat([spec, torch.randn_like(spec)])
    with torch.inference_mode():
        logits = theirs(spec.transpose(1, 2)).logits
    ours = run.logits(spec)
    assert ours.std(dim=0).min() > 0.02  # the logits tell the clips apart
    torch.testing.assert_close(logits, ours, atol=1e-4, rtol=0)
    assert list(theirs.config.id2label.items()) == [(0, "high"), (1, "low"), (2, "mid")]


def test_feature_extractor_and_model_give_the_scores_of_evaluation(runs, folders):
    extractor = AutoFeatureExtractor.from_pretrained(folders["fbank"])
    theirs = AutoModelForAudioClassification.from_pretrained(folders["fbank"])
    waves = [sf.read(file, dtype="float32")[0] for file in runs["fbank"].files]
    with torch.inference_mode():
        features = extractor(waves, sampling_rate=16000, return_tensors="pt")
        scores = theirs(**features).logits.softmax(dim=1)
    np.testing.assert_allclose(scores, runs["fbank"].scores, atol=1e-4)
    assert scores.std(dim=0).max() > 0.005  # the clips differ by more than the tolerance


def test_other_front_ends_have_no_feature_extractor(runs, folders, tmp_path, capsys):
    assert not (folders["logmel"] / "preprocessor_config.json").exists()
    with pytest.raises(OSError):
        AutoFeatureExtractor.from_pretrained(folders["logmel"])
    ckpt = runs["fbank"].change(lambda parts: parts["frontend"].update(fmax=7000.0),
                                tmp_path / "band.pt")
    export_hf(ckpt, tmp_path / "hf")
    assert "20 to 7000 Hz" in capsys.readouterr().out
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()


def test_names_of_tensors_are_those_that_transformers_writes(folders, tmp_path):
    config = transformers.ASTConfig.from_pretrained(folders["fbank"])
    ASTForAudioClassification(config).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    ours = load_file(folders["fbank"] / "model.safetensors")
    assert {name: value.shape for name, value in theirs.items()} == {
        name: value.shape for name, value in ours.items()}


def test_config_describes_the_input_and_the_calibration(runs, folders, tmp_path):
    config = json.loads((folders["fbank"] / "config.json").read_text())
    assert config["max_length"] == 98
    assert config["num_mel_bins"] == 128
    assert config["hidden_size"] == 32
    assert config["warble"]["samples"] == 16000
    assert config["warble"]["temperature"] == 1.0
    assert config["warble"]["frontend"] == runs["fbank"].frontend.config.to_dict()
    export_hf(runs["fbank"].calibrated(), tmp_path / "hf")
    theirs = AutoModelForAudioClassification.from_pretrained(tmp_path / "hf")
    assert theirs.config.warble["temperature"] == TEMPERATURE
    assert theirs.config.warble["thresholds"] == [0.1, 0.2, 0.3]


# --- the model card ---

def write_stereo(path, wave, rate):
    """Without rounding to 16 bits."""
    sf.write(path, np.stack([wave, wave], axis=1), rate, subtype="FLOAT")


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_code_in_the_card_gives_the_scores_of_evaluation(frontend, runs, folders, tmp_path):
    run = runs[frontend]
    write_stereo(tmp_path / "recording.wav", read(run.files[0], 16000), 16000)
    probabilities = run_usage_code(folders[frontend], tmp_path / "recording.wav")
    np.testing.assert_allclose(probabilities, run.scores[0], atol=2e-4)


def test_code_in_the_card_applies_the_temperature(runs, tmp_path):
    run = runs["logmel"]
    export_hf(run.calibrated(), tmp_path / "hf")
    write_stereo(tmp_path / "recording.wav", read(run.files[0], 16000), 16000)
    probabilities = run_usage_code(tmp_path / "hf", tmp_path / "recording.wav")
    expected = softmax_at_temperature(run.scores[0])
    np.testing.assert_allclose(probabilities, expected, atol=2e-4)


@pytest.mark.parametrize("frontend, part, values, n_samples", [
    ("fbank", "frontend", {"fmin": 300.0, "fmax": 7000.0}, None),  # another band
    ("logmel", "clip", {"short": "pad"}, 8000),  # 11,025 samples at 22,050 Hz
])
def test_code_in_the_card_follows_the_checkpoint(frontend, part, values, n_samples, runs, tmp_path):
    run = runs[frontend]
    ckpt = run.change(lambda parts: parts[part].update(values), tmp_path / "changed.pt")
    export_hf(ckpt, tmp_path / "hf")
    recording = tmp_path / "recording.wav"
    write_stereo(recording, read(run.files[0], 16000)[:n_samples], 16000)
    wave = torch.zeros(1, run.waves.shape[1])
    samples = torch.from_numpy(read(recording, run.rate))
    wave[0, :len(samples)] = samples
    config = run.frontend.config.to_dict() | (values if part == "frontend" else {})
    spec = build_frontend(FrontendConfig(**config))(wave)
    expected = run.logits(spec)[0].softmax(dim=0).numpy()
    probabilities = run_usage_code(tmp_path / "hf", recording)
    np.testing.assert_allclose(probabilities, expected, atol=2e-4)


def test_metrics_of_another_checkpoint_are_not_in_the_card(runs, folders, tmp_path, capsys):
    assert "bootstrap" in (folders["logmel"] / "README.md").read_text()
    export_hf(runs["logmel"].folder / "last.pt", tmp_path / "last")
    assert "without test metrics" in capsys.readouterr().out
    assert "bootstrap" not in (tmp_path / "last" / "README.md").read_text()


def test_class_names_are_escaped_in_the_card_and_intact_in_the_config(runs, tmp_path):
    ckpt = runs["fbank"].change(lambda parts: name_classes(parts, UNUSUAL_NAMES),
                                tmp_path / "names.pt")
    export_hf(ckpt, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert r"| 0 | a\|b | " in card
    assert r"| 1 | \<img src\=x\>\n\# title | " in card
    assert r"| 2 | caf\udce9 \`x\` \[y\]\(z\) | " in card
    theirs = AutoModelForAudioClassification.from_pretrained(tmp_path / "hf")
    assert [theirs.config.id2label[i] for i in range(3)] == UNUSUAL_NAMES


# --- back into this program ---

@pytest.mark.parametrize("frontend", FRONTENDS)
def test_folder_loads_as_the_same_model(frontend, runs, folders):
    run = runs[frontend]
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2)).eval()
    report = load_pretrained(model, folders[frontend], keep_head=True)
    assert set(report.loaded) | set(report.fitted) == set(model.state_dict())
    assert set(report.fitted) == {"pos_embed"}
    frames = run.frontend.config.frames(run.waves.shape[1])
    assert model.config.grid == run.model.config.patches(frames)
    spec = run.frontend(torch.from_numpy(run.waves))
    with torch.inference_mode():
        assert torch.equal(model(spec), run.logits(spec))


def test_grid_with_a_square_number_of_patches_is_not_taken_for_an_image(tmp_path):
    """12 x 48 patches are as many as 24 x 24."""
    model, loaded = (AST(ASTConfig(3, dim=32, depth=1, heads=2)).eval() for _ in range(2))
    torch.nn.init.normal_(model.pos_embed)
    _, tensors = to_hub(model.state_dict(), model.config, 490)
    save_file(tensors, tmp_path / "model.safetensors")
    load_pretrained(loaded, tmp_path, keep_head=True)
    spec = torch.randn(2, 128, 490)
    torch.testing.assert_close(loaded(spec), model(spec), atol=0, rtol=0)


def test_training_starts_from_the_folder(folders, tones, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    flags = [f"--weights={folders['fbank']}", *SMALL[1:], "--frontend=fbank", "--seconds=1",
             f"--data={tones}", f"--run-dir={run}", "--epochs=1"]
    with without_pictures(monkeypatch) as patch:
        patch.setattr(evaluate, "write_report", lambda *_: "")
        assert train.main(flags) == 0
        out = capsys.readouterr().out
        assert "tensors loaded" in out
        assert "the weights' own grid 12x9, not 12x101" in out
        assert "new: head.0.weight" in out
        checkpoint = load_checkpoint(run / "best.pt")
        assert checkpoint["config"]["time_patches"] == 9
        assert checkpoint["weights"].startswith(str(folders["fbank"]))
        evaluate.main(["--ckpt", str(run / "best.pt")])
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2))  # its checkpoint as weights in turn
    load_pretrained(model, run / "best.pt", keep_head=True, own_reader=load_checkpoint)
    assert torch.equal(model.pos_embed, checkpoint["model"]["pos_embed"])


@pytest.mark.parametrize("changes, n_heads, fix", [
    ({}, 4, "--heads 2"),
    ({"time_stride": 5, "num_attention_heads": 4}, 4, "time_stride"),
])
def test_weights_of_another_geometry_are_refused(changes, n_heads, fix, folders, tmp_path):
    config = json.loads((folders["fbank"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    save_file(load_file(folders["fbank"] / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=fix):
        load_pretrained(AST(ASTConfig(3, dim=32, depth=2, heads=n_heads)), tmp_path)


def test_folders_without_weights_are_refused(tmp_path):
    model = AST(ASTConfig(3, dim=32, depth=2, heads=2))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_pretrained(model, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors") as refused:
        load_pretrained(model, tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
