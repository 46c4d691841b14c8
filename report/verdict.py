"""What a run's files say, in words."""
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from metrics import MONITORS, apply_temperature, error_by_chance, reliability
from util import plural, summarize

from .false_alarms import HOW_TO, mean_recalls
from .run_files import Run

CLIPS = {"test": "test clip", "val": "validation clip", "train": "training clip", "all": "clip"}
EVENTS = {
    "diverged": "Validation dropped far below its best value",
    "rollback": "Training went back to its best weights",
    "skipped": "Optimizer steps were skipped: loss or gradients were not finite",
    "scale": "Gradients overflowed in fp16, and the loss scale was lowered",
    "unreadable": "Recordings turned out to be unreadable during the run",
    "memory": "Memory ran out during the run",
    "cache": "The cache of decoded audio could not be written",
}
MOST_NAMES = 8  # in one sentence


class Finding(NamedTuple):
    text: str
    details: list[str]


class Findings(NamedTuple):
    found: list[Finding]  # what is unusual about the run
    absent: list[str]  # what was checked and not found


def plural_es(number: int, noun: str) -> str:
    """"1 class", "2 classes"."""
    return f"{number:,} {noun}{'' if number == 1 else 'es'}"


def headline(run: Run) -> tuple[str, str]:
    """The title of the page and the sentences below it."""
    metrics = run.metrics
    clips = plural(metrics["n"], CLIPS[metrics["split"]])
    low, high = metrics["accuracy_ci95"]
    over = "clips"
    if metrics.get("interval_over") == "groups":
        over = f"{metrics['groups']} groups of clips"
    interval = f"95% interval {100 * low:.1f} to {high:.1%}, by bootstrap over the {over}"
    baseline = (f"Always predicting the most frequent class would be correct for "
                f"{run.most_frequent_share:.1%}.")
    if not run.multi_label:
        title = f"{metrics['accuracy']:.1%} of {clips} classified correctly."
        return title, f"{interval}. {baseline}"
    n_labels, n_predicted, n_correct = (
        int(counts.sum()) for counts in (run.support, run.predicted, run.correct))
    title = (f"{n_correct / n_labels:.1%} of the {plural(n_labels, 'label')} of {clips} are found "
             f"and {n_correct / max(1, n_predicted):.1%} of the predicted labels are correct.")
    return title, (f"Accuracy: the highest-scoring class is one of the labels for "
                   f"{metrics['accuracy']:.1%} of the clips ({interval}). {baseline}")


def training(run: Run, epoch: int | None = None) -> list[str]:
    """Sentences on the run: the best epoch, why training ended, the gap to validation.

    epoch: of the evaluated weights, by default the best.
    """
    if run.best is None:
        return ["This folder has no history.csv with validation results, so nothing is known "
                "about the training."]
    sentences = [_best_epoch(run, epoch), *_why_it_ended(run), _gap(run)]
    return sentences + _augmentation(run)


def _augmentation(run):
    """What augmentation does to the training figures; run.json names what was on."""
    names = run.run.get("augmentations")
    if names is None:  # a run of an older version
        return ["Training figures are measured while the weights change, on clips that may be "
                "augmented."]
    if not names:
        return []
    flags = summarize([f"--{name.replace('_', '-')}" for name in names], MOST_NAMES)
    return [f"Training figures are measured on augmented clips ({flags}) while the weights change; "
            "on the original clips they would be higher."]


def _best_epoch(run, epoch):
    values, epochs, best = run.history[run.monitor], run.history["epoch"], run.best
    label = f"validation {MONITORS[run.monitor].label}"
    n_equal = int((values == values[best]).sum())
    tie = f", the last of {n_equal} equal ones" if n_equal > 1 else ""
    if epoch in (None, epochs[best]):
        weights = "this report evaluates its weights"
    else:
        weights = f"this report evaluates the weights after epoch {epoch}"
    return (f"Epoch {epochs[best]:.0f} of {len(epochs)} was best by {label} "
            f"({values[best]:.3f}{tie}); {weights}.")


