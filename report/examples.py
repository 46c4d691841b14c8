"""Clips of the page to look at and to listen to: which ones, and what their cards show."""
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from .media import colour_png, data_address, grey_png
from .run_files import Run
from .style import ORANGE, shorten

KINDS = {  # kind of example -> (title, explanation for one label per clip, for several labels)
    "suspect": (
        "Training clips with suspicious labels",
        "Training clips that the model still classifies otherwise. Ranked by score(prediction) - "
        "score(label), the margin of C. Northcutt et al., “Confident Learning”, 2021.",
        "Training clips that the model still predicts otherwise. Ranked by the score of a class "
        "that is not a label, or by 1 - score of a missed label."),
    "alarm": (
        "Surest false alarms", *2 * ["Windows of recordings that are said to contain none of the "
        "classes, ranked by the score of the reported class. If the class is heard there, the "
        "recording is not what it is said to be."]),
    "wrong": (
        "Most confident mistakes",
        "Ranked by score(prediction) - score(label), at most two clips per confusion.",
        "Ranked by the score of a class that is not a label, or by 1 - score of a missed label; at "
        "most two clips of each class and kind of error."),
    "uncertain": (
        "Most uncertain", "The two highest scores are closest.",
        "The score of a class is closest to its threshold."),
    "right": (
        "Correct", "The most confident clip of each of several classes.",
        "Exactly the labels are predicted; the most confident clip of each of several classes."),
}
OF_TEST = ("wrong", "uncertain", "right")
MOST = {"suspect": 12, "alarm": 8, "wrong": 10, "uncertain": 6, "right": 6}
MOST_ALIKE = {"wrong": 2, "right": 1}  # clips of the same label and prediction
MOST_ALARMS_OF_RECORDING = 2
WIDEST = 800  # columns of a spectrogram's picture
TOP = 5  # classes with a bar on a card
MIN_FILLED = 0.005  # share of the window; less is rounding
TIME_STEPS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200)  # seconds
MOST_TIME_TICKS = 5


@dataclass
class Example:
    """A clip to look at and listen to; of a long clip, its tile that scores highest for `focus`."""
    kind: str  # key of KINDS
    index: int  # of the clip among the scored ones
    path: str  # as in the manifest
    file: Path
    start: float  # seconds into the file
    end: float
    labels: list[int]  # class indices, most often one
    predicted: list[int]  # class indices
    focus: int  # class index that the clip was chosen for
    scores: np.ndarray  # (C,) of the whole clip, calibrated
    spectrogram: np.ndarray  # (n_mels, frames) as the model saw it
    relevance: np.ndarray | None  # (rows, columns) of its patches for `focus`, not negative
    wave: np.ndarray  # (samples,) float32
    rate: int  # Hz
    window: float | None = None  # seconds that repeats of the clip filled; None: not repeated


class SuspectSearch(NamedTuple):
    """How training clips with suspicious labels were searched for."""
    n_scored: int = 0  # training clips that were scored
    n_train: int = 0  # training clips in all
    n_wrong: int = 0  # scored clips whose prediction is not their label


def answers(scores: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] | float
            ) -> np.ndarray:
    """The predicted classes of each clip, (n, C) bool.

    The class with the highest score (n, C) if labels are (n,). If labels are (n, C), with nan if
    unknown: the known classes that reach their thresholds (C,).
    """
    if labels.ndim == 1:
        return scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1])
    return (scores >= np.asarray(thresholds)) & ~np.isnan(labels)


class _Ranking(NamedTuple):
    order: list  # clips, the best example first
    focus: np.ndarray  # (n,) class that each clip is chosen for
    group: np.ndarray  # (n,) clips of the same focus and group are alike


