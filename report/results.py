"""Write the results of an evaluation to disk, and put them into lines for a person."""
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metrics import (
    METRICS,
    apply_temperature,
    confusion,
    error_by_chance,
    evaluate_scores,
    metrics_for,
    per_class,
    predicted_classes,
    recall_by_frequency,
    reliability,
)
from util import CsvWriter, atomic_write, make_folder, write_json

from . import pictures
from .false_alarms import false_alarm_lines, write_false_alarms
from .run_files import load_scores

TOP = 5  # classes with their scores in a row of predictions.csv
THIRDS = ("head", "middle", "tail")


def write_results(folder: Path, result, manifest, classes: Sequence[str], split: str,
                  calibration: dict, leaks: Sequence[str] = ()) -> dict:
    """Write the results of one evaluated split into `folder` and return its metrics.

    Files: metrics.json, scores.npz, predictions.csv, per_class.csv, confusion.png unless clips may
    have several labels, and false_alarms.csv if there are negatives. metrics.json and scores.npz
    hold uncalibrated scores. predictions.csv holds calibrated ones, as predict.py writes them; so
    do multi-label decisions and false alarms.

    Args:
        result: an Evaluation: rows (n,), labels (n,) or (n, C), scores (n, C), losses (n,), n_tiles
            (n,), correct_tiles (n,), broken.
        manifest: the clips that `result.rows` points into.
        calibration: {"temperature": float, "thresholds": (C,) floats, "sigmoid": bool}; the last is
            the kind of the scores (default: whether clips may have several labels).
        leaks: lines on clips that the model was trained or selected on.
    """
    make_folder(folder)
    multi_label = result.labels.ndim == 2
    predicted = predicted_classes(result.scores, calibration) if multi_label else None
    calibration = {"sigmoid": multi_label} | calibration
    calibrated = apply_temperature(result.scores, calibration["temperature"],
                                   calibration["sigmoid"])
    metrics = _metrics(result, manifest, split, calibration, calibrated, predicted)
    metrics["leaks"] = list(leaks)
    metrics["false_alarms"] = write_false_alarms(
        folder / "false_alarms.csv", calibrated, result, manifest, classes, calibration)
    write_json(folder / "metrics.json", metrics)
    _write_scores(folder / "scores.npz", result, manifest, predicted)
    _write_predictions(folder / "predictions.csv", result, manifest, classes, calibrated, predicted,
                       calibration)
    _write_per_class(folder / "per_class.csv", result, classes, calibration, predicted,
                     metrics["false_alarms"])
    if not multi_label:
        labelled = result.select(result.labels >= 0)
        matrix = confusion(labelled.labels, labelled.scores.argmax(axis=1), len(classes))
        pictures.confusion(matrix, classes, folder / "confusion.png")
    return metrics


def _metrics(result, manifest, split, calibration, calibrated, predicted):
    """The content of metrics.json, without false alarms."""
    chosen = manifest.has_label[result.rows]
    if predicted is not None:  # decisions of yes or no are right or wrong without a label, too
        chosen = np.ones_like(chosen)
    scores, calibrated, labels = result.scores[chosen], calibrated[chosen], result.labels[chosen]
    metrics = {
        "split": split,
        **evaluate_scores(result.scores, result.labels, predicted=predicted,
                          groups=manifest.group[result.rows]),
        "loss": float(result.losses.mean()),
        "unreadable": len(result.broken),
        "silent": 0 if result.silent is None else int(result.silent.sum()),
        "tiles": int(result.n_tiles.sum()),
        "tile_accuracy": float(result.correct_tiles[chosen].sum() / result.n_tiles[chosen].sum()),
        "temperature": calibration["temperature"],
        "sigmoid": calibration["sigmoid"],
        "ece": reliability(scores, labels)[1],
        "ece_calibrated": reliability(calibrated, labels)[1],
        "ece_by_chance": error_by_chance(calibrated, labels),
    }
    train_rows = manifest.rows("train")
    if len(train_rows):  # data of another source has none
        train_counts = manifest.select(train_rows).counts()
        metrics |= recall_by_frequency(result.scores, result.labels, train_counts, predicted)
    return metrics


def _write_scores(path, result, manifest, predicted):
    arrays = {"scores": result.scores.astype(np.float32), "labels": result.labels,
              "rows": result.rows, "groups": manifest.group[result.rows]}
    if predicted is not None:
        arrays["predicted"] = predicted
    with atomic_write(path, "wb") as file:
        np.savez(file, **arrays)


def _write_predictions(path, result, manifest, classes, calibrated, predicted, calibration):
    """One row per clip: its labels, the predicted classes and the highest calibrated scores.

    A clip with one label always has a prediction, a clip without one only above the threshold.
    """
    best = np.argsort(-calibrated, axis=1, kind="stable")[:, :TOP]
    thresholds = np.asarray(calibration["thresholds"])
    with atomic_write(path) as file:
        out = CsvWriter(file)
        out.writerow(["path", "start", "end", "label", "prediction", "confidence", "top5"])
        for i, (row, top, scores) in enumerate(zip(result.rows, best, calibrated, strict=True)):
            if predicted is not None:
                answers = _ranked_classes(top, predicted[i])
            elif result.labels[i] >= 0:
                answers = top[:1]
            else:
                answers = top[:1][scores[top[:1]] >= thresholds[top[:1]]]
            surest = answers[0] if len(answers) else top[0]
            start, end = manifest.start[row], manifest.end[row]
            out.writerow([
                manifest.paths[row], f"{start:g}", "" if np.isnan(end) else f"{end:g}",
                manifest.label_text(row), "; ".join(classes[c] for c in answers),
                f"{scores[surest]:.6f}", "; ".join(f"{classes[c]} {scores[c]:.4f}" for c in top)])