def _why_it_ended(run):
    values, n_epochs, best = run.history[run.monitor], len(run.history["epoch"]), run.best
    planned = run.flags.get("epochs", n_epochs)
    first_best = int(np.flatnonzero(values == values[best])[0])
    if n_epochs < planned:
        without_improvement = n_epochs - 1 - first_best
        if without_improvement >= run.flags.get("patience", planned):
            return [f"Training stopped early, after {plural(without_improvement, 'epoch')} "
                    "without improvement."]
        return [f"Training ended before the {planned} planned epochs."]
    if best == first_best == n_epochs - 1 > 0:
        return ["Validation was still improving at the end: more epochs (--epochs) may help."]
    return []


def _gap(run):
    """Accuracy and loss at the best epoch, and what the gap between the two sets means."""
    train_acc, val_acc, train_loss, val_loss = (
        run.history[name][run.best] for name in ("train_acc", "val_acc", "train_loss", "val_loss"))
    points = 100 * (train_acc - val_acc) if train_loss < val_loss else -100.0
    if points > 10:
        meaning = (f"a gap of {points:.0f} points, so the model overfits its training clips; more "
                   "recordings or more augmentation narrow it")
    elif points < -2:
        meaning = "no sign of overfitting"
    else:
        meaning = f"a gap of {max(0, points):.0f} points, which is small"
    return (f"At that epoch {train_acc:.1%} of the training clips and {val_acc:.1%} of the "
            f"validation clips were classified correctly, with losses {train_loss:.3f} and "
            f"{val_loss:.3f}: {meaning}.")


def findings(run: Run) -> Findings:
    """What is unusual about a run, and what was checked and not found."""
    result = Findings([], [])
    checks = (_false_alarm_findings, _event_findings, _rate_findings, _data_findings,
              _class_findings, _accuracy_findings)
    for check in checks:
        check(run, result)
    return result


def _add(result, condition, text, details=(), absent=None):
    """Add a finding if `condition`, else what is absent, if that is worth a word."""
    if condition:
        result.found.append(Finding(text, list(details)))
    elif absent:
        result.absent.append(absent)


def _false_alarm_findings(run, result):
    """How often the model reports a class where there is none: what decides whether it can be used.
    """
    figures = run.metrics.get("false_alarms")
    if figures is None:
        _add(result, True, f"How many false alarms it raises is not known; {HOW_TO}")
        return
    low, high = figures["per_hour_ci95"]
    recalls = mean_recalls(figures)
    known = [f"{recall:.1%} at {rate}" for rate, recall in recalls.items() if recall is not None]
    unknown = [str(rate) for rate, recall in recalls.items() if recall is None]
    rates = sorted(((row["per_hour"], name) for name, row
                    in zip(run.names, figures["per_class"], strict=True)), reverse=True)
    worst = [f"{name} {rate:.1f} per hour" for rate, name in rates if rate > 0]
    details = []
    if known:
        details.append("Recall with thresholds that allow each class so many false alarms per "
                       f"hour: {', '.join(known)}")
    if unknown:
        details.append(f"The recordings are too short to know the recall at {' or '.join(unknown)} "
                       "false alarms of a class per hour")
    if worst:
        details.insert(0, f"Most: {summarize(worst, MOST_NAMES)}. All of them, surest first: "
                       "false_alarms.csv")
    text = (f"{figures['per_hour']:.1f} false alarms per hour at the thresholds in use (95% "
            f"interval {low:.1f} to {high:.1f}), in {figures['hours']:.2f} hours with none of the "
            f"classes, from {plural(figures['recordings'], 'recording')}")
    result.found.append(Finding(text, details))


def _event_findings(run, result):
    if not run.history:
        return
    by_kind = defaultdict(list)
    for event in run.events:
        by_kind[event["event"]].append(event)
    absent = {"diverged": "divergence", "skipped": "skipped steps"}
    for kind in [*EVENTS, *sorted(set(by_kind) - set(EVENTS))]:
        events = by_kind.get(kind, [])
        times = f" ({len(events)} times)" if len(events) > 1 else ""
        details = [f"step {event['step']}, epoch {event['epoch']}: {event['detail']}"
                   for event in events[:5]]
        _add(result, events, EVENTS.get(kind, kind) + times, details, absent.get(kind))


