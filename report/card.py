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
    "windows of that length and average their probabilities, as the evaluation did. Repeat or pad "
    "a shorter clip before the features are computed, as above: the padding of transformers uses "
    "a value that the model was not trained with.\n")
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
