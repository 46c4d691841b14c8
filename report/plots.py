"""Functions that fill matplotlib axes, for the PNG pictures and the charts of the page alike."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metrics import METRICS

from .style import BLUE, COLOURS, GREY, PAPER, VERMILION, label_right, shorten

MOST_MARKERS = 60  # points up to which each one is marked
MOST_STRETCHES = 120  # of a line that summarizes neighbouring steps


class Line(NamedTuple):
    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str


def history_panels(history: dict) -> dict[str, list[tuple[str, str, str]]]:
    """Panel title -> [(column of history.csv, label, colour)], for the columns that are there."""
    known = [(metric.column, metric.label) for key, metric in METRICS.items()
             if key != "accuracy" and metric.column in history]
    names = " and ".join(label for _, label in known)
    title = f"Validation {names if len(known) < 3 else 'metrics'}"
    return {
        "Loss": [("train_loss", "training", VERMILION), ("val_loss", "validation", BLUE)],
        "Accuracy": [("train_acc", "training", VERMILION), ("val_acc", "validation", BLUE)],
        title: [(*score, colour) for score, colour in zip(known, COLOURS[2:] + COLOURS[:2])],
    }


def best_row(values: np.ndarray, higher_is_better: bool) -> int | None:
    """Row of the best of (epochs,) values, the last on a tie: best.pt has its weights."""
    finite = np.isfinite(values)
    if not finite.any():
        return None
    best = values[finite].max() if higher_is_better else values[finite].min()
    return int(np.flatnonzero(values == best)[-1])


def history_panel(ax, title: str, columns: Sequence[tuple[str, str, str]], history: dict,
                  best: int | None) -> str | None:
    """Draw one of `history_panels` -> a line with the values at the best row, if there is one."""
    epochs = history["epoch"]
    lines = [Line(label, epochs, history[column], colour) for column, label, colour in columns]
    top = 1.0 if title == "Accuracy" else None
    line_axes(ax, lines, "epoch", epochs[best] if best is not None else None, top=top)
    if best is None:
        return None
    values = [f"{label} {history[column][best]:.3f}" for column, label, _ in columns
              if np.isfinite(history[column][best])]
    return f"at epoch {epochs[best]:g}: {', '.join(values)}"


def line_axes(ax, lines: Sequence[Line], x_label: str, best: float | None = None,
              log: bool = False, top: float | None = None) -> bool:
    """Draw lines over epochs or steps, named at their right ends -> whether any has a value.

    Values that are not finite are left out. best: x of a dashed line, with a ring on each line.
    top: least upper end of the y axis.
    """
    finite = [line._replace(x=line.x[np.isfinite(line.y)], y=line.y[np.isfinite(line.y)])
              for line in lines]
    finite = [line for line in finite if len(line.x)]
    whole_number_axis(ax, x_label)
    ax.grid(axis="y")
    if not finite:
        ax.text(0.5, 0.5, "no values yet", transform=ax.transAxes, ha="center", color=GREY)
        return False
    x, y = np.concatenate([line.x for line in finite]), np.concatenate([line.y for line in finite])
    margin = 0.03 * (x.max() - x.min()) or 0.5
    ax.set_xlim(x.min() - margin, x.max() + margin)
    if log:
        log_rate_axis(ax, [line.y for line in finite])
    else:
        ax.set_ylim(min(0.0, y.min()), max(1.06 * y.max(), top or 0.0) or 1.0)
    if best is not None:
        ax.axvline(best, color=GREY, linewidth=0.9, linestyle="--", zorder=1)
    for line in finite:
        _draw_line(ax, line, x_label, best)
    if len(finite) > 1:
        label_right(ax, [(line.y[-1], shorten(line.name, 14), line.colour) for line in finite])
    return True


def _draw_line(ax, line, x_label, best):
    few = len(line.x) <= MOST_MARKERS
    height = line.y.clip(*ax.get_ylim())
    artist, = ax.plot(line.x, height, color=line.colour, marker="o" if few else "", clip_on=False)
    values = [f"{line.name}, {x_label} {x:,.0f}: {y:.4g}" for x, y in zip(line.x, line.y)]
    if few:
        artist.tooltips = values
    for i in np.flatnonzero(line.x == best):
        ring, = ax.plot(line.x[i], height[i], "o", color=line.colour, markersize=8, zorder=3,
                        markerfacecolor=PAPER, markeredgewidth=1.8, clip_on=False)
        ring.tooltips = [values[i]]


def whole_number_axis(ax, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    locator = MaxNLocator(nbins=5, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10))
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlabel(label)


def log_rate_axis(ax, rates: Sequence[np.ndarray]) -> None:
    """A logarithmic y axis for learning rates, down to three decades below the lowest peak.

    A cosine ends near zero: all of its last steps would press everything else against the top.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    positive = np.concatenate([rate[rate > 0] for rate in rates])
    lowest_peak = min(rate.max() for rate in rates if rate.max() > 0)
    ax.set_yscale("log")
    ax.set_ylim(max(positive.min() / 1.5, lowest_peak / 1e3), 2 * positive.max())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_rate(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def short_rate(value: float) -> str:
    """0.00005 -> 5e-5"""
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}" if value else "0"


