"""Waveforms to scores, and the evaluation of a set of clips, for validation and test alike."""
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from core.device.memory import BatchSplitter, is_out_of_memory
from core.device.precision import Precision
from core.divergence import TrainingError
from data.clips import Batch
from data.manifest import Manifest
from losses import is_correct
from model.ast import AST

SILENCE_DBFS = -90  # a recording whose peak is below has no signal; one step of 16 bits is -90.3
SILENCE_PEAK = 10 ** (SILENCE_DBFS / 20)


@dataclass
class Scorer:
    """What scores clips. A `Learner` has the same attributes and takes its place in training."""
    model: AST
    frontend: nn.Module
    loss_fn: nn.Module
    precision: Precision


@dataclass
class Evaluation:
    """Scores of the clips that could be read, in the order of their rows."""
    rows: np.ndarray  # (n,) manifest rows
    labels: np.ndarray  # (n,) class indices; multi-label: (n, classes) of 1, 0 and nan (unknown)
    scores: np.ndarray  # (n, classes) probabilities, the mean over each clip's tiles
    losses: np.ndarray  # (n,) the mean over each clip's tiles
    broken: dict[int, str]  # row -> why it could not be read
    n_tiles: np.ndarray  # (n,) of each clip
    correct_tiles: np.ndarray  # (n,) tiles that are classified correctly by themselves
    silent: np.ndarray | None = None  # (n,) bool: no tile has a signal; None: not known

    @classmethod
    def merge(cls, parts: list["Evaluation"]) -> "Evaluation":
        """Join the evaluations of different rows, ordered by row."""
        rows = np.concatenate([part.rows for part in parts])
        order = np.argsort(rows)

        def joined(name):
            return np.concatenate([getattr(part, name) for part in parts])[order]

        broken = {row: reason for part in parts for row, reason in part.broken.items()}
        silent = None if any(part.silent is None for part in parts) else joined("silent")
        return cls(rows[order], joined("labels"), joined("scores"), joined("losses"), broken,
                   joined("n_tiles"), joined("correct_tiles"), silent)


def is_silent(wave: torch.Tensor) -> np.ndarray:
    """Which waveforms have no signal: (B, samples) in [-1, 1] -> (B,) bool.

    A front end that scales each clip would turn rounding noise into a spectrogram like any other.
    A constant offset is no signal.
    """
    return _is_silent_on_device(wave).cpu().numpy()


def _is_silent_on_device(wave):
    peak = (wave - wave.mean(dim=1, keepdim=True)).abs().amax(dim=1)
    return peak < SILENCE_PEAK


@torch.inference_mode()
def window_scores(model: AST, frontend: nn.Module, wave: torch.Tensor, precision: Precision,
                  multi_label: bool) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """The only way from audio to scores: validation, test, prediction and the report use it.

    wave (B, samples) -> logits (B, classes) and features (B, dim) on the device, and scores
    (B, classes) in float64 on the CPU: sigmoids if multi_label, else a softmax.
    """
    logits, scores, features = _scores_on_device(model, frontend, wave, precision, multi_label)
    return logits, scores.cpu().numpy(), features


def _scores_on_device(model, frontend, wave, precision, multi_label):
    """As window_scores, but nothing is copied to the host: scores (B, classes) float64."""
    wave = wave.to(precision.device, non_blocking=True)
    with precision.autocast():
        features = model.features(frontend(wave))
        logits = model.head(features)
    if multi_label:
        scores = logits.double().sigmoid()
    else:
        scores = logits.float().softmax(dim=1).double()
    return logits, scores, features


def _score_or_split(scorer, batch, multi_label, splitter):
    """`_score_batch`; if memory runs out, again in smaller parts."""
    wave, target = (tensor.to(scorer.precision.device, non_blocking=True)
                    for tensor in (batch.wave, batch.target))
    while True:
        try:
            parts = [_score_batch(scorer, wave[part], target[part], multi_label)
                     for part in splitter.slices(len(batch.rows))]
            return [np.concatenate(columns) for columns in zip(*parts)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except block the error no longer holds the failed attempt's tensors.
        splitter.halve(len(batch.rows))


def _score_batch(scorer, wave, target, multi_label):
    """Scores (B, classes), loss, is it correct, is it silent, each (B,), of tiles (B, samples).

    All are float64 on the host, and come from the device in one copy.
    """
    logits, scores, _ = _scores_on_device(scorer.model, scorer.frontend, wave, scorer.precision,
                                          multi_label)
    columns = (scorer.loss_fn(logits, target), is_correct(logits, target),
               _is_silent_on_device(wave))
    columns = torch.cat([scores, *(column[:, None].double() for column in columns)], dim=1)
    columns = columns.cpu().numpy()
    return columns[:, :-3], columns[:, -3], columns[:, -2], columns[:, -1]


@torch.inference_mode()
def evaluate(scorer: Scorer, batches: Iterable[Batch], manifest: Manifest, rows: np.ndarray,
             should_stop: Callable[[], bool] | None = None, progress_title: str | None = None
             ) -> Evaluation | None:
    """Score every clip of `rows` once; None if `should_stop()` turned true on the way.

    batches: from `data.clips.evaluation_batches` over the same rows. A clip with an unreadable tile
    is left out and listed in `.broken`. Raises TrainingError if scores are not finite.
    """
    model, precision = scorer.model, scorer.precision
    model.eval()
    scorer.loss_fn.eval()
    rows = np.asarray(rows)
    index_of = {int(row): i for i, row in enumerate(rows)}
    scores = np.zeros((len(rows), model.config.n_classes))
    losses = np.zeros(len(rows))
    n_tiles = np.zeros(len(rows), np.int64)
    silent_tiles = np.zeros(len(rows), np.int64)
    correct_tiles = np.zeros(len(rows), np.int64)
    broken, splitter = {}, BatchSplitter(what="batches of evaluation")
    is_quiet = progress_title is None or not sys.stderr.isatty()
    bar = tqdm(batches, desc=progress_title, leave=False, disable=is_quiet, unit="batch")
    with precision.cast_weights_once():
        for batch in bar:
            if should_stop is not None and should_stop():
                return None
            broken.update(batch.broken)
            if len(batch.rows) == 0:
                continue
            tile_scores, loss, correct, silent = _score_or_split(
                scorer, batch, manifest.multi_label, splitter)
            indices = [index_of[row] for row in batch.rows.tolist()]
            np.add.at(scores, indices, tile_scores)
            np.add.at(losses, indices, loss)
            np.add.at(n_tiles, indices, 1)
            np.add.at(silent_tiles, indices, silent.astype(np.int64))
            np.add.at(correct_tiles, indices, correct.astype(np.int64))
    readable = np.array([int(row) not in broken for row in rows], dtype=bool) & (n_tiles > 0)
    rows, n_tiles, correct_tiles = rows[readable], n_tiles[readable], correct_tiles[readable]
    silent = silent_tiles[readable] == n_tiles
    scores = scores[readable] / n_tiles[:, None]
    losses = losses[readable] / n_tiles
    if not np.isfinite(scores).all() or not np.isfinite(losses).all():
        raise TrainingError("the model's scores are not finite: its weights are damaged or the "
                            "precision is too low; try --amp off")
    labels = clip_labels(manifest, rows)
    return Evaluation(rows, labels, scores, losses, broken, n_tiles, correct_tiles, silent)


def clip_labels(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Labels as metrics take them: class indices (n,), or multi-label (n, classes)."""
    if manifest.multi_label:
        return manifest.targets(rows)
    return manifest.labels[rows].astype(np.int64)
