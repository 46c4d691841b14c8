"""The table and the picture of a study, with two kinds of 95% intervals.

`results` is always arm -> [RunResult of each fold]. Every arm is compared with the first one.
"""

import os
import platform
from pathlib import Path

import numpy as np

from report.style import BLUE, COLOURS, GREY, picture
from util import atomic_write, plural

COLUMNS = (
    "arm", "test accuracy by fold", "mean", "macro-F1", "validation after epoch 1, 5, last",
    "difference from the first arm, by folds (95% t)", "by clips (95% paired bootstrap)",
)


def write_summary(out: Path, claim: str, results: dict, args) -> None:
    """Write <out>.md and <out>.png."""
    first = next(iter(results))
    intervals = {arm: compare(results[first], results[arm]) for arm in results if arm != first}
    lines = [
        f"**Claim.** {claim}", "",
        table_line(COLUMNS),
        "|" + "---|" * len(COLUMNS),
        *(arm_line(arm, runs, intervals.get(arm, (None, None))) for arm, runs in results.items()),
        "", settings_line(results, args), "",
        f"![validation accuracy by epoch]({out.name}.png)",
    ]
    with atomic_write(out.with_name(out.name + ".md")) as file:
        file.write("\n".join(lines) + "\n")
    draw(out.with_name(out.name + ".png"), results, intervals)


def compare(baseline: list, runs: list) -> tuple:
    """Difference in test accuracy, in points: (by folds, by clips).

    Each is (mean, low, high); by folds it is None if there is one fold.
    """
    pairs = list(zip(baseline, runs, strict=True))
    folds = np.array([run.metrics["accuracy"] - base.metrics["accuracy"] for base, run in pairs])
    clips = np.array([float(run.correct[clip]) - float(is_correct)
                      for base, run in pairs for clip, is_correct in base.correct.items()])
    return by_folds(100 * folds), by_clips(clips, scale=100)


def by_folds(differences: np.ndarray) -> tuple | None:
    """Mean of (folds,) differences with its 95% t interval: (mean, low, high).

    Includes what folds and seeds change. None if there is one fold.
    """
    from scipy import stats

    if len(differences) < 2:
        return None
    mean = differences.mean()
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return mean, mean - half, mean + half


def by_clips(differences: np.ndarray, n_boot: int = 4000, scale: float = 1) -> tuple:
    """Mean of (clips,) differences of -1, 0 and 1 with its 95% bootstrap interval, times `scale`.

    Includes the choice of test clips, but not what another seed would change.
    """
    values = np.array([-1, 0, 1])
    n = len(differences)
    shares = (differences[:, None] == values).mean(axis=0)
    resampled = np.random.default_rng(0).multinomial(n, shares, n_boot) @ values / n
    low, high = np.percentile(resampled, (2.5, 97.5))
    return scale * differences.mean(), scale * low, scale * high


def table_line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def arm_line(arm, runs, intervals) -> str:
    accuracy = [100 * run.metrics["accuracy"] for run in runs]
    macro_f1 = np.mean([run.metrics["macro_f1"] for run in runs])
    validation = np.mean([100 * epochs_1_5_last(run.history["val_acc"]) for run in runs], axis=0)
    return table_line([
        arm,
        ", ".join(f"{value:.1f}" for value in accuracy),
        f"{np.mean(accuracy):.1f}",
        f"{macro_f1:.3f}",
        ", ".join(f"{value:.1f}" for value in validation),
        *(format_interval(interval) for interval in intervals),
    ])


def epochs_1_5_last(values):
    last = len(values) - 1
    return values[[0, min(4, last), last]]


def format_interval(interval) -> str:
    if interval is None:
        return ""
    mean, low, high = interval
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def settings_line(results, args) -> str:
    runs = [run for runs in results.values() for run in runs]
    minutes = sum(run.history["seconds"].sum() for run in runs) / 60
    n_clips = sum(len(run.correct) for run in next(iter(results.values())))
    start = "pretrain.py" if Path(args.weights).exists() else args.weights
    return (
        f"{plural(len(args.folds), 'fold')} of {Path(args.data).name}, {n_clips} test clips, the "
        f"seed is the fold; {args.epochs} epochs, start {start}; {minutes:.0f} min of training, "
        f"{args.jobs} at a time on {os.cpu_count()} cores ({platform.machine()}). Figures in per "
        "cent, differences in points. Intervals by clips leave out what another seed would change.")


def draw(out: Path, results: dict, intervals: dict) -> None:
    """Draw validation accuracy by epoch, and each arm's difference in test accuracy."""
    n_folds = len(next(iter(results.values())))
    size = (9.5, max(3.2, 0.32 * len(results) + 1))
    with picture(out, size, layout="constrained") as figure:
        left, right = figure.subplots(1, 2)
        for i, (arm, runs) in enumerate(results.items()):
            colour = arm_colour(i, len(results))
            draw_curve(left, runs, colour)
            right.text(-0.02, i, arm, transform=right.get_yaxis_transform(), ha="right",
                       va="center", color=colour)
            draw_intervals(right, i, intervals.get(arm, ()), colour)
        left.set_title(f"validation accuracy, %, mean of {plural(n_folds, 'fold')}")
        left.set_xlabel("epoch")
        left.grid(axis="y")
        right.set_title("test accuracy minus that of the first arm, points")
        right.set_xlabel("95% interval: thin by folds, thick by clips")
        right.axvline(0, color=GREY, linewidth=0.8)
        right.set_ylim(len(results) - 0.5, -0.5)
        right.set_yticks([])
        right.spines["left"].set_visible(False)


def arm_colour(i, n_arms):
    """A colour for each arm; if they do not suffice, the first arm in blue and the rest grey."""
    if n_arms <= len(COLOURS):
        return COLOURS[i]
    return BLUE if i == 0 else GREY


def draw_curve(axes, runs, colour):
    accuracy = np.mean([run.history["val_acc"] for run in runs], axis=0)
    epochs = np.arange(1, len(accuracy) + 1)
    axes.plot(epochs, 100 * accuracy, color=colour, linewidth=0.8 if colour == GREY else 1.6)


def draw_intervals(axes, row, intervals, colour):
    """Draw the interval by folds (thin) and the one by clips (thick) around a row's middle."""
    for interval, offset, width in zip(intervals, (0.1, -0.15), (1, 3)):
        if interval is not None:
            mean, low, high = interval
            y = row + offset
            axes.plot([low, high], [y, y], color=colour, linewidth=width, solid_capstyle="butt")
            axes.plot(mean, row, "o", color=colour)
