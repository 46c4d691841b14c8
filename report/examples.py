"""Clips of a report page to look at and to listen to: which they are, and the cards that show them."""
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from .markup import bdi, clean, colour_png, data_address, element, grey_png, note, section
from .style import plain

KINDS = {  # of example: title, what it is
    "suspect": ("Training clips most confidently wrong", "Clips the model was trained on and still names otherwise, by how much more "
                "it believes in its answer than in the label (the margin of C. Northcutt et al., “Confident Learning”, 2021)."),
    "wrong": ("The worst mistakes", "By how much more it believes in its answer than in the truth; at most two of one confusion."),
    "uncertain": ("The most uncertain", "The two best scores lie closest together."),
    "right": ("Some right ones", "Of different classes, the surest of each."),
}
SEVERAL = {  # the same where clips may have several labels
    "suspect": "Clips the model was trained on and still answers otherwise, the surest at first: by the score of a class that the clip "
               "does not have, or by how little it gives to one that it has.",
    "wrong": "A class said that the clip does not have, or one missed that it has, the surest at first; at most two of one kind.",
    "uncertain": "The score of a class lies closest to its threshold.",
    "right": "Each label said and nothing else, the surest of each class.",
}
OF_TEST = ("wrong", "uncertain", "right")
MOST = {"suspect": 12, "wrong": 10, "uncertain": 6, "right": 6}
WIDEST = 800  # columns of a spectrogram's picture
ORANGE = (230, 159, 0)


@dataclass
class Example:
    """A clip to look at and listen to; of a longer one the tile that spoke most for the class `focus`."""
    kind: str  # of KINDS
    index: int  # of the clip among those scored
    path: str  # as in the manifest
    file: Path  # where it lies
    start: float  # seconds into the file
    end: float
    labels: list  # class indices, most often one
    said: list  # class indices: the answer, or what reaches its threshold
    focus: int  # class index: what the clip was chosen for
    scores: np.ndarray  # (classes,) of the whole clip, calibrated
    spectrogram: np.ndarray  # (n_mels, frames) as the model saw it
    relevance: np.ndarray | None  # (rows, columns) of its patches for `focus`, not negative
    wave: np.ndarray  # (samples,) float32
    rate: int  # Hz


def answers(scores, labels, thresholds):
    """(n, classes) bool: the class with the highest score (n, classes), or, where labels are (n, classes) with nan for what is not
    known, the known classes that reach their thresholds (classes,)."""
    if labels.ndim == 1:
        return scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1])
    return (scores >= np.asarray(thresholds)) & ~np.isnan(labels)


def choose(scores, labels, kinds=OF_TEST, thresholds=None):
    """Which clips to show -> [(kind, index, class that it is chosen for)], the number of each in MOST; no clip twice.
    scores, labels, thresholds: as for `answers`."""
    n = np.arange(len(scores))
    if labels.ndim == 1:
        focus, best = scores.argmax(axis=1), scores.max(axis=1)
        wrong, right = focus != labels, focus == labels
        margin = best - scores[n, labels]  # over the truth
        torn = best - np.partition(scores, -2, axis=1)[:, -2] if scores.shape[1] > 1 else best
        focus, alike = dict.fromkeys(KINDS, focus), dict.fromkeys(KINDS, labels)
    else:
        truth, known, said = labels == 1, ~np.isnan(labels), answers(scores, labels, thresholds)
        error = np.where(known & (said != truth), np.where(truth, 1 - scores, scores), -1.0)
        distance = np.where(known, np.abs(scores - thresholds), np.inf)
        sure = np.where(truth, scores, -1.0)
        wrong, margin, torn, best = (error >= 0).any(axis=1), error.max(axis=1), distance.min(axis=1), sure.max(axis=1)
        right = ~wrong
        focus = {"wrong": error.argmax(axis=1), "uncertain": distance.argmin(axis=1), "right": sure.argmax(axis=1)}
        focus["suspect"] = focus["wrong"]
        alike = {kind: truth[n, focus[kind]] for kind in KINDS}  # missed or wrongly said
    orders = {"wrong": [i for i in np.argsort(-margin, kind="stable") if wrong[i]], "uncertain": np.argsort(torn, kind="stable"),
              "right": [i for i in np.argsort(-best, kind="stable") if right[i]]}
    orders["suspect"] = orders["wrong"]
    most_alike = {"wrong": 2, "right": 1}  # clips of one label and answer
    found, taken = [], set()
    for kind in kinds:
        seen, left = {}, MOST[kind]
        for i in map(int, orders[kind]):
            pair = (alike[kind][i], focus[kind][i])
            if left and i not in taken and seen.get(pair, 0) < most_alike.get(kind, len(labels)):
                seen[pair] = seen.get(pair, 0) + 1
                taken.add(i)
                found.append((kind, i, int(focus[kind][i])))
                left -= 1
    return found


