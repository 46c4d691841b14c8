"""The pictures of a run, from its files and from plain arrays, never from the model.

Each function writes one PNG to `out`, whole or not at all.
"""

import csv
import math

import numpy as np

from .matrix import confusion  # noqa: F401  (the fourth picture, in a file of its own)
from .style import BLUE, COLOURS, GREEN, GREY, PURPLE, VERMILION, label_right, picture, plain

_MONITORS = {
    "val_loss": "validation loss", "val_acc": "validation accuracy",
    "val_macro_f1": "validation macro-F1", "val_map": "validation mAP",
}
# Panel title -> [(column of history.csv, label at the line, colour)]
_PANELS = {
    "Loss": [("train_loss", "train", VERMILION), ("val_loss", "val", BLUE)],
    "Accuracy": [("train_acc", "train", VERMILION), ("val_acc", "val", BLUE)],
    "Macro-F1 and mAP, val": [("val_macro_f1", "macro-F1", GREEN), ("val_map", "mAP", PURPLE)],
}


def curves(history_csv, out, monitor="val_acc"):
    """Loss, accuracy, macro-F1 and mAP over epochs from a run's history.csv (a row per epoch,
    accuracy as 0..1). Blank and non-finite values are left out.

    The best epoch by `monitor` (one of `_MONITORS`; lowest for val_loss, else highest, the last
    on a tie, whose weights best.pt holds) is marked. Raises ValueError on another monitor and on a file without rows.
    """
    if monitor not in _MONITORS:
        raise ValueError(f"monitor must be one of {', '.join(_MONITORS)}, got {monitor!r}")
    history = _read_history(history_csv)
    best = _best_row(history[monitor], lowest=monitor == "val_loss")
    with picture(out, (11, 3.4)) as figure:
        figure.subplots_adjust(left=0, right=0.96, bottom=0, top=0.8, wspace=0.32)
        for ax, (title, lines) in zip(figure.subplots(1, 3), _PANELS.items()):
            _curve_panel(ax, title, lines, history, best, monitor)
        n = len(history["epoch"])
        text = f"{n} epoch{'s' if n > 1 else ''}"
        if best is None:
            text += f", no {_MONITORS[monitor]} yet"
        else:
            text += (f": best {_MONITORS[monitor]} {history[monitor][best]:.3f}"
                     f" at epoch {history['epoch'][best]:g}")
        figure.suptitle(text, x=0, ha="left", fontweight="bold")


