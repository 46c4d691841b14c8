"""Compare two runs: python -m report.compare runs/a runs/b [OUT]

Prints the settings that differ and the test metrics with the paired bootstrap interval of their
difference, over the test clips that both runs have scored. Draws both runs' curves into
compare.png (in the folder OUT, or here).
"""
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metrics import METRICS, metrics_for, resample_counts
from metrics.classification import Outcome, WeightedCounts
from util import InputError, printable

from .run_files import load_scores, read_columns, read_rows
from .style import COLOURS, picture

IGNORED_FLAGS = {"run_dir", "resume", "cache_dir"}  # they differ between any two runs
SETTINGS = ("weights", "split_sha256", "commit", "device_name", "precision")
PANELS = {  # title -> [(column of history.csv, line style)]
    "loss": (("train_loss", "--"), ("val_loss", "-")),
    "accuracy": (("train_acc", "--"), ("val_acc", "-")),
    "macro F1": (("val_macro_f1", "-"),)}


class CompareError(InputError):
    """Two runs that cannot be compared."""


def compare(a: str | Path, b: str | Path, out: Path, n_boot: int = 2000, seed: int = 0
            ) -> list[str]:
    """Compare two run folders: draw `out` and return lines for a person. Raises CompareError."""
    runs = [_read(Path(folder)) for folder in (a, b)]
    lines = [f"a = {a}", f"b = {b}", "", "settings that differ:", *_differences(*runs),
             "", *_metric_lines(*runs, n_boot, seed)]
    _draw(runs, _names(a, b), out)
    return [*lines, "", f"written: {out}"]


