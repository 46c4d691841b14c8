"""The PNG pictures of a run, drawn from its files and from arrays, never from the model.

Each function writes one file to `out`, whole or not at all.
"""
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metrics import MONITORS
from util import plural

from . import plots
from .matrix import confusion  # noqa: F401  (the fourth picture, in a file of its own)
from .run_files import read_columns
from .style import COLOURS, GREY, label_right, picture, shorten

MOST_SPECTROGRAMS = 16


def curves(history_csv: Path, out: Path, monitor: str = "val_acc") -> None:
    """Draw loss, accuracy and the other metrics over the epochs of a history.csv.

    Values that are blank or not finite are left out. The best epoch by `monitor`, a key of
    MONITORS, is marked: the last one on a tie. Raises ValueError on another monitor and on a file
    without rows.
    """
    if monitor not in MONITORS:
        raise ValueError(f"monitor must be one of {', '.join(MONITORS)}, got {monitor!r}")
    metric = MONITORS[monitor]
    label = f"validation {metric.label}"
    try:
        history = read_columns(history_csv)
    except ValueError as error:
        raise ValueError(f"{history_csv}: {error}") from None
    if not len(history.get("epoch", ())):
        raise ValueError(f"{history_csv} has no epochs to draw")
    best = plots.best_row(history[monitor], metric.higher_is_better)
    with picture(out, (11, 3.4)) as figure:
        figure.subplots_adjust(left=0, right=0.96, bottom=0, top=0.8, wspace=0.45)
        panels = plots.history_panels(history)
        for ax, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items()):
            at_best = plots.history_panel(ax, title, columns, history, best)
            ax.set_title(title, pad=18)
            ax.annotate(at_best or "", (0, 1), (0, 5), fontsize=8, color=GREY,
                        xycoords="axes fraction", textcoords="offset points")
        text = plural(len(history["epoch"]), "epoch")
        if best is None:
            text += f", no {label} yet"
        else:
            value, epoch = history[monitor][best], history["epoch"][best]
            text += f": best {label} {value:.3f} at epoch {epoch:g}"
        figure.suptitle(text, x=0, ha="left", fontweight="bold")


def schedule(groups: Sequence[tuple[str, np.ndarray]], warmup_steps: int, steps_per_epoch: float,
             out: Path) -> None:
    """Draw the learning rate of each parameter group over optimizer steps, on a log axis.

    groups: [(name, (steps,) learning rate of each step)]. Groups with the same curve share a line
    and its label. The title says whether the ratio between the groups is constant, as found in
    the curves. Raises ValueError on curves of unequal length or all at zero.
    """
    merged = _merge_equal(groups)
    many = len(merged) > 6
    with picture(out, (7.6, max(3.4, 0.24 * len(merged) + 0.6))) as figure:
        ax = figure.add_axes((0, 0, 1, 1))
        steps = len(merged[0][1])
        _schedule_axes(ax, [rates for _, rates in merged], steps_per_epoch)
        _mark_warmup(ax, warmup_steps, steps)
        labels = []
        for (name, rates), colour in zip(merged, _line_colours(len(merged))):
            peak, last = rates.max(), rates[-1]
            ax.plot(np.arange(steps), np.where(rates > 0, rates, np.nan), color=colour,
                    marker="o" if steps == 1 else "")
            # Leads the eye from the peak to the label, which a falling curve does not reach.
            ax.plot([rates.argmax(), ax.get_xlim()[1]], [peak, peak], ":", color=colour,
                    linewidth=0.9)
            if many:
                text = f"{shorten(name, 44)}  {plots.short_rate(peak)}"
            else:
                text = (f"{shorten(name, 44)}\n"
                        f"peak {plots.short_rate(peak)}, last step {plots.short_rate(last)}")
            labels.append((peak, text, colour))
        label_right(ax, labels, size=8)
        ax.set_title(_ratio_title(merged))


def _merge_equal(groups):
    """[(name, curve)] with the names of equal curves joined by a comma, in the order given."""
    merged = []
    for name, rates in groups:
        rates = np.asarray(rates, dtype=np.float64)
        if merged and len(rates) != len(merged[0][1]):
            first, first_rates = merged[0]
            raise ValueError(f"{name} has {len(rates)} steps, {first} has {len(first_rates)}")
        for i, (names, known) in enumerate(merged):
            if np.allclose(rates, known, rtol=1e-9, atol=0):
                merged[i] = (f"{names}, {name}", known)
                break
        else:
            merged.append((name, rates))
    if not any((rates > 0).any() for _, rates in merged):
        raise ValueError("no learning rate above zero to draw")
    return merged


def _schedule_axes(ax, rates, steps_per_epoch):
    steps = len(rates[0])
    plots.log_rate_axis(ax, rates)
    plots.whole_number_axis(ax, "optimizer step")
    ax.set_xlim(-0.5, max(steps - 0.5, 0.5))
    ax.set_ylabel("learning rate")
    ax.grid()
    epochs = ax.secondary_xaxis(
        "top", functions=(lambda x: x / steps_per_epoch, lambda x: x * steps_per_epoch))
    epochs.set_xlabel("epoch")


def _mark_warmup(ax, warmup_steps, steps):
    text = "no warm-up"
    if warmup_steps:
        ax.axvspan(-0.5, warmup_steps - 0.5, color=GREY, alpha=0.13, linewidth=0)
        text = f"warm-up: {warmup_steps} steps"
    # Right of the shade, which may be too narrow for words, unless it leaves no room.
    x = warmup_steps - 0.5 if warmup_steps < 0.75 * steps else 0.4 * steps
    ax.annotate(text, (x, 0.03), (4, 0), color=GREY,
                xycoords=("data", "axes fraction"), textcoords="offset points")


