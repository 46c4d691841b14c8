"""Collect what report.html needs of the model: clips to look at and to listen to."""
import time
from pathlib import Path

import numpy as np
import torch

from data.clips import Clips, TileKey, evaluation_batches
from metrics import apply_temperature
from metrics.false_alarms import reported_classes
from model.relevance import patch_relevance
from report import examples, page

from .evaluation import Evaluation, Scorer, evaluate, window_scores

SUSPECT_CLIPS, SUSPECT_SECONDS = 2000, 120  # training clips that are searched for wrong labels
RELEVANCE_SECONDS = 60  # after that spectrograms are shown without relevant patches
MAX_TILES = 32  # of a long clip, spread over it


def write_report(out: Path, checkpoint: Path, calibration: dict, epoch: int, results: Path,
                 split: str, result: Evaluation, scorer: Scorer, clips: Clips, batch_size: int,
                 command: str) -> str:
    """Write the page `out` about the results in the folder `results` -> a line to print.

    result: the evaluation of `split`, for examples from it; other examples come from the training
    clips, if the manifest has some. epoch: of the checkpoint's weights. command: evaluates again.
    """
    collector = ExampleCollector(scorer, clips, calibration)
    has_label = clips.manifest.has_label
    negatives = result.select(clips.manifest.is_negative[result.rows])
    result = result.select(has_label[result.rows])
    train_rows = clips.manifest.rows("train")
    train_rows = train_rows[has_label[train_rows]]
    if split == "train":
        trained, kinds = result, ("suspect", "uncertain", "right")
    else:
        some = np.random.default_rng(0).permutation(train_rows)[:SUSPECT_CLIPS]
        trained, kinds = score_for_a_while(scorer, clips, some, batch_size), ("suspect",)
    search, shown = examples.SuspectSearch(), []
    if trained is not None:
        search = examples.SuspectSearch(len(trained.rows), len(train_rows),
                                        collector.count_contradicted(trained))
        shown = collector.collect(trained, kinds)
    if split != "train":
        shown += collector.collect_alarms(negatives)
        shown += collector.collect(result, examples.OF_TEST)
    config = scorer.model.config
    try:
        page.write_page(out, checkpoint.parent, results, shown, search, clips.manifest.root,
                        scorer.frontend.mel_hz.numpy(), (config.patch, config.stride), epoch,
                        command)
    except OSError as error:
        return f"{out}: cannot be written ({error.strerror}); the results are in {results}"
    return f"written: {out}"


def score_for_a_while(scorer: Scorer, clips: Clips, rows: np.ndarray, batch_size: int
                      ) -> Evaluation | None:
    """Evaluate these rows, or as many as SUSPECT_SECONDS allow; None if there are none."""
    started, parts = time.monotonic(), []
    for i in range(0, len(rows), 100):
        if time.monotonic() - started > SUSPECT_SECONDS:
            break
        some = rows[i:i + 100]
        batches = evaluation_batches(clips, some, batch_size)
        parts.append(evaluate(scorer, batches, clips.manifest, some,
                              progress_title="training clips"))
    n_scored = sum(len(part.rows) for part in parts)
    return Evaluation.merge(parts) if n_scored else None


class ExampleCollector:
    """Choose clips of an evaluation and fetch what the page shows of them."""

    def __init__(self, scorer: Scorer, clips: Clips, calibration: dict):
        self.scorer, self.clips = scorer, clips
        self.temperature, self.thresholds = calibration["temperature"], calibration["thresholds"]
        self.sigmoid = scorer.sigmoid
        self.relevance_until = time.monotonic() + RELEVANCE_SECONDS

    def _calibrated(self, result):
        return apply_temperature(result.scores, self.temperature, self.sigmoid)

    def count_contradicted(self, result: Evaluation) -> int:
        """How many clips get another answer than their label."""
        predicted = examples.answers(self._calibrated(result), result.labels, self.thresholds)
        labels = self.clips.manifest.targets(result.rows)
        positives = examples.answers(labels, result.labels, 0.5)
        return int((predicted != positives).any(axis=1).sum())

    def collect(self, result: Evaluation, kinds: tuple[str, ...]) -> list[examples.Example]:
        """Examples of these kinds; clips that cannot be read any more are left out."""
        scores = self._calibrated(result)
        predicted = examples.answers(scores, result.labels, self.thresholds)
        chosen = examples.choose(scores, result.labels, kinds, self.thresholds)
        found = []
        for kind, index, focus in chosen:
            example = self._example(kind, index, focus, int(result.rows[index]), scores[index],
                                    np.flatnonzero(predicted[index]).tolist())
            if example is not None:
                found.append(example)
        return found

    def collect_alarms(self, negatives: Evaluation) -> list[examples.Example]:
        """The surest false alarms in an evaluation of windows that contain none of the classes."""
        if len(negatives.rows) == 0:
            return []
        scores, manifest = self._calibrated(negatives), self.clips.manifest
        alarms = reported_classes(scores, self.thresholds, None if manifest.multi_label else 1)
        found = [self._example("alarm", i, c, int(negatives.rows[i]), scores[i],
                               np.flatnonzero(alarms[i]).tolist())
                 for i, c in examples.choose_alarms(scores, alarms, manifest.group[negatives.rows])]
        return [example for example in found if example is not None]

    def _example(self, kind, index, focus, row, scores, predicted):
        """The clip's tile with the highest score of the class `focus`; None if unreadable."""
        clips, manifest, scorer = self.clips, self.clips.manifest, self.scorer
        starts = clips.tiles(row)
        if len(starts) > MAX_TILES:
            spread = np.linspace(0, len(starts) - 1, MAX_TILES).astype(int)
            starts = [starts[i] for i in np.unique(spread)]
        batch = clips.batch([TileKey(row, start) for start in starts])
        if batch.broken:
            return None
        _, tile_scores, _ = window_scores(scorer.model, scorer.frontend, batch.wave,
                                          scorer.precision, self.sigmoid)
        tile = int(tile_scores[:, focus].argmax())
        with torch.no_grad():
            spec = scorer.frontend(batch.wave[tile:tile + 1].to(scorer.precision.device))
        relevance = None
        if time.monotonic() < self.relevance_until:
            target = torch.tensor([focus], device=spec.device)
            relevance = patch_relevance(scorer.model, spec, target)[0].cpu().numpy()
        n_samples = min(clips.samples, int(clips.total[row]) - starts[tile])
        begin = float(manifest.start[row]) + starts[tile] / clips.rate
        return examples.Example(
            kind, index, manifest.paths[row], manifest.file(row), begin,
            begin + n_samples / clips.rate, manifest.positives([row])[1].tolist(), predicted, focus,
            scores, spec[0].cpu().numpy(), relevance, batch.wave[tile].cpu().numpy(), clips.rate)
