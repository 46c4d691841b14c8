"""The model card of an exported model: README.md in Markdown, for a reader on a hub or on disk."""
import string
from collections.abc import Iterable, Sequence

from util import printable

HEADER = """---
library_name: transformers
pipeline_tag: audio-classification
tags:
- audio-classification
- audio-spectrogram-transformer
---
"""
LABELS = {"accuracy": "accuracy", "macro_f1": "macro F1", "map": "mean average precision"}
SOURCES = {"audioset": "weights pretrained on AudioSet (MIT/ast-finetuned-audioset-10-10-0.4593)",
           "imagenet": "weights pretrained on ImageNet (a distilled DeiT)",
           "none": "random weights"}
INPUT_LENGTH = (
    "The model takes clips of the length that it was trained with. Cut a longer recording into "
    "windows of that length and average their probabilities, as the evaluation did. Lengthen "
    "a shorter clip before the features are computed, as above: the padding of transformers uses "
    "a value that the model was not trained with.\n")
DESCRIBED = ("logmel", "fbank")  # front ends that `usage_code` can write down
LICENCE = (
    "Not chosen yet. If you publish this model, state the licence here and as `license:` in the "
    "header. Mind the terms of the recordings and of the pretrained weights.\n")


def model_card(classes: Sequence[str], clips: Sequence[int], metrics: dict | None, source: str,
               usage: str) -> str:
    """Model card as Markdown.

    Args:
        clips: (C,) number of training clips of each class.
        metrics: {"n": test clips, key of LABELS: (value, low, high)}, or None.
        source: weights that training started from; only names in SOURCES are shown, since a path
            may be private.
        usage: Python code that runs the model.
    """
    start = f" from {SOURCES[source]}" if source in SOURCES else ""
    parts = [HEADER, f"# Audio Spectrogram Transformer, {len(classes)} classes\n",
             f"Trained with warble{start}.\n",
             "## Use\n", f"```python\n{usage}```\n", INPUT_LENGTH]
    if metrics:
        rows = []
        for key, label in LABELS.items():
            value, low, high = metrics[key]
            rows.append((label, f"{value:.3f}", f"{low:.3f} to {high:.3f}"))
        parts += [f"## Test\n\n{metrics['n']} test clips, not used in training, with 95% "
                  "bootstrap intervals.\n", table(("metric", "value", "interval"), rows)]
    rows = [(i, escaped(name), n) for i, (name, n) in enumerate(zip(classes, clips, strict=True))]
    parts += ["## Classes\n", table(("index", "class", "training clips"), rows),
              "## Licence\n", LICENCE]
    return "\n".join(parts)


def table(head: Sequence, rows: Iterable[Sequence]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def escaped(name: str) -> str:
    """A class name without characters that mean something in Markdown or HTML."""
    return "".join("\\" + c if c in string.punctuation else printable(c) for c in name)


def usage_code(info: dict, c, frames: int, has_extractor: bool, scaling: tuple[float, float]
               ) -> str:
    """Python code from a recording to probabilities, with the files of export.py --to hf.

    c: the FrontendConfig. has_extractor: whether transformers has the front end. scaling: mean and
    standard deviation of an fbank front end.
    """
    n, rate = info["samples"], info["sample_rate"]
    mean, std = scaling
    if info["short"] == "repeat":
        lengthened = f"np.resize(wave, {n})"
    elif info["short"] == "pad":
        lengthened = f"np.pad(wave, (0, {n} - len(wave)))"
    else:  # placed in the middle
        lengthened = f"np.pad(wave, (({n} - len(wave) + 1) // 2, ({n} - len(wave)) // 2))"
    scores = "sigmoid()" if info.get("sigmoid", info["multi_label"]) else "softmax(dim=1)"
    if has_extractor:
        imports = "from transformers import AutoFeatureExtractor, AutoModelForAudioClassification"
        features = f'''extractor = AutoFeatureExtractor.from_pretrained(folder)
x = extractor(wave, sampling_rate={rate}, return_tensors="pt")["input_values"]'''
    elif c.kind == "fbank":
        imports = "import torchaudio\nfrom transformers import AutoModelForAudioClassification"
        features = f'''x = torchaudio.compliance.kaldi.fbank(
    torch.from_numpy(wave)[None], sample_frequency={rate}, window_type="hanning",
    num_mel_bins={c.n_mels}, use_energy=False, htk_compat=True, dither=0.0,
    frame_length={1000 * c.win_length / rate:g}, frame_shift={1000 * c.hop_length / rate:g},
    low_freq={c.fmin}, high_freq={c.fmax})
x = (x[None] - {mean}) / (2 * {std})'''
    elif c.kind not in DESCRIBED:
        imports = "from transformers import AutoModelForAudioClassification"
        features = f'''# The front end of this model, {c.kind!r}, is not described here.
# Compute x with the program that trained it (model/frontend.py, build_frontend).
raise NotImplementedError("compute x with the front end {c.kind} of the training program")
x = None'''
    else:
        imports = "from transformers import AutoModelForAudioClassification"
        features = f'''mel = librosa.feature.melspectrogram(
    y=wave, sr={rate}, n_fft={c.n_fft}, win_length={c.win_length}, hop_length={c.hop_length},
    n_mels={c.n_mels}, fmin={c.fmin}, fmax={c.fmax})
db = librosa.power_to_db(mel, ref=np.max)
x = torch.from_numpy((db - db.mean()) / (db.std() + 1e-6)).float().T[None]'''
    return f'''import librosa
import numpy as np
import torch
{imports}

folder = "."  # this folder, or its name on the hub
model = AutoModelForAudioClassification.from_pretrained(folder).eval()
wave, _ = librosa.load("recording.wav", sr={rate}, mono=True)
wave = {lengthened} if len(wave) < {n} else wave[:{n}]
{features}  # (1, {frames}, {c.n_mels})
with torch.no_grad():
    probabilities = (model(x).logits / {info["temperature"]}).{scores}[0]
for i in probabilities.argsort(descending=True)[:5].tolist():
    print(f"{{probabilities[i]:.3f}} {{model.config.id2label[i]}}")
'''
