"""The charts of the page, as inline SVG."""
import numpy as np
from markupsafe import Markup

from metrics import apply_temperature, reliability
from util import plural

from . import plots
from .run_files import Run
from .style import BLUE, VERMILION, svg_figure, to_svg

MOST_SKIPPED = 200  # steps that are marked
LEFT, RIGHT, TOP, BOTTOM = 44, 82, 12, 38  # margins in points; names of lines stand at the right
NARROW = 16  # right margin of a chart without names


def _chart(label, draw, *arguments, right=RIGHT):
    """An <svg> of axes that `draw(ax, *arguments)` fills, and what that returns."""
    width, height = 360, 216
    with svg_figure((width / 72, height / 72)) as figure:
        ax = figure.add_axes((LEFT / width, BOTTOM / height, (width - LEFT - right) / width,
                              (height - TOP - BOTTOM) / height))
        result = draw(ax, *arguments)
        return Markup(to_svg(figure, label)), result


def training(run: Run) -> list[tuple[str, str, str]]:
    """[(title, svg, caption)] of the epochs and the optimizer steps of a run."""
    charts = []
    if not run.history:
        return charts
    for title, columns in plots.history_panels(run.history).items():
        if any(np.isfinite(run.history[column]).any() for column, _, _ in columns):
            svg, at_best = _chart(f"{title} by epoch", plots.history_panel, title, columns,
                                  run.history, run.best)
            charts.append((title, svg, at_best))
    if len(run.steps.get("step", ())):
        charts += [_learning_rates(run), *_noisy_steps(run)]
    return charts


def _learning_rates(run):
    steps, backbone, head = (run.steps[name] for name in ("step", "lr_backbone", "lr_head"))
    if np.array_equal(backbone, head):
        groups = [("all groups", head)]
        caption = f"the same for all groups, peak {head.max():.1e}"
    else:
        groups = [("backbone", backbone), ("head", head)]
        caption = f"peaks: backbone {backbone.max():.1e}, head {head.max():.1e}"
    decay = run.flags.get("layer_decay", 1.0)
    if decay < 1:
        caption += f"; each block has {decay:g} times the rate of the next one"
    lines = []
    for (name, rate), colour in zip(groups, (BLUE, VERMILION)):
        x, y = plots.thin(steps, rate)
        lines.append(plots.Line(name, x, np.where(y > 0, y, np.nan), colour))
    svg, _ = _chart("learning rate by step", plots.line_axes, lines, "optimizer step", None, True,
                    right=RIGHT if len(lines) > 1 else NARROW)
    return "Learning rate of each group", svg, caption


def _noisy_steps(run):
    """Charts of the loss and the gradient norm of each step, if any value is finite."""
    skipped = [int(event["step"]) for event in run.events if event["event"] == "skipped"]
    marked = f"; {plural(len(skipped), 'skipped step')} marked" if skipped else ""
    clip = run.flags.get("clip_grad", 0)
    many = len(run.steps["step"]) > plots.MOST_MARKERS
    charts = []
    for title, column, caption in (
            ("Loss by step", "loss", "mean and range of neighbouring steps" if many else ""),
            ("Gradient norm", "grad_norm",
             f"before clipping to {clip:g}" if clip else "not clipped")):
        svg, drawn = _chart(title.lower(), plots.envelope_axes, run.steps["step"],
                            run.steps[column], skipped[:MOST_SKIPPED], right=NARROW)
        if drawn:
            charts.append((title, svg, (caption + marked).removeprefix("; ")))
    return charts


def recall(run: Run) -> str:
    """Recall of each class over its training clips, for the classes with clips."""
    known = np.flatnonzero(run.support)
    names = [run.names[i] for i in known]
    svg, _ = _chart("recall of each class by its training clips", plots.recall_axes, names,
                    run.train_counts[known], run.correct[known] / run.support[known],
                    right=NARROW)
    return svg


def reliability_diagram(run: Run) -> str:
    """Confidence against accuracy, before and after temperature scaling."""
    metrics = run.metrics
    scores = run.scores.astype(np.float64)
    calibrated = apply_temperature(scores, metrics["temperature"], run.sigmoid)
    curves = [
        (f"uncalibrated, error {metrics['ece']:.3f}", reliability(scores, run.labels)[0]),
        (f"temperature {metrics['temperature']:.2f}, error {metrics['ece_calibrated']:.3f}",
         reliability(calibrated, run.labels)[0])]
    labels, unit = ("confidence in the prediction", "share correct"), "clips"
    if run.multi_label:
        labels, unit = ("score of a class", "share with that label"), "pairs"
    with svg_figure((5, 5.6)) as figure:
        ax = figure.add_axes((0.15, 0.22, 0.8, 0.68))
        counts_ax = figure.add_axes((0.15, 0.11, 0.8, 0.1))
        plots.reliability_axes(ax, counts_ax, curves, labels, unit)
        return Markup(to_svg(figure, "reliability diagram"))
