"""Two runs side by side: python -m report.compare runs/a runs/b [OUT]

Prints the settings that differ and the test figures with the paired bootstrap interval of their difference, over the
test clips that both runs have scored, and draws both runs' curves into compare.png (in OUT, or here).
"""
import csv
import json
import sys
from pathlib import Path

import numpy as np

from .style import COLOURS, picture

FIGURES = ("accuracy", "macro_f1")
UNLIKE = {"run_dir", "resume", "cache_dir"}  # flags that differ in any two runs


class CompareError(ValueError):
    """A run that cannot be compared: one line with the mend."""


def compare(one, other, out, n_boot=2000, seed=0):
    """Compare two run folders -> lines for a person, and draw `out`. Raises CompareError."""
    runs = [_read(Path(folder)) for folder in (one, other)]
    names = _names(one, other)
    lines = [f"a = {one}", f"b = {other}", "", "settings that differ:"]
    flags = [run["flags"] for run in runs]
    differ = [name for name in {**flags[0], **flags[1]} if flags[0].get(name) != flags[1].get(name) and name not in UNLIKE]
    lines += [f"  {name:<18} {flags[0].get(name)!s:<24} {flags[1].get(name)!s}" for name in differ] or ["  none"]
    for key in ("weights", "split_sha256", "commit", "device_name", "precision"):
        if runs[0].get(key) != runs[1].get(key):
            lines.append(f"  {key:<18} {str(runs[0].get(key))[:22]:<24} {str(runs[1].get(key))[:22]}")
    lines += ["", *_figures(runs, n_boot, seed)]
    _draw(runs, names, out)
    return [*lines, "", f"written: {out}"]


def _names(*folders):
    """The folders' own names, or with their parents' where these are equal."""
    names = [Path(folder).resolve() for folder in folders]
    return [name.name if len({n.name for n in names}) == len(names) else f"{name.parent.name}/{name.name}" for name in names]


def _read(folder):
    """run.json with its history {column: (epochs,)} and its test predictions {(path, start): (label, prediction)}."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        with open(folder / "history.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        run["history"] = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]} if rows else {}
        with open(folder / "test" / "predictions.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
            run["test"] = {(row["path"], row["start"]): (row["label"], row["prediction"]) for row in csv.DictReader(file)}
        if run.get("multi_label"):
            with np.load(folder / "test" / "scores.npz") as file:
                run["several"] = [file[name] for name in ("labels", "scores", "said")]  # (n, classes) each
                if {part.shape for part in run["several"]} != {(len(run["test"]), len(run["classes"]))}:
                    raise ValueError("scores.npz is not of its predictions")
    except FileNotFoundError as error:
        raise CompareError(f"{error.filename}: not there; give the folders of two finished runs") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{folder}: not a run of this program ({type(error).__name__}: {error})") from None
    return run


def _figures(runs, n_boot, seed):
    """Lines with each figure of both runs and of their difference, over the clips that both have."""
    both = [clip for clip in runs[0]["test"] if clip in runs[1]["test"]]
    if not both:
        return ["no test clip is in both runs: nothing to compare"]
    lines = [f"test, {len(both)} clips that both have scored" + "".join(
        f", {len(run['test']) - len(both)} only in {name}" for run, name in zip(runs, "ab", strict=True)
        if len(run["test"]) > len(both))]
    if any(runs[0]["test"][clip][0] != runs[1]["test"][clip][0] for clip in both):
        raise CompareError("the runs give one clip two labels: they are of different data")
    several = ["several" in run for run in runs]
    if any(several) and (not all(several) or runs[0]["classes"] != runs[1]["classes"]):
        raise CompareError("clips have several labels in one run alone, or the runs know different classes: compare runs of one kind")
    classes = {name: i for i, name in enumerate(sorted({name for run in runs for clip in both for name in run["test"][clip]}))}
    labels = np.array([classes[runs[0]["test"][clip][0]] for clip in both])
    guesses = [np.array([classes[run["test"][clip][1]] for clip in both]) for run in runs]
    rights = [guess == labels for guess in guesses]
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(both), (n_boot, len(both)))
    if all(several):
        rights, found = _of_several(runs, both, draws)
    else:
        found = [[(figure(labels, guess), np.array([figure(labels[i], guess[i]) for i in draws])) for guess in guesses]
                 for figure in (_accuracy, _macro_f1)]
    for name, ((a, drawn_a), (b, drawn_b)) in zip(FIGURES, found, strict=True):
        differences = drawn_b - drawn_a
        low, high = np.percentile(differences, (2.5, 97.5))
        verdict = "" if low <= 0 <= high else "  (b is better)" if low > 0 else "  (a is better)"
        lines.append(f"  {name:<10} a {a:.3f}   b {b:.3f}   b - a {b - a:+.3f}   (95% interval {low:+.3f} to {high:+.3f}){verdict}")
    wins = [int((rights[i] & ~rights[1 - i]).sum()) for i in (0, 1)]
    lines.append(f"  right in a alone {wins[0]}, in b alone {wins[1]}, in both {int((rights[0] & rights[1]).sum())}")
    return lines


def _accuracy(labels, guesses):
    return float((labels == guesses).mean())


def _macro_f1(labels, guesses):
    """Over the classes that are in the labels, as scikit-learn's f1_score with these as `labels`."""
    n = int(max(labels.max(), guesses.max())) + 1
    hits = np.bincount(labels[labels == guesses], minlength=n)
    support, predicted = np.bincount(labels, minlength=n), np.bincount(guesses, minlength=n)
    there = support > 0
    return float((2 * hits[there] / (support + predicted)[there]).mean())


