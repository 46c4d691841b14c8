"""Compare two settings: python -m report.compare runs/a runs/b [OUT]

Each is a run, or a folder of runs: of `--folds`, or of several seeds. Prints the settings that
differ and the test metrics with the paired bootstrap interval of their difference, over the test
clips (or groups of clips) that both have scored. Metrics are means over seeds; folds are pooled.
Draws the curves and the test metrics into compare.png (in the folder OUT, or here).
"""
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metrics import METRICS, MONITORS, metrics_for, point_metrics, resample_counts
from metrics.classification import Outcome, WeightedCounts
from util import InputError, plural, printable, read_regular

from .plots import whole_number_axis
from .run_files import load_scores, read_columns, read_rows
from .style import COLOURS, picture, shorten

IGNORED_FLAGS = {"run_dir", "resume", "cache_dir"}  # they differ between any two runs
SETTINGS = ("weights", "split_sha256", "commit", "device_name", "precision")


class CompareError(InputError):
    """Two runs that cannot be compared."""


def compare(a: str | Path, b: str | Path, out: Path, n_boot: int = 2000, seed: int = 0
            ) -> list[str]:
    """Compare two run folders: draw `out` and return lines for a person. Raises CompareError."""
    sides = [_read_side(Path(folder)) for folder in (a, b)]
    lines = [f"a = {a}", f"b = {b}"]
    if max(len(side) for side in sides) > 1:
        lines.append(f"a has {plural(len(sides[0]), 'run')}, b has {len(sides[1])}")
    metric_lines, values = _metric_lines(*sides, n_boot, seed)
    lines += ["", "settings that differ:", *_differences(*sides),
              "", *metric_lines, *_false_alarm_lines(*sides), *_paired_run_lines(*sides)]
    _draw(sides, _names(a, b), values, out)
    return [*lines, "", f"written: {out}"]


def _read_side(folder):
    """The runs of a setting: one run folder, or the run folders in a folder."""
    if not (folder / "run.json").exists():
        inside = sorted(path.parent for path in folder.glob("*/run.json"))
        if inside:
            return [_read(run) for run in inside]
    return [_read(folder)]


def _read(folder):
    """run.json with "history", {column: (epochs,)}, and "test", the test results.

    "test" is {"index": {(path, start): row}, "text": labels as in predictions.csv, and the arrays
    of scores.npz}.
    """
    try:
        run = json.loads(read_regular(folder / "run.json"))
        run["history"] = read_columns(folder / "history.csv")
        run["test"] = load_scores(folder / "test")
        metrics = folder / "test" / "metrics.json"  # older runs did not count false alarms
        run["false_alarms"] = metrics.exists() and json.loads(
            read_regular(metrics)).get("false_alarms")
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
    """Lines with the flags and the other settings that differ between the sides."""
    ignored = IGNORED_FLAGS
    if max(len(a), len(b)) > 1:
        ignored = ignored | {"seed", "fold", "folds"}

    def values(side, part, name):
        texts = [str(run[part].get(name) if part else run.get(name)) for run in side]
        return ", ".join(dict.fromkeys(texts))

    lines = []
    for name in dict.fromkeys(name for run in [*a, *b] for name in run["flags"]):
        value_a, value_b = values(a, "flags", name), values(b, "flags", name)
        if name not in ignored and value_a != value_b:
            lines.append(f"  {name:<18} {value_a:<24} {value_b}")
    if not lines:
        lines.append("  none")
    for name in SETTINGS:
        value_a, value_b = values(a, None, name), values(b, None, name)
        if value_a != value_b:
            lines.append(f"  {name:<18} {value_a[:22]:<24} {value_b[:22]}")
    return lines


def _replicates(side):
    """The runs of a side as lists: folds of one seed, which have no clip in common, together."""
    replicates = []
    for run in side:
        clips = run["test"]["index"].keys()
        for runs in replicates:
            same_seed = runs[0]["flags"].get("seed") == run["flags"].get("seed")
            if same_seed and all(clips.isdisjoint(other["test"]["index"]) for other in runs):
                runs.append(run)
                break
        else:
            replicates.append([run])
    return replicates