def pictures_of(examples, patch):
    """Addresses of the spectrogram and of what mattered on it, for each example; one grey scale for all."""
    if not examples:
        return []
    values = np.concatenate([example.spectrogram.ravel() for example in examples])
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (1, 99.7)) if len(values) else (0, 1)
    found = []
    for example in examples:
        spec, over = example.spectrogram, None
        if spec.shape[1] > WIDEST:
            edges = np.linspace(0, spec.shape[1], WIDEST, endpoint=False).astype(int)
            spec = np.add.reduceat(spec, edges, axis=1) / np.diff([*edges, spec.shape[1]])
        if example.relevance is not None and example.relevance.max() > 0:
            size, stride = patch
            rows, columns = example.relevance.shape
            margin = (size - stride) / 2  # patches overlap: each is drawn where it is its own
            (n_mels, frames), style = example.spectrogram.shape, {}
            style = (f"left:{margin / frames:.2%};width:{stride * columns / frames:.2%};bottom:{margin / n_mels:.2%};"
                     f"height:{stride * rows / n_mels:.2%}")
            over = data_address("image/png", colour_png(0.8 * example.relevance / example.relevance.max(), ORANGE)), style
        found.append((data_address("image/png", grey_png(spec, low, high)), over))
    return found


def card_of(run, number, example, picture, sound, here, mel_hz):
    names, scores = run.names, example.scores
    order, labels = np.argsort(-scores, kind="stable")[:5], set(example.labels)
    said = [[", " * bool(at), element("b", bdi(names[i])), f" {scores[i]:.0%}"] for at, i in enumerate(
        sorted(example.said, key=lambda i: -scores[i]))] or [element("b", "nothing reaches its threshold")]
    right = example.kind == "right" or set(example.said) == labels
    truth = [[", " * bool(at), bdi(names[i]), f" {scores[i]:.0%}"] for at, i in enumerate(example.labels)]
    said.append(element("span", "right", class_="is-right") if right else element(
        "span", "labels: " if len(labels) > 1 else "label: ", truth, class_="is-wrong"))
    image, over = picture
    seconds = len(example.wave) / example.rate
    layers = [element("img", src=image, alt=f"spectrogram, {seconds:.1f} s", class_="spec"),
              element("img", src=over[0], alt=f"the patches that spoke for {clean(names[example.focus])}", class_="over",
                      style=over[1]) if over else None,
              element("i", class_="head")]
    link = quote(os.fsencode(os.path.relpath(example.file, here)))
    link = link if link.startswith("..") else "./" + link
    player = (element("audio", controls=True, preload="metadata", src=sound, aria_label=f"clip {clean(example.path)}") if sound else
              element("p", element("a", "open the recording", href=link), class_="note"))
    bars = [element("li", element("span", bdi(plain(names[i], 15)), title=clean(names[i])),
                    element("i", style=f"width:{scores[i]:.1%}", class_="is-label" if i in labels else None),
                    element("small", f"{scores[i]:.1%}")) for i in order]
    picture = element("div", layers, class_="picture", data_seconds=f"{seconds:.3f}")
    return element("article", element("h4", said), element("div", _ticks(mel_hz), picture, class_="seen"),
                   element("p", "orange: ", bdi(names[example.focus]), class_="note") if run.several and over else None,
                   player, element("ol", bars, class_="scores"),
                   element("p", element("a", bdi(example.path), href=link), f" {example.start:.1f} to {example.end:.1f} s", class_="file"),
                   class_="card", id=f"clip{number}")


def _ticks(mel_hz):
    """Frequencies left of a spectrogram."""
    if mel_hz is None:
        return None
    mel_hz = np.asarray(mel_hz, float)
    ticks = [hz for hz in (250, 1000, 2000, 4000, 8000) if mel_hz[0] <= hz <= mel_hz[-1]]
    places = (np.interp(ticks, mel_hz, np.arange(len(mel_hz))) + 0.5) / len(mel_hz)
    return element("div", [element("span", f"{hz / 1000:g}k" if hz >= 1000 else hz, style=f"bottom:{place:.1%}") for hz, place in
                           zip(ticks, places)], class_="hertz", aria_hidden="true")


def listen_section(run, by_kind, scored, players):
    """All the cards; the training clips that the model contradicts come first."""
    groups = []
    for kind, (title, what) in KINDS.items():
        what = SEVERAL[kind] if run.several else what
        if kind == "suspect" and scored[1]:
            looked, of, against = scored
            said = f" {looked:,} of the {of:,} training clips, drawn at random, were looked at" if looked < of else f" All {of:,} were looked at"
            if against:
                said += f", {against:,} of them it answers otherwise: " + ("often the label is what is wrong" if against <= looked / 10 else
                                                                           "with so many, most are mistakes of its own")
            cards = by_kind[kind] or element("p", "None: it answers every one of them as its label does.")
            groups.append([element("h3", title, id="labels"), note(what + said + "."), element("div", cards, class_="cards")])
        elif by_kind[kind]:
            groups.append([element("h3", title), note(what), element("div", by_kind[kind], class_="cards")])
    if not groups:
        return None
    switch = element("label", element("input", type="checkbox", id="mattered", checked=True), " show which patches mattered")
    return section("listen", "Listen", note(
        "Spectrograms as the model saw them, all on one grey scale. Orange: the patches that spoke for "
        + ("the class that the clip was chosen for" if run.several else "its answer") + ", by gradient-weighted "
        "attention rollout (H. Chefer et al., 2021), each clip on a scale of its own. Of a longer recording, the stretch that spoke most "
        "for it. Blue bar: the label. Sound is MP3 at the model's sample rate, raised to one peak; ", players),
        element("p", switch, class_="switch"), groups)