def _of_several(runs, both, draws):
    """Of runs whose clips have several labels: for each run which clips are right (their highest known class is one of their
    labels), and for each of FIGURES [(figure, (n_boot,) figures of the resamples) of each run], as in the runs' metrics."""
    weights = np.stack([np.bincount(draw, minlength=len(both)) for draw in [np.arange(len(both)), *draws]]).astype(np.float64)
    rights, found = [], [[], []]
    for run in runs:
        place = {clip: i for i, clip in enumerate(run["test"])}
        labels, scores, said = (part[[place[clip] for clip in both]] for part in run["several"])
        truth, said = labels == 1, said & ~np.isnan(labels)
        rights.append(truth[np.arange(len(both)), np.where(np.isnan(labels), -np.inf, scores).argmax(axis=1)])
        held, named, right = (weights @ mask for mask in (truth, said, truth & said))  # (1 + n_boot, classes)
        f1 = np.where(held > 0, 2 * right / np.maximum(held + named, 1), np.nan)
        for values, into in zip((weights @ rights[-1] / len(both), np.nanmean(f1, axis=1)), found, strict=True):
            into.append((float(values[0]), values[1:]))
    return rights, found


def _draw(runs, names, out):
    panels = {"loss": (("train_loss", "--"), ("val_loss", "-")), "accuracy": (("train_acc", "--"), ("val_acc", "-")),
              "macro-F1": (("val_macro_f1", "-"),)}
    with picture(out, (11, 3.6), layout="constrained") as figure:
        for ax, (title, lines) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for run, name, colour, letter in zip(runs, names, COLOURS, "ab", strict=False):
                for column, style in lines:
                    if len(run["history"]):
                        label = f"{letter}: {name}" if column.startswith("val") else None
                        ax.plot(run["history"]["epoch"], run["history"][column], style, color=colour, label=label)
            ax.set_title(title)
            ax.set_xlabel("epoch")
            ax.grid(axis="y")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
        figure.suptitle("validation solid, training dashed", x=0.01, ha="left")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or "--help" in sys.argv:
        print(__doc__.strip(), file=sys.stderr)
        sys.exit(0 if "--help" in sys.argv else 2)
    try:
        print("\n".join(compare(sys.argv[1], sys.argv[2], Path(*sys.argv[3:4]) / "compare.png")))
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