def choose(scores: np.ndarray, labels: np.ndarray, kinds: Sequence[str] = OF_TEST,
           thresholds: Sequence[float] | None = None) -> list[tuple[str, int, int]]:
    """Choose the clips to show: [(kind, index, class that it is chosen for)], no clip twice.

    Arguments as for `answers`; at most MOST[kind] clips of each kind.
    """
    if labels.ndim == 1:
        rankings = _rank_single_label(scores, labels)
    else:
        rankings = _rank_multi_label(scores, labels, np.asarray(thresholds))
    chosen, used = [], set()
    for kind in kinds:
        order, focus, group = rankings[kind]
        n_alike, n_chosen = {}, 0
        for i in map(int, order):
            pair = (group[i], focus[i])
            enough_alike = n_alike.get(pair, 0) >= MOST_ALIKE.get(kind, len(labels))
            if n_chosen < MOST[kind] and i not in used and not enough_alike:
                n_alike[pair] = n_alike.get(pair, 0) + 1
                n_chosen += 1
                used.add(i)
                chosen.append((kind, i, int(focus[i])))
    return chosen


def choose_alarms(scores: np.ndarray, alarms: np.ndarray, groups: np.ndarray
                  ) -> list[tuple[int, int]]:
    """Choose false alarms to show: [(window, class)], the surest first, few of a recording.

    scores: (n, C) calibrated, of windows without any class. alarms: (n, C) bool. groups: (n,) codes
    of recordings.
    """
    sure = np.where(alarms, scores, -1.0)
    chosen, of_group = [], {}
    for i in _descending(sure.max(axis=1), alarms.any(axis=1)):
        of_group[groups[i]] = of_group.get(groups[i], 0) + 1
        if of_group[groups[i]] <= MOST_ALARMS_OF_RECORDING and len(chosen) < MOST["alarm"]:
            chosen.append((int(i), int(sure[i].argmax())))
    return chosen


def _descending(values, mask):
    """Indices of `mask` by falling value."""
    return [i for i in np.argsort(-values, kind="stable") if mask[i]]


def _rank_single_label(scores, labels):
    predicted, highest = scores.argmax(axis=1), scores.max(axis=1)
    margin = highest - scores[np.arange(len(scores)), labels]
    second = np.partition(scores, -2, axis=1)[:, -2] if scores.shape[1] > 1 else 0.0
    wrong = _Ranking(_descending(margin, predicted != labels), predicted, labels)
    uncertain = np.argsort(highest - second, kind="stable")
    return {"suspect": wrong, "wrong": wrong,
            "uncertain": _Ranking(uncertain, predicted, labels),
            "right": _Ranking(_descending(highest, predicted == labels), predicted, labels)}


def _rank_multi_label(scores, labels, thresholds):
    truth, known = labels == 1, ~np.isnan(labels)
    wrong_pair = known & (answers(scores, labels, thresholds) != truth)
    error = np.where(wrong_pair, np.where(truth, 1 - scores, scores), -1.0)  # (n, C)
    distance = np.where(known, np.abs(scores - thresholds), np.inf)
    confidence = np.where(truth, scores, -1.0)
    is_wrong = wrong_pair.any(axis=1)

    def ranking(order, focus):
        is_label = truth[np.arange(len(labels)), focus]  # a missed label, or a false alarm
        return _Ranking(order, focus, is_label)

    wrong = ranking(_descending(error.max(axis=1), is_wrong), error.argmax(axis=1))
    uncertain = np.argsort(distance.min(axis=1), kind="stable")
    return {"suspect": wrong, "wrong": wrong,
            "uncertain": ranking(uncertain, distance.argmin(axis=1)),
            "right": ranking(_descending(confidence.max(axis=1), ~is_wrong),
                             confidence.argmax(axis=1))}


def first_copy(example: Example, patch: tuple[int, int]) -> Example:
    """An example that was repeated to fill the window -> its first copy; others as they are.

    patch: (size, stride) of the model's patches. Source of the repeats: `--short repeat`.
    """
    window = len(example.wave) / example.rate
    share = (example.end - example.start) / window
    if share > 1 - MIN_FILLED:
        return example
    frames = max(1, math.ceil(share * example.spectrogram.shape[1]))
    relevance = example.relevance
    if relevance is not None:
        size, stride = patch
        columns = math.ceil((frames - (size - stride) / 2) / stride)
        relevance = relevance[:, :max(1, columns)]
    return replace(example, spectrogram=example.spectrogram[:, :frames], relevance=relevance,
                   wave=example.wave[:max(1, round(share * len(example.wave)))], window=window)