def _metric_lines(a, b, n_boot, seed):
    """Lines with each metric of both sides and their difference, over the clips of both.

    Also returns the values of each side as from `_resampled`, none without a common clip.
    """
    clips_a, clips_b = ({clip: None for run in side for clip in run["test"]["index"]}
                        for side in (a, b))
    shared = [clip for clip in clips_a if clip in clips_b]
    if not shared:
        return ["no test clip is in both runs: nothing to compare"], ({}, {})
    _check_same_data([*a, *b], set(shared))
    title = f"test, {len(shared)} clips that both have scored"
    for clips, letter in ((clips_a, "a"), (clips_b, "b")):
        if len(clips) > len(shared):
            title += f", {len(clips) - len(shared)} only in {letter}"
    groups = _groups(a, shared)
    if groups is not None and len(np.unique(groups)) < len(groups):
        title += f"; intervals over {len(np.unique(groups))} groups"
    (values_a, correct_a), (values_b, correct_b) = (
        _resampled(_replicates(side), shared, groups, n_boot, seed) for side in (a, b))
    lines = [title]
    for key in values_a:
        lines.append(_difference_line(METRICS[key].label, values_a[key], values_b[key],
                                      METRICS[key].higher_is_better))
    if correct_a is not None and correct_b is not None:
        only_a, only_b = (correct_a & ~correct_b).sum(), (correct_b & ~correct_a).sum()
        lines.append(f"  correct only in a {only_a}, only in b {only_b}, "
                     f"in both {(correct_a & correct_b).sum()}")
    return lines, (values_a, values_b)


def _false_alarm_lines(a, b):
    """A line with the false alarms per hour of both sides, if all runs have counted them."""
    if not all(run["false_alarms"] for run in [*a, *b]):
        return []
    cells = []
    for letter, side in (("a", a), ("b", b)):
        hours = sum(run["false_alarms"]["hours"] for run in side)
        count = sum(run["false_alarms"]["windows_with_alarm"] for run in side)
        cells.append(f"{letter} {count / hours:.1f} ({count} in {hours:.2f} h)")
    return [f"  false alarms per hour, each at its own thresholds: {', '.join(cells)}"]


def _groups(side, clips):
    """(n,) group of each clip; None if the results are of an older version."""
    if not all("groups" in run["test"] for run in side):
        return None
    group_of = {clip: int(run["test"]["groups"][i])
                for run in side for clip, i in run["test"]["index"].items()}
    return np.array([group_of[clip] for clip in clips])


def _check_same_data(runs, shared):
    label_of = {}
    for run in runs:
        for clip, i in run["test"]["index"].items():
            text = run["test"]["text"][i]
            if clip in shared and label_of.setdefault(clip, text) != text:
                raise CompareError("the runs have different labels for the same clip: compare runs "
                                   "on the same data")
    multi_label = [bool(run.get("multi_label")) for run in runs]
    same_classes = all(run["classes"] == runs[0]["classes"] for run in runs)
    if any(multi_label) and not (all(multi_label) and same_classes):
        raise CompareError("only one run has several labels per clip, or the classes differ: "
                           "compare runs of one kind")


def _outcome(runs, clips):
    """(Outcome of the runs' clips that are in `clips`, their places there)."""
    place_of = {clip: place for place, clip in enumerate(clips)}
    places, parts = [], {"scores": [], "labels": [], "predicted": []}
    for run in runs:
        found = [(place_of[clip], i) for clip, i in run["test"]["index"].items()
                 if clip in place_of]
        rows = np.array([i for _, i in found], np.int64)
        places += [place for place, _ in found]
        for name, arrays in parts.items():
            if name in run["test"]:
                arrays.append(run["test"][name][rows])
    order = np.argsort(places, kind="stable")
    scores, labels, predicted = (
        np.concatenate(arrays)[order] if arrays else None for arrays in parts.values())
    return Outcome(scores, labels, predicted), np.array(places)[order]


def _resampled(replicates, clips, groups, n_boot, seed):
    """Each metric of these clips, and of each bootstrap resample, as (1 + n_boot,) by its key.

    The mean over the replicates. The same clips, or groups, are drawn for both sides. Also returns
    (n,) bool, whether the highest-scoring class of each clip is correct; None if there are several.
    """
    known = set(clips)
    outcomes = [_outcome(runs, clips) for runs in replicates
                if any(not known.isdisjoint(run["test"]["index"]) for run in runs)]
    values = {key: [] for key in metrics_for(outcomes[0][0].multi_label)}
    all_clips = np.ones((len(clips), 1), np.int32)
    for weights in [all_clips, *resample_counts(len(clips), n_boot, seed, groups)]:
        counts = [WeightedCounts(outcome, weights[places]) for outcome, places in outcomes]
        for key, blocks in values.items():
            blocks.append(np.mean([METRICS[key].function(each) for each in counts], axis=0))
    correct = outcomes[0][0].top_correct if len(outcomes) == 1 else None
    return {key: np.concatenate(blocks) for key, blocks in values.items()}, correct


