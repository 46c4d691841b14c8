"""The confusion matrix as a picture."""
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .style import INK, LINE, legible, picture, shorten


def confusion(matrix: np.ndarray, classes: Sequence[str], out: Path) -> None:
    """Draw the confusion matrix: (C, C) counts, rows the true classes, in the order given.

    Colour is the share of the row; a row without clips is grey. Up to 20 classes the counts
    stand in the cells; beyond, the largest confusions are listed beside it. A name that no
    installed font can draw has its class index in front. Raises ValueError if the shape does not
    fit the classes.
    """
    matrix = np.asarray(matrix)
    n = len(classes)
    if matrix.shape != (n, n) or not n:
        raise ValueError(f"the matrix is {matrix.shape} for {n} classes")
    names = [shorten(name) for name in classes]
    names = [name if legible(name) else f"[{i}] {name}" for i, name in enumerate(names)]
    small = n <= 20
    # Inches: a cell large enough for its label, smaller only if the picture would outgrow a
    # screen.
    cell = max(0.5, 2 / n) if small else min(0.35, max(0.135, 12 / n), 24 / n)
    size = 9 if small else max(6.5, min(8, 48 * cell))
    with picture(out, (n * cell, n * cell)) as figure:
        ax = figure.add_axes((0, 0, 1, 1))
        image = _share_image(ax, matrix)
        _class_ticks(ax, names, matrix.sum(axis=1), size, cell, slanted=small)
        if small:
            _write_counts(ax, matrix)
        else:
            listed = "\n".join(_largest(matrix, names))
            ax.annotate(listed, (1, 1), (12, 0), xycoords="axes fraction",
                        textcoords="offset points", va="top", fontsize=8, linespacing=1.4)
        _share_bar(figure, ax, image, (0.1, 1) if small else (0.25, 0.15), n * cell)
        total, correct = int(matrix.sum()), int(np.trace(matrix))
        ax.set_title(f"{total} clips, {correct / max(total, 1):.1%} correct")


def _share_image(ax, matrix):
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    support = matrix.sum(axis=1, keepdims=True)
    share = np.where(support > 0, matrix / np.maximum(support, 1), np.nan)
    # An exponent below 1, so that a confusion of a few percent shows beside a strong diagonal.
    return ax.imshow(share, norm=PowerNorm(0.6, vmin=0, vmax=1), interpolation="nearest",
                     cmap=colormaps["Blues"].with_extremes(bad="#e0e0e0"))


def _class_ticks(ax, names, support, size, cell, slanted):
    every = math.ceil(size * 1.15 / 72 / cell)  # 1 unless there are hundreds of classes
    places = np.arange(len(names))
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    turn = slant if slanted else {"rotation": 90}
    ax.set_xticks(places[::every], names[::every], fontsize=size, **turn)
    rows = [f"{name}  {count}" for name, count in zip(names, support)]
    ax.set_yticks(places[::every], rows[::every], fontsize=size)
    note = f" (one class in {every} named)" if every > 1 else ""
    ax.set_xlabel(f"predicted{note}")
    ax.set_ylabel(f"true class, with number of clips{note}")
    ax.tick_params(length=2)
    ax.spines[:].set_visible(True)
    if every == 1:
        edges, ends = places[1:] - 0.5, (-0.5, len(names) - 0.5)
        ax.vlines(edges, *ends, color=LINE, linewidth=0.3)
        ax.hlines(edges, *ends, color=LINE, linewidth=0.3)


def _write_counts(ax, matrix):
    support = matrix.sum(axis=1)
    for row, column in zip(*np.nonzero(matrix)):
        count = int(matrix[row, column])
        ax.text(column, row, str(count), ha="center", va="center", fontsize=9,
                color="white" if count > 0.4 * support[row] else INK)


def _largest(matrix, names, longest=30):
    """The list of the largest confusions, a heading and at most `longest` lines."""
    wrong = matrix - np.diag(np.diag(matrix))
    support = matrix.sum(axis=1)
    rows, columns = np.nonzero(wrong)
    # By count, then by share: of two equal counts the rarer class is the more confused.
    order = np.lexsort((support[rows], -wrong[rows, columns]))[:longest]
    lines = [f"{names[r]} → {names[c]}  {wrong[r, c]} of {support[r]}"
             for r, c in zip(rows[order], columns[order])]
    return ["Largest confusions, true → predicted", "", *(lines or ["none"])]


def _share_bar(figure, ax, image, size, inches):
    """The colour scale right of the axes; size: (width in inches, height as share of the axes)."""
    width, height = size
    place = ax.inset_axes((1 + 0.16 / inches, 0, min(width, 0.25) / inches, height))
    bar = figure.colorbar(image, cax=place, ticks=(0, 0.1, 0.25, 0.5, 0.75, 1))
    bar.ax.set_yticklabels(["0%", "10%", "25%", "50%", "75%", "100%"], fontsize=8)
    bar.set_label("share of the row")