def _read_history(path):
    """history.csv -> {column: (epochs,) floats}, nan where blank, missing or not finite."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no epochs to draw")
    columns = ["epoch", *(column for lines in _PANELS.values() for column, _, _ in lines)]
    try:
        history = {c: np.array([float(row.get(c) or "nan") for row in rows]) for c in columns}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {c: np.where(np.isfinite(values), values, np.nan) for c, values in history.items()}


def _best_row(values, lowest):
    if np.isnan(values).all():
        return None
    return int(np.flatnonzero(values == (np.nanmin(values) if lowest else np.nanmax(values)))[-1])


def _curve_panel(ax, title, lines, history, best, monitor):
    from matplotlib.ticker import MaxNLocator

    epochs, ends, at_best, top = history["epoch"], [], [], 0.0
    for column, name, colour in lines:
        values = history[column]
        known = ~np.isnan(values)
        if not known.any():
            continue
        marker = "o" if known.sum() <= 40 else ""
        ax.plot(epochs[known], values[known], color=colour, marker=marker)
        ends.append((values[known][-1], name, colour))
        top = max(top, values[known].max())
        if best is not None and known[best]:
            at_best.append(f"{name} {values[best]:.3f}")
            if column == monitor:
                ax.plot(epochs[best], values[best], "o", color=colour, markersize=8,
                        markerfacecolor="white", markeredgewidth=1.8, zorder=3, clip_on=False)
    ax.set_title(title, pad=18)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    ax.grid(axis="y")
    ax.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    ax.set_ylim(0, top * 1.1 or 1.0)
    if best is not None:
        ax.axvline(epochs[best], color=GREY, linewidth=0.9, linestyle="--", zorder=1)
        ax.annotate(f"at epoch {epochs[best]:g}: {', '.join(at_best)}", (0, 1), (0, 5), fontsize=8,
                    color=GREY, xycoords="axes fraction", textcoords="offset points")
    if ends:
        label_right(ax, ends)
    else:
        ax.text(0.5, 0.5, "no values yet", transform=ax.transAxes, ha="center", color=GREY)


def schedule(groups, warmup_steps, steps_per_epoch, out):
    """The learning rate of each parameter group over optimiser steps, on a log axis.

    groups: [(name, (steps,) learning rate of each step)]. Groups with one and the same curve
    share a line and its label. Each peak is labelled: the base rate of the group, once the
    warm-up is through. The title says whether the ratio between the groups is constant, as found
    in the curves. Raises ValueError on curves of unequal length or all at zero.
    """
    merged = _merge_equal(groups)
    many = len(merged) > 6
    with picture(out, (7.6, max(3.4, 0.24 * len(merged) + 0.6))) as figure:
        ax = figure.add_axes((0, 0, 1, 1))
        steps = len(merged[0][1])
        _schedule_axes(ax, [lr for _, lr in merged], warmup_steps, steps_per_epoch)
        labels = []
        for (name, lr), colour in zip(merged, _line_colours(len(merged))):
            peak, last = lr.max(), lr[-1]
            ax.plot(np.arange(steps), np.where(lr > 0, lr, np.nan), color=colour,
                    marker="o" if steps == 1 else "")
            # Leads the eye from the peak to the label, where a falling curve would not go.
            ax.plot([lr.argmax(), ax.get_xlim()[1]], [peak, peak], ":", color=colour, linewidth=0.9)
            text = (f"{plain(name, 44)}  {_short(peak)}" if many else
                    f"{plain(name, 44)}\npeak {_short(peak)}, last step {_short(last)}")
            labels.append((peak, text, colour))
        label_right(ax, labels, size=8)
        ax.set_title(_ratio_title(merged))


def _merge_equal(groups):
    """[(name, curve)] with the names of equal curves joined by a comma, in the order given."""
    merged = []
    for name, lr in groups:
        lr = np.asarray(lr, dtype=np.float64)
        if merged and len(lr) != len(merged[0][1]):
            raise ValueError(f"{name} has {len(lr)} steps, {merged[0][0]} has {len(merged[0][1])}")
        for i, (names, other) in enumerate(merged):
            if np.allclose(lr, other, rtol=1e-9, atol=0):
                merged[i] = (f"{names}, {name}", other)
                break
        else:
            merged.append((name, lr))
    if not any((lr > 0).any() for _, lr in merged):
        raise ValueError("no learning rate above zero to draw")
    return merged


def _schedule_axes(ax, rates, warmup_steps, steps_per_epoch):
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    positive = np.concatenate([lr[lr > 0] for lr in rates])
    lowest_peak = min(lr.max() for lr in rates if lr.max() > 0)
    ax.set_yscale("log")
    # A cosine ends near zero: three decades under the lowest peak show its shape, all of its
    # last steps would press everything else against the top.
    ax.set_ylim(max(positive.min() / 1.5, lowest_peak / 1e3), 2 * positive.max())
    steps = len(rates[0])
    ax.set_xlim(-0.5, max(steps - 0.5, 0.5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    ax.set_xlabel("optimiser step")
    ax.set_ylabel("learning rate")
    ax.grid()
    epochs = ax.secondary_xaxis(
        "top", functions=(lambda x: x / steps_per_epoch, lambda x: x * steps_per_epoch))
    epochs.set_xlabel("epoch")
    if warmup_steps:
        ax.axvspan(-0.5, warmup_steps - 0.5, color=GREY, alpha=0.13, linewidth=0)
    text = f"warm-up: {warmup_steps} steps" if warmup_steps else "no warm-up"
    # Beside the shade, which may be too narrow for words, unless it leaves no room.
    beside = warmup_steps < 0.75 * steps
    ax.annotate(text, (warmup_steps - 0.5 if beside else 0.4 * steps, 0.03), (4, 0), color=GREY,
                xycoords=("data", "axes fraction"), textcoords="offset points")


def _line_colours(n):
    from matplotlib import colormaps

    return COLOURS[:n] if n <= len(COLOURS) else colormaps["viridis"](np.linspace(0, 0.8, n))


def _ratio_title(merged):
    if len(merged) == 1:
        return "Learning rate, the same for every group"
    lowest = min((lr for _, lr in merged if lr.max() > 0), key=np.max)
    ratios = []
    for name, lr in merged:
        both = (lr > 0) & (lowest > 0)
        constant = ((lr > 0) == (lowest > 0)).all() or not lr.any()
        if not (constant and np.allclose(lr[both] / lowest[both], lr.max() / lowest.max())):
            return f"Learning rate per group: the ratio of {plain(name)} to the others CHANGES"
        ratios.append(f"{lr.max() / lowest.max():.3g}")
    shown = f" ({' : '.join(ratios)})" if len(ratios) <= 6 else ""
    return f"Learning rate per group: the ratio between groups is constant{shown}"


def _short(value):
    """0.00005 -> 5e-5"""
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}" if value else "0"


def batch(specs, labels, targets, classes, out, sample_rate, hop_length, mel_hz, unit="standardised dB"):
    """Spectrograms as the model sees them, up to 16, on one colour scale, under the name of their class, or
    of the two largest shares where a clip is mixed or has several labels.

    specs: (B, n_mels, frames) in `unit`. labels: (B,) class indices. targets: (B, classes) soft labels, nan unknown.
    mel_hz: (n_mels,) centre frequencies, ascending. Raises ValueError where these do not fit together.
    Values that are not finite are red.
    """
    specs, mel_hz = np.asarray(specs, dtype=np.float32), np.asarray(mel_hz, dtype=np.float64)
    if specs.ndim != 3 or not len(specs) or specs.shape[1] != len(mel_hz):
        raise ValueError(f"specs must be (B, {len(mel_hz)}, frames), got {specs.shape}")
    targets = np.asarray(targets)
    if len(labels) != len(specs) or targets.shape != (len(specs), len(classes)):
        raise ValueError(f"{len(labels)} labels and targets {targets.shape} for {len(specs)} spectrograms of "
                         f"{len(classes)} classes")
    shown = np.where(np.isfinite(specs[:16]), specs[:16], np.nan)
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    low, high = _colour_range(shown)
    with picture(out, (max(3.1 * columns, 5) + 1, 2.1 * rows + 0.9), "constrained") as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for i, ax in enumerate(axes.flat):
            if i >= len(shown):
                ax.set_axis_off()
                continue
            image = _spectrogram(ax, shown[i], mel_hz, hop_length / sample_rate, low, high)
            held = [c for c in np.argsort(-targets[i], kind="stable") if targets[i, c] > 0]
            shares = [plain(classes[c], 36) + f" {targets[i, c]:.0%}" * bool(targets[i, c] < 1) for c in held[:2]]
            shares += [f"and {len(held) - 2} more"] * (len(held) > 2)
            title = plain(classes[labels[i]], 40) if len(shares) < 2 else "\n".join(shares)
            ax.set_title(title, fontsize=8, fontweight="normal")
            ax.tick_params(labelleft=i % columns == 0, labelbottom=i + columns >= len(shown))
        figure.colorbar(image, ax=axes, label=unit, extend="both", aspect=40, fraction=0.05)
        figure.supxlabel("time (s)", fontsize=9)
        figure.supylabel("mel centre frequency (Hz)", fontsize=9)
        some = f"{len(shown)} of {len(specs)} clips, " if len(shown) < len(specs) else ""
        broken = np.count_nonzero(np.isnan(shown))
        red = f"\n{broken} values not finite (red)" if broken else ""
        figure.suptitle(f"First training batch as the model sees it: {some}{shown.shape[1]} mels x "
                        f"{shown.shape[2]} frames{red}", x=0.01, ha="left", fontweight="bold")


def _colour_range(specs):
    finite = specs[~np.isnan(specs)]
    if not finite.size:
        return 0.0, 1.0
    # A few extreme bins must not take the contrast from all the rest.
    low, high = np.percentile(finite, (0.5, 99.5))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _spectrogram(ax, spec, mel_hz, seconds_per_frame, low, high):
    from matplotlib import colormaps

    n_mels, frames = spec.shape
    image = ax.imshow(
        spec, origin="lower", aspect="auto", vmin=low, vmax=high, interpolation="nearest",
        cmap=colormaps["viridis"].with_extremes(bad="red"),
        extent=(0, frames * seconds_per_frame, -0.5, n_mels - 0.5))
    octaves = (125, 500, 1000, 2000, 4000, 8000, 16000)
    ticks = [hz for hz in octaves if mel_hz[0] <= hz <= mel_hz[-1]]
    ax.set_yticks(np.interp(ticks, mel_hz, np.arange(n_mels)), [str(hz) for hz in ticks])
    return image