def _read(folder):
    """run.json with "history", {column: (epochs,)}, and "test", the test results.

    "test" is {"index": {(path, start): row}, "text": labels as in predictions.csv, and the arrays
    of scores.npz}.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        run["history"] = read_columns(folder / "history.csv")
        run["test"] = load_scores(folder / "test")
        clips = read_rows(folder / "test" / "predictions.csv")
        run["test"]["index"] = {(clip["path"], clip["start"]): i for i, clip in enumerate(clips)}
        run["test"]["text"] = [clip["label"] for clip in clips]
        if not len(clips) == len(run["test"]["scores"]) == len(run["test"]["labels"]):
            raise ValueError("scores.npz does not fit predictions.csv")
        return run
    except FileNotFoundError as error:
        raise CompareError(
            f"{error.filename}: missing; give the folders of two finished runs") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{folder}: not a finished run of this program "
                           f"({type(error).__name__}: {error})") from None


def _differences(a, b):
    """Lines with the flags and the other settings that differ."""
    lines = []
    for name in {**a["flags"], **b["flags"]}:
        value_a, value_b = a["flags"].get(name), b["flags"].get(name)
        if name not in IGNORED_FLAGS and value_a != value_b:
            lines.append(f"  {name:<18} {value_a!s:<24} {value_b!s}")
    if not lines:
        lines.append("  none")
    for name in SETTINGS:
        if a.get(name) != b.get(name):
            lines.append(f"  {name:<18} {str(a.get(name))[:22]:<24} {str(b.get(name))[:22]}")
    return lines


def _metric_lines(a, b, n_boot, seed):
    """Lines with each metric of both runs and their difference, over the clips of both."""
    shared = [clip for clip in a["test"]["index"] if clip in b["test"]["index"]]
    if not shared:
        return ["no test clip is in both runs: nothing to compare"]
    rows = [[run["test"]["index"][clip] for clip in shared] for run in (a, b)]
    _check_same_data(a, b, *rows)
    title = f"test, {len(shared)} clips that both have scored"
    for run, letter in ((a, "a"), (b, "b")):
        extra = len(run["test"]["index"]) - len(shared)
        if extra:
            title += f", {extra} only in {letter}"
    (values_a, correct_a), (values_b, correct_b) = (
        _resampled(run["test"], run_rows, n_boot, seed) for run, run_rows in zip((a, b), rows))
    lines = [title]
    for key in values_a:
        lines.append(_difference_line(METRICS[key].label, values_a[key], values_b[key],
                                      METRICS[key].higher_is_better))
    only_a, only_b = (correct_a & ~correct_b).sum(), (correct_b & ~correct_a).sum()
    lines.append(f"  correct only in a {only_a}, only in b {only_b}, "
                 f"in both {(correct_a & correct_b).sum()}")
    return lines


def _check_same_data(a, b, rows_a, rows_b):
    text_a, text_b = ([run["test"]["text"][i] for i in rows]
                      for run, rows in ((a, rows_a), (b, rows_b)))
    if text_a != text_b:
        raise CompareError("the runs have different labels for the same clip: compare runs on the "
                           "same data")
    multi_label = [bool(run.get("multi_label")) for run in (a, b)]
    if any(multi_label) and (not all(multi_label) or a["classes"] != b["classes"]):
        raise CompareError("only one run has several labels per clip, or the classes differ: "
                           "compare runs of one kind")


def _resampled(test, rows, n_boot, seed):
    """Each metric of these rows, and of each bootstrap resample, as (1 + n_boot,) by its key.

    The same clips are drawn for both runs. Also returns (n,) bool: whether the highest-scoring
    class of each clip is correct.
    """
    predicted = test["predicted"][rows] if "predicted" in test else None
    outcome = Outcome(test["scores"][rows], test["labels"][rows], predicted)
    values = {key: [] for key in metrics_for(outcome.multi_label)}
    all_clips = np.ones((outcome.n, 1), np.int32)
    for weights in [all_clips, *resample_counts(outcome.n, n_boot, seed)]:
        counts = WeightedCounts(outcome, weights)
        for key, blocks in values.items():
            blocks.append(METRICS[key].function(counts))
    return {key: np.concatenate(blocks) for key, blocks in values.items()}, outcome.top_correct


def _difference_line(label, values_a, values_b, higher_is_better):
    """values: (1 + n_boot,), the metric and its bootstrap resamples."""
    differences = values_b - values_a
    low, high = np.percentile(differences[1:], (2.5, 97.5))
    verdict = ""
    if low > 0 or high < 0:
        verdict = "  (b is better)" if (low > 0) == higher_is_better else "  (a is better)"
    return (f"  {label:<18} a {values_a[0]:.3f}   b {values_b[0]:.3f}   "
            f"b - a {differences[0]:+.3f}   (95% interval {low:+.3f} to {high:+.3f}){verdict}")


def _names(*folders):
    """The folders' own names, with their parents' if they are equal."""
    paths = [Path(folder).resolve() for folder in folders]
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    return [f"{path.parent.name}/{path.name}" for path in paths]


def _draw(runs, names, out):
    with picture(out, (11, 3.6), layout="constrained") as figure:
        for ax, (title, lines) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
            for run, name, colour, letter in zip(runs, names, COLOURS, "ab"):
                for column, style in lines:
                    if run["history"]:
                        label = f"{letter}: {name}" if column.startswith("val") else None
                        ax.plot(run["history"]["epoch"], run["history"][column], style,
                                color=colour, label=label)
            ax.set_title(title)
            ax.set_xlabel("epoch")
            ax.grid(axis="y")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=2,
                      frameon=False)
        figure.suptitle("validation solid, training dashed", x=0.01, ha="left")


def main(arguments: Sequence[str]) -> int:
    if "--help" in arguments or len(arguments) not in (2, 3):
        print((__doc__ or "give the folders of two runs").strip(), file=sys.stderr)
        return 0 if "--help" in arguments else 2
    try:
        print("\n".join(compare(*arguments[:2], Path(*arguments[2:]) / "compare.png")))
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {printable(error.filename or 'compare.png')}: cannot be written "
              f"({error.strerror}); give another folder", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