def _ranked_classes(top, predicted):
    """Indices of the predicted classes of one clip: those in `top` in its order, then the rest."""
    rest = [c for c in np.flatnonzero(predicted) if c not in top]
    return [c for c in top if predicted[c]] + rest


def _write_per_class(path, result, classes, calibration, predicted, false_alarms):
    """One row per class; undefined figures are blank.

    With thresholds if clips are multi-label, and with false alarms if some clips are negatives.
    """
    columns = ["class", "precision", "recall", "f1", "ap", "support", "confused_with",
               "confused_count"]
    if predicted is not None:
        columns.append("threshold")
    if false_alarms is not None:
        columns.append("false_alarms_per_hour")
    rows = per_class(result.scores, result.labels, len(classes), predicted)
    with atomic_write(path) as file:
        out = CsvWriter(file)
        out.writerow(columns)
        for i, row in enumerate(rows):
            figures = ["" if np.isnan(row[key]) else f"{row[key]:.4f}" for key in columns[1:5]]
            other = classes[row["confused_with"]] if row["confused_with"] >= 0 else ""
            values = [classes[i], *figures, row["support"], other, row["confused_count"]]
            if predicted is not None:
                values.append(f"{calibration['thresholds'][i]:.6f}")
            if false_alarms is not None:
                values.append(f"{false_alarms['per_class'][i]['per_hour']:.4f}")
            out.writerow(values)


def result_lines(metrics: dict) -> list[str]:
    """Lines for the terminal: each metric with its 95% bootstrap interval, and the calibration."""
    head = f"{metrics['split']}: {metrics['n']} clips"
    if metrics.get("unlabelled"):
        head += f" and {metrics['unlabelled']} without a label"
    if metrics["unreadable"]:
        head += f", {metrics['unreadable']} unreadable and skipped"
    if metrics.get("silent"):
        head += f", {metrics['silent']} silent"
    if metrics.get("interval_over") == "groups":
        head += f"; intervals over their {metrics['groups']} groups"
    lines = [head]
    for key, metric in METRICS.items():
        if key in metrics:
            low, high = metrics[f"{key}_ci95"]
            interval = f"(95% interval {low:.3f} to {high:.3f})"
            lines.append(f"  {metric.label:<18} {metrics[key]:.3f}   {interval}")
    if metrics["tiles"] > metrics["n"] + metrics.get("unlabelled", 0):
        lines.append(f"  {'single tiles':<18} {metrics['tile_accuracy']:.3f}   "
                     f"({metrics['tiles']} tiles; the metrics above average them per clip)")
    lines += false_alarm_lines(metrics.get("false_alarms"))
    lines.append(_calibration_line(metrics))
    recalls = {third: metrics.get(f"recall_{third}") for third in THIRDS}
    if any(recall is not None for recall in recalls.values()):
        words = [f"{third} {'-' if recall is None else f'{recall:.3f}'}"
                 for third, recall in recalls.items()]
        lines.append(f"  recall of classes  {', '.join(words)}   "
                     "(thirds by number of training clips)")
    return lines


def _calibration_line(metrics):
    if metrics["temperature"] == 1:
        line = (f"  calibration error  {metrics['ece_calibrated']:.3f} (no temperature lowers the "
                "loss on held-out validation clips)")
    else:
        line = (f"  calibration error  {metrics['ece']:.3f}, {metrics['ece_calibrated']:.3f} at "
                f"temperature {metrics['temperature']:.2f} (fitted on validation)")
    if "ece_by_chance" in metrics:
        line += f"; up to {metrics['ece_by_chance']:.3f} is chance"
    return line


def pooled_results(folders: Sequence[Path], out: Path) -> list[str]:
    """Combine the results of all folds, write folds.json into `out` and return lines about them.

    Gives each metric's mean and standard deviation over the folds, and its value over all clips.
    """
    arrays = [load_scores(folder) for folder in folders]
    fold_metrics = [json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
                    for folder in folders]
    scores = np.concatenate([fold["scores"] for fold in arrays])
    labels = np.concatenate([fold["labels"] for fold in arrays])
    predicted = None
    if labels.ndim == 2:
        predicted = np.concatenate([fold["predicted"] for fold in arrays])
    groups = None
    if all("groups" in fold for fold in arrays):
        groups = np.concatenate([fold["groups"] for fold in arrays])
    pooled = evaluate_scores(scores, labels, predicted=predicted, groups=groups)
    over_folds = {}
    for key in metrics_for(multi_label=labels.ndim == 2):
        values = [metrics[key] for metrics in fold_metrics]
        over_folds[key] = {"mean": float(np.mean(values)),
                           "deviation": float(np.std(values, ddof=1)), "folds": values}
    write_json(out / "folds.json", {"over_folds": over_folds, "pooled": pooled})
    over = ""
    if pooled.get("interval_over") == "groups":
        over = f"; intervals over their {pooled['groups']} groups"
    lines = [f"\n{len(folders)} folds, {pooled['n']} clips{over}",
             f"{'':<21}mean   deviation over folds   all clips together"]
    for key, folds in over_folds.items():
        low, high = pooled[f"{key}_ci95"]
        lines.append(f"  {METRICS[key].label:<18} {folds['mean']:.3f}   {folds['deviation']:.3f}"
                     f"{'':<18}{pooled[key]:.3f} (95% interval {low:.3f} to {high:.3f})")
    return [*lines, f"written: {out}/folds.json"]