def cards(run: Run, examples: Sequence[Example], patch: tuple[int, int], folder: Path
          ) -> list[dict]:
    """What the template shows of each example, without its sound.

    patch: (size, stride) of the model's patches. folder: that the page is in.
    """
    low, high = _grey_range(examples)
    return [{"number": number, "sound": None, **_card(run, example, folder),
             "spectrogram": _spectrogram_address(example.spectrogram, low, high),
             "overlay": _overlay(example, patch)} for number, example in enumerate(examples)]


def _card(run, example, folder):
    names, scores = run.names, example.scores
    order = np.argsort(-scores, kind="stable")[:TOP]
    link = quote(os.fsencode(os.path.relpath(example.file, folder)))
    return {
        "kind": example.kind,
        "predicted": [(names[i], scores[i])
                      for i in sorted(example.predicted, key=lambda i: -scores[i])],
        "labels": [(names[i], scores[i]) for i in example.labels],
        "is_correct": example.kind == "right" or set(example.predicted) == set(example.labels),
        "focus": names[example.focus],
        "seconds": len(example.wave) / example.rate, "window": example.window,
        "ticks": second_ticks(len(example.wave) / example.rate),
        "path": example.path, "start": example.start, "end": example.end,
        "link": link if link.startswith("..") else f"./{link}",
        "bars": [(shorten(names[i], 15), names[i], scores[i], i in example.labels)
                 for i in order],
    }


def _grey_range(examples):
    """One grey scale for all spectrograms: percentiles of their finite values."""
    if not examples:
        return 0.0, 1.0
    values = np.concatenate([example.spectrogram.ravel() for example in examples])
    values = values[np.isfinite(values)]
    return np.percentile(values, (1, 99.7)) if len(values) else (0.0, 1.0)


def _spectrogram_address(spectrogram, low, high):
    frames = spectrogram.shape[1]
    if frames > WIDEST:
        edges = np.linspace(0, frames, WIDEST, endpoint=False).astype(int)
        widths = np.diff([*edges, frames])
        spectrogram = np.add.reduceat(spectrogram, edges, axis=1) / widths
    return data_address("image/png", grey_png(spectrogram, low, high))


def _overlay(example, patch):
    """Address and place in percent of the relevance map that lies on a spectrogram, or None."""
    if example.relevance is None or example.relevance.max() <= 0:
        return None
    size, stride = patch
    rows, columns = example.relevance.shape
    n_mels, frames = example.spectrogram.shape
    margin = (size - stride) / 2  # patches overlap: each is drawn over its middle
    opacity = 0.8 * example.relevance / example.relevance.max()
    return {"address": data_address("image/png", colour_png(opacity, ORANGE)),
            "place": [("left", margin / frames), ("width", stride * columns / frames),
                      ("bottom", margin / n_mels), ("height", stride * rows / n_mels)]}


def hertz_ticks(mel_hz: np.ndarray | None) -> list[tuple[str, float]]:
    """[(text, height from 0 to 1)] of round frequencies beside a spectrogram of these mels."""
    if mel_hz is None:
        return []
    mel_hz = np.asarray(mel_hz, float)
    ticks = [hz for hz in (250, 1000, 2000, 4000, 8000) if mel_hz[0] <= hz <= mel_hz[-1]]
    heights = (np.interp(ticks, mel_hz, np.arange(len(mel_hz))) + 0.5) / len(mel_hz)
    return [(f"{hz / 1000:g}", height) for hz, height in zip(ticks, heights)]


def second_ticks(seconds: float) -> list[tuple[str, float]]:
    """[(text, place from 0 to 1)] of round seconds below a spectrogram of this length."""
    step = next((step for step in TIME_STEPS if seconds / step <= MOST_TIME_TICKS), seconds)
    times = step * np.arange(int(seconds / step + 1e-6) + 1)
    return [(f"{time:g}", min(1.0, time / seconds)) for time in times.round(2)]