def envelope_axes(ax, steps: np.ndarray, values: np.ndarray, skipped: Sequence[int] = ()) -> bool:
    """Draw a noisy value per step: the mean of neighbouring steps, and their range as a band.

    Up to MOST_MARKERS steps each is drawn. skipped: steps to mark at the bottom. Returns whether
    any value is finite.
    """
    n = len(steps) if len(steps) <= MOST_MARKERS else min(MOST_STRETCHES, len(steps) // 4)
    x, mean, low, high = envelope(steps, values, n)
    top = float(np.percentile(high, 98)) if len(high) else None  # peaks would press the rest flat
    drawn = line_axes(ax, [Line("mean", x, mean, BLUE)], "optimizer step", top=top)
    if drawn:
        bottom, top = ax.get_ylim()
        ax.fill_between(x, low.clip(bottom, top), high.clip(bottom, top), color=BLUE, alpha=0.18,
                        linewidth=0)
        marks, = ax.plot(skipped, np.full(len(skipped), bottom), "|", color=VERMILION, markersize=9,
                         clip_on=False)
        marks.tooltips = [f"step {step:,} skipped" for step in skipped]
    return drawn


def envelope(x: np.ndarray, y: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
    """At most `n` stretches of a long row of values -> (x, mean, lowest, highest) of each.

    Values that are not finite do not count.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) == 0:
        return (np.zeros(0),) * 4
    starts = np.unique(np.linspace(0, len(x), min(n, len(x)), endpoint=False).astype(int))
    size = np.diff([*starts, len(x)])
    return (x[starts + size // 2], np.add.reduceat(y, starts) / size,
            np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))


def thin(x: np.ndarray, y: np.ndarray, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """About `n` points of a smooth curve, its first, highest and last among them."""
    peak = int(np.nanargmax(y)) if np.isfinite(y).any() else 0
    rows = np.unique([*range(0, len(x), max(1, len(x) // n)), len(x) - 1, peak])
    return np.asarray(x, float)[rows], np.asarray(y, float)[rows]


def reliability_axes(ax, counts_ax, curves: Sequence[tuple[str, Sequence]],
                     axis_labels: tuple[str, str], unit: str = "clips") -> None:
    """Reliability diagram: share correct over mean confidence, with the number of clips below.

    curves: [(name, [(confidence, share correct, n, low, high)])], at most two. unit: what n counts.
    """
    from matplotlib.ticker import PercentFormatter

    most = max((n for _, bins in curves for _, _, n, *_ in bins), default=1)
    ax.plot([0, 1], [0, 1], "--", color=GREY, linewidth=0.9)
    for i, ((name, bins), colour) in enumerate(zip(curves, COLOURS)):
        x, y, n, low, high = np.array(bins, float).reshape(-1, 5).T
        ax.vlines(x, low, high, color=colour, linewidth=1, alpha=0.4)
        ax.plot(x, y, color=colour, linewidth=1, alpha=0.6)
        dots = ax.scatter(x, y, s=14 + 140 * n / most, color=colour, linewidth=0, clip_on=False,
                          zorder=3, label=name)
        dots.tooltips = [f"{name}: {count:,.0f} {unit}, confidence {confidence:.1%}, "
                         f"{share:.1%} correct" for confidence, share, count in zip(x, y, n)]
        counts_ax.bar(x + 0.016 * (i - 0.5), n, 0.014, color=colour)
    ax.set(xlim=(0, 1), ylim=(0, 1), ylabel=axis_labels[1])
    ax.tick_params(labelbottom=False)
    ax.grid()
    counts_ax.set(xlim=(0, 1), ylim=(0, 1.05 * most), yticks=[], xlabel=axis_labels[0],
                  ylabel=unit)
    for axis in (ax.xaxis, ax.yaxis, counts_ax.xaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False, labelcolor="linecolor",
              borderaxespad=0.2, handletextpad=0.3, markerscale=0.7)


def recall_axes(ax, names: Sequence[str], n_train: np.ndarray, recall: np.ndarray) -> None:
    """Recall of each class over its training clips, logarithmic over more than a factor of 10."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    x = np.maximum(n_train, 0.5)
    whole_number_axis(ax, "training clips")
    if x.max() > 10 * x.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.minorticks_off()
    dots = ax.scatter(x, recall, s=50, color=BLUE, alpha=0.55, linewidth=0, clip_on=False, zorder=3)
    dots.tooltips = [f"{name}: {share:.1%} recall, {n:,} training clips"
                     for name, share, n in zip(names, recall, n_train)]
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(axis="y")