def _line_colours(n):
    from matplotlib import colormaps

    return COLOURS[:n] if n <= len(COLOURS) else colormaps["viridis"](np.linspace(0, 0.8, n))


def _ratio_title(merged):
    if len(merged) == 1:
        return "Learning rate, the same for every group"
    lowest = min((rates for _, rates in merged if rates.max() > 0), key=np.max)
    ratios = []
    for name, rates in merged:
        both = (rates > 0) & (lowest > 0)
        ratio = rates.max() / lowest.max()
        zero_together = ((rates > 0) == (lowest > 0)).all() or not rates.any()
        if not (zero_together and np.allclose(rates[both] / lowest[both], ratio)):
            return f"Learning rate per group: the ratio of {shorten(name)} to the others CHANGES"
        ratios.append(f"{ratio:.3g}")
    shown = f" ({' : '.join(ratios)})" if len(ratios) <= 6 else ""
    return f"Learning rate per group: the ratio between groups is constant{shown}"


def batch(specs: np.ndarray, labels: Sequence[int], targets: np.ndarray, classes: Sequence[str],
          out: Path, sample_rate: int, hop_length: int, mel_hz: np.ndarray,
          unit: str = "standardised dB") -> None:
    """Draw up to 16 spectrograms as the model sees them, on one colour scale.

    Each has its class as title, or the two classes with the largest shares if the clip is mixed
    or has several labels. Values that are not finite are red.

    Args:
        specs: (B, n_mels, frames) in `unit`.
        labels: (B,) class indices.
        targets: (B, classes) soft labels, nan if unknown.
        mel_hz: (n_mels,) centre frequencies, ascending.

    Raises ValueError if the shapes do not fit together.
    """
    specs, mel_hz = np.asarray(specs, dtype=np.float32), np.asarray(mel_hz, dtype=np.float64)
    if specs.ndim != 3 or not len(specs) or specs.shape[1] != len(mel_hz):
        raise ValueError(f"specs must be (B, {len(mel_hz)}, frames), got {specs.shape}")
    targets = np.asarray(targets)
    if len(labels) != len(specs) or targets.shape != (len(specs), len(classes)):
        raise ValueError(f"{len(labels)} labels and targets {targets.shape} for {len(specs)} "
                         f"spectrograms of {len(classes)} classes")
    shown = specs[:MOST_SPECTROGRAMS]
    shown = np.where(np.isfinite(shown), shown, np.nan)
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    limits = _colour_range(shown)
    with picture(out, (max(3.1 * columns, 5) + 1, 2.1 * rows + 0.9), "constrained") as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat[len(shown):]:
            ax.set_axis_off()
        for i, (ax, spec) in enumerate(zip(axes.flat, shown)):
            image = _spectrogram(ax, spec, mel_hz, hop_length / sample_rate, limits)
            ax.set_title(_clip_title(labels[i], targets[i], classes), fontsize=8,
                         fontweight="normal")
            ax.tick_params(labelleft=i % columns == 0, labelbottom=i + columns >= len(shown))
        figure.colorbar(image, ax=axes, label=unit, extend="both", aspect=40, fraction=0.05)
        figure.supxlabel("time (s)", fontsize=9)
        figure.supylabel("mel centre frequency (Hz)", fontsize=9)
        figure.suptitle(_batch_title(shown, len(specs)), x=0.01, ha="left", fontweight="bold")


def _clip_title(label, target, classes):
    """The class of a clip, or its two largest shares on a line each."""
    present = [c for c in np.argsort(-target, kind="stable") if target[c] > 0]
    if len(present) < 2:
        return shorten(classes[label], 40)
    lines = []
    for c in present[:2]:
        share = f" {target[c]:.0%}" if target[c] < 1 else ""
        lines.append(shorten(classes[c], 36) + share)
    if len(present) > 2:
        lines.append(f"and {len(present) - 2} more")
    return "\n".join(lines)


def _batch_title(shown, n_clips):
    _, n_mels, frames = shown.shape
    number = f"{len(shown)} of {n_clips} clips, " if len(shown) < n_clips else ""
    title = f"First training batch as the model sees it: {number}{n_mels} mels x {frames} frames"
    broken = np.count_nonzero(np.isnan(shown))
    return f"{title}\n{broken} values not finite (red)" if broken else title


def _colour_range(specs):
    finite = specs[~np.isnan(specs)]
    if not finite.size:
        return 0.0, 1.0
    # A few extreme bins must not take the contrast from all the rest.
    low, high = np.percentile(finite, (0.5, 99.5))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _spectrogram(ax, spec, mel_hz, seconds_per_frame, limits):
    from matplotlib import colormaps

    n_mels, frames = spec.shape
    image = ax.imshow(
        spec, origin="lower", aspect="auto", vmin=limits[0], vmax=limits[1],
        interpolation="nearest", cmap=colormaps["viridis"].with_extremes(bad="red"),
        extent=(0, frames * seconds_per_frame, -0.5, n_mels - 0.5))
    octaves = (125, 500, 1000, 2000, 4000, 8000, 16000)
    ticks = [hz for hz in octaves if mel_hz[0] <= hz <= mel_hz[-1]]
    ax.set_yticks(np.interp(ticks, mel_hz, np.arange(n_mels)), [str(hz) for hz in ticks])
    return image