def _rate_findings(run, result):
    if not run.history:
        return
    backbone, head = (run.steps.get(name, np.zeros(0)) for name in ("lr_backbone", "lr_head"))
    both = (backbone > 0) & (head > 0)
    if not both.any():
        return
    ratio = head[both] / backbone[both]
    _add(result, not np.allclose(ratio, ratio[-1], rtol=1e-6),
         f"The ratio of the head's learning rate to the backbone's changes from {ratio[0]:.3g} to "
         f"{ratio[-1]:.3g}: one of the groups was not trained at its own rate",
         absent="a changing ratio of the learning rates")


def _data_findings(run, result):
    notes = run.run.get("data", {}).get("notes")
    leakage = "leakage between the splits"
    if run.metrics["split"] == "all":  # other data than the run's, with notes of its own
        notes, leakage = run.metrics.get("leaks"), "leakage from training"
    leaks = [note.removeprefix("LEAK: ") for note in notes or [] if note.startswith("LEAK: ")]
    conflicts = [leak for leak in leaks if "two labels" in leak]
    leaks = [leak for leak in leaks if leak not in conflicts]
    _add(result, leaks, f"{leakage.capitalize()}: the results may be too good", leaks,
         leakage if notes is not None else None)
    _add(result, conflicts, "Identical recordings with two labels", conflicts)
    n_bad = len(run.bad_files)
    details = [f"{row['path']}: {row['reason']}" for row in run.bad_files[:5]]
    _add(result, n_bad, f"{plural(n_bad, 'unreadable recording')} left out (bad_files.csv)",
         details, "bad files" if run.run else None)
    unreadable = run.metrics["unreadable"]
    _add(result, unreadable, f"{plural(unreadable, 'clip')} of this split could not be read and "
         f"{'is' if unreadable == 1 else 'are'} not counted")
    silent = run.metrics.get("silent", 0)
    _add(result, silent, f"{plural(silent, 'clip')} of this split without any signal (peak below "
         "-90 dBFS); no model can know their class, and their scores count here")


def _class_findings(run, result):
    n_predicted = run.predicted.sum(axis=0)
    has_clips = run.support > 0

    def check(mask, text, absent=None):
        names = [run.names[i] for i in np.flatnonzero(mask)]
        text = f"{plural_es(len(names), 'class')} {text}: {summarize(names, MOST_NAMES)}"
        _add(result, names, text, absent=absent)

    check(has_clips & (n_predicted == 0), "never predicted", "classes that are never predicted")
    check(has_clips & (n_predicted > 0) & (run.correct == 0), "predicted, but never correctly")
    check(~has_clips, "without a clip in this split")


def _accuracy_findings(run, result):
    metrics = run.metrics
    low, high = metrics["accuracy_ci95"]
    _add(result, low <= run.most_frequent_share,
         "Not significantly better than always predicting the most frequent class",
         absent="an accuracy no better than chance")
    if run.best is not None and metrics["split"] == "test":
        val_acc = run.history["val_acc"][run.best]
        _add(result, not low <= val_acc <= high,
             f"Validation accuracy ({val_acc:.1%}) is outside the interval of the test accuracy: "
             "the two sets differ, or the best epoch was selected by chance",
             absent="validation and test far apart")
    _add(result, high - low > 0.15,
         f"Few clips: one clip is worth {1 / metrics['n']:.1%}, and the interval is "
         f"{100 * (high - low):.0f} points wide")
    _calibration_findings(run, result)


def _calibration_findings(run, result):
    """Whether the calibration error is larger than chance alone makes it."""
    metrics = run.metrics
    error, limit = metrics["ece_calibrated"], metrics.get("ece_by_chance")
    if limit is None:  # results of an older version
        scores = apply_temperature(run.scores.astype(np.float64), metrics["temperature"],
                                   run.sigmoid)
        error, limit = reliability(scores, run.labels)[1], error_by_chance(scores, run.labels)
    _add(result, error > limit,
         f"Confidence does not match accuracy: a calibration error of {error:.3f}, while chance "
         f"alone gives up to {limit:.3f}; see Confidence",
         absent="confidence that does not match accuracy")