def _paired_run_lines(a, b):
    """Lines with the mean difference over pairs of runs of one fold and seed, with its interval."""
    def by_setting(side):
        return {(run["flags"].get("fold"), run["flags"].get("seed")): run for run in side}

    runs_a, runs_b = by_setting(a), by_setting(b)
    pairs = [(runs_a[key], runs_b[key]) for key in runs_a if key in runs_b]
    if len(pairs) < 2:
        return []
    from scipy.stats import t

    n_folds = len({run["flags"].get("fold") for run, _ in pairs})
    over = f"{n_folds} folds" if n_folds == len(pairs) else f"{len(pairs)} pairs of runs"
    points = [[_point(run) for run in pair] for pair in pairs]
    lines = [f"over the {over}, 95% t interval of the mean difference"]
    for key in points[0][0]:
        differences = np.array([of_b[key] - of_a[key] for of_a, of_b in points])
        half = t.ppf(0.975, len(pairs) - 1) * differences.std(ddof=1) / np.sqrt(len(pairs))
        mean = differences.mean()
        lines.append(f"    {METRICS[key].label:<18} over the {over}: b - a {mean:+.3f}   "
                     f"({mean - half:+.3f} to {mean + half:+.3f})")
    return lines


def _point(run):
    test = run["test"]
    return point_metrics(test["scores"], test["labels"], test.get("predicted"))


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


def history_panels(sides: Sequence[Sequence[dict]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(title, [(column of history.csv, line style)])] of the metrics that any run has."""
    histories = [run["history"] for side in sides for run in side]

    def has_values(column):
        return any(np.isfinite(history.get(column, np.nan)).any() for history in histories)

    panels = []
    for column, metric in MONITORS.items():
        styles = [(column.replace("val_", "train_", 1), "--"), (column, "-")]
        lines = [(name, style) for name, style in styles if has_values(name)]
        if lines:
            panels.append((metric.label, lines))
    return panels


def _draw(sides, names, values, out):
    """Curves of each metric over the epochs, and the test metrics. values: of `_metric_lines`."""
    panels = history_panels(sides)
    n_panels = len(panels) + 1
    columns = 2 if n_panels == 4 else min(3, n_panels)
    rows = math.ceil(n_panels / columns)
    with picture(out, (3.7 * columns, 3.2 * rows + 0.4), layout="constrained") as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, (title, lines) in zip(axes, panels):
            _draw_curves(ax, title, lines, sides)
        _draw_tests(axes[len(panels)], sides, names, values)
        for ax in axes[len(panels) + 1:]:
            ax.set_axis_off()
        figure.legend(*axes[len(panels)].get_legend_handles_labels(), loc="outside lower left",
                      ncols=2, frameon=False)
        figure.suptitle("Curves: validation solid, training dashed", x=0.01, ha="left")


def _draw_curves(ax, title, lines, sides):
    for side, colour in zip(sides, COLOURS):
        for history in (run["history"] for run in side):
            for column, style in lines:
                if column in history:
                    ax.plot(history["epoch"], history[column], style, color=colour)
    ax.set_title(title)
    whole_number_axis(ax, "epoch")
    ax.grid(axis="y")


def _draw_tests(ax, sides, names, values):
    """Each test metric: a point per run, and the mean with its bootstrap interval."""
    points = [[_point(run) for run in side] for side in sides]
    keys = [key for key in METRICS if any(key in point for side in points for point in side)]
    for i, (name, colour) in enumerate(zip(names, COLOURS)):
        for row, key in enumerate(keys):
            y = row + (-0.17, 0.17)[i]
            of_runs = [point[key] for point in points[i] if key in point]
            ax.plot(of_runs, [y] * len(of_runs), "o", color=colour, alpha=0.45)
            if key in values[i]:
                mean, *resamples = values[i][key]
                ax.plot(np.percentile(resamples, (2.5, 97.5)), [y, y], color=colour)
                ax.plot(mean, y, "|", color=colour, markersize=9)
        ax.plot([], [], color=colour, label=f"{'ab'[i]}: {shorten(name)}")
    ax.set_yticks(range(len(keys)), [METRICS[key].label for key in keys])
    ax.set_ylim(len(keys) - 0.5, -0.5)
    ax.grid(axis="x")
    ax.set_title("test: each run, mean, 95% interval", fontsize=9)


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
