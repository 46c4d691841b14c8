"""The model card of an exported model: README.md in Markdown, for a reader on the hub or in the folder."""
import string

HEADER = """---
library_name: transformers
pipeline_tag: audio-classification
tags:
- audio-classification
- audio-spectrogram-transformer
---
"""
NAMES = {"accuracy": "accuracy", "macro_f1": "macro F1", "map": "mean average precision"}
SOURCES = {"audioset": "weights pretrained on AudioSet (MIT/ast-finetuned-audioset-10-10-0.4593)",
           "imagenet": "weights pretrained on ImageNet (a distilled DeiT)", "none": "random weights"}


def model_card(classes, clips, metrics, source, usage):
    """Markdown. clips: training clips of each class; metrics: {"n": clips, key of NAMES: (value, low, high)} or None;
    source: what the training started from, told where SOURCES knows it (a path is nobody's business); usage: Python that
    runs the model."""
    parts = [HEADER, f"# Audio Spectrogram Transformer, {len(classes)} classes\n",
             "Trained with warble" + (f" from {SOURCES[source]}" if source in SOURCES else "") + ".\n",
             "## Use\n", f"```python\n{usage}```\n",
             "The model hears one stretch of the length it was trained with. Cut a longer recording into stretches of that "
             "length and average their probabilities, as its evaluation did. Make a shorter one that long before the "
             "features are computed, as above: transformers would append another value than the model has met.\n"]
    if metrics:
        parts += [f"## Test\n\n{metrics['n']} clips kept apart from the training, with 95% bootstrap intervals.\n",
                  table("figure value interval".split(), [
                      (name, f"{metrics[key][0]:.3f}", "{1:.3f} to {2:.3f}".format(*metrics[key]))
                      for key, name in NAMES.items()])]
    parts += ["## Classes\n", table(["index", "class", "training clips"],
                                    [(i, plain(name), n) for i, (name, n) in enumerate(zip(classes, clips, strict=True))]),
              "## Licence\n", "None is given yet. Whoever publishes this model says so here and as `license:` in the header, "
              "with the terms of the recordings and of the weights it started from in mind.\n"]
    return "\n".join(parts)


def table(head, rows):
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [head, ["---"] * len(head), *rows])


def plain(name):
    """A class name as text that Markdown and HTML leave alone."""
    return "".join("\\" + c if c in string.punctuation else c if c.isprintable() else ascii(c)[1:-1] for c in name)
