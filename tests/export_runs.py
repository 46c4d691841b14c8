"""Finished runs to export, and what evaluate.py gives for their test clips."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from harness import without_pictures

import evaluate
import train
from core.run.checkpoint import load_checkpoint, save_checkpoint
from core.scoring import restore
from data.audio import read
from data.manifest import Manifest

SMALL = [
    "--weights=none", "--dim=32", "--depth=2", "--heads=2", "--device=cpu", "--amp=off",
    "--batch-size=6", "--effective-batch=6", "--lr-backbone=1e-3", "--lr-head=2e-3", "--cache=off",
]
FRONTENDS = ["logmel", "fbank"]
TEMPERATURE = 1.7
# Class names that mean something in Markdown or HTML, and one that is not UTF-8.
UNUSUAL_NAMES = ["a|b", "<img src=x>\n# title", "caf\udce9 `x` [y](z)"]


class Run:
    """A run whose weights and averages were then moved far from their start, and its test scores.

    Each tensor thus matters for the scores.
    """

    def __init__(self, folder, data, frontend, *flags):
        self.folder, self.ckpt = folder, folder / "best.pt"
        with pytest.MonkeyPatch.context() as patch, without_pictures(patch):
            patch.setattr(evaluate, "write_report", lambda *_: "")
            train.main([*SMALL, f"--data={data}", f"--run-dir={folder}", f"--frontend={frontend}",
                        "--seconds=1", "--epochs=1", "--ema=0.9", *flags])
            self.change(move_weights, self.ckpt)
            evaluate.main(["--ckpt", str(self.ckpt), "--device=cpu", "--amp=off"])
        checkpoint = load_checkpoint(self.ckpt)
        manifest = Manifest.from_dict(checkpoint["manifest"])
        self.rate = checkpoint["frontend"]["sample_rate"]
        with np.load(folder / "test" / "scores.npz") as file:
            self.files = [manifest.file(row) for row in file["rows"]]
            self.scores = file["scores"]  # (n, classes)
        n_samples = checkpoint["clip"]["samples"]
        self.waves = np.stack([read(file, self.rate, 0, n_samples) for file in self.files])
        self.model, self.frontend = restore(checkpoint, torch.device("cpu"))
        self.model.eval()

    def change(self, edit, path):
        """Write a copy of the checkpoint, changed in place by `edit(parts)`, to `path` -> path."""
        parts = dict(load_checkpoint(self.ckpt))
        edit(parts)
        save_checkpoint(path, parts)
        return path

    def calibrated(self):
        """A copy of the checkpoint with TEMPERATURE and thresholds."""
        calibration = {"temperature": TEMPERATURE, "thresholds": [0.1, 0.2, 0.3]}
        return self.change(lambda parts: parts.update(calibration=calibration),
                           self.folder / "calibrated.pt")

    @torch.inference_mode()
    def logits(self, spec):
        return self.model(spec)


def move_weights(parts):
    generator = torch.Generator().manual_seed(3)
    parts["calibration"] = None
    for name_of_set in ("model", "ema"):
        for name, value in parts[name_of_set].items():
            if name == "head.1.weight":
                scale = 0.6
            else:
                scale = 0.05 if value.dim() > 1 else 0.2
            noise = torch.randn(value.shape, generator=generator) * scale
            parts[name_of_set][name] = value + noise


def name_classes(parts, names):
    parts["classes"] = parts["manifest"]["classes"] = names


def softmax_at_temperature(scores):
    """Softmax scores (n, classes) at TEMPERATURE."""
    scores = np.exp(np.log(scores.astype(np.float64)) / TEMPERATURE)
    return scores / scores.sum(axis=-1, keepdims=True)


def command(*words, cwd):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                          text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_usage_code(folder, recording):
    """Run the Python code of an exported model card on a recording -> probabilities (classes,)."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace('"."', repr(str(folder)))
    code = code.replace('"recording.wav"', repr(str(recording)))
    names = {}
    exec(code, names)
    return names["probabilities"]


def onnx_scores(path, waves):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"waveform": waves})[0]


def onnx_metadata(path):
    properties = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    return {key: json.loads(value) for key, value in properties.items()}
