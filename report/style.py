"""What all pictures share: the look, safe text, labels at line ends, a write that is all or
nothing."""

import os
import warnings
from contextlib import contextmanager
from pathlib import Path

# Okabe and Ito (2008), told apart by colour-blind readers too. Grey is for what is not data.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#B2528A"
ORANGE, SKY = "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
GREY = "#767676"

_STYLE = {
    "figure.dpi": 130, "savefig.dpi": 130, "savefig.facecolor": "white",
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "figure.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": "black", "ytick.labelcolor": "black",
    "axes.grid": False, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.6, "lines.markersize": 3.5,
    # Class and file names are text, never mathematics: `$` and `_` are drawn as they stand.
    "text.parse_math": False, "text.usetex": False,
}

# DejaVu comes with matplotlib and lacks Chinese, Japanese, Korean, Thai and Indic scripts; the
# first of these that a machine has fills in.
_FALLBACK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Unifont", "Arial Unicode MS", "Hiragino Sans", "PingFang SC",
    "Microsoft YaHei", "Malgun Gothic", "Noto Sans Thai", "Noto Sans Devanagari", "Nirmala UI",
)


@contextmanager
def picture(out, size, layout=None):
    """A figure of `size` (width, height) inches in the shared style, written to `out` as PNG
    when the block ends. After an error the file that was at `out` is still the old one.

    The file holds all that is drawn, also outside of `size`: a picture can give its axes the
    whole figure and let labels of any length stand around it. No pyplot: it keeps global state
    and picks a backend for the whole process.
    """
    import matplotlib
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Path(out)
    with matplotlib.style.context(["default", {**_STYLE, "font.family": _fonts()}]):
        figure = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        part = out.with_name(f".{out.stem}.{os.getpid()}.png")
        try:
            with warnings.catch_warnings():
                # A character that no font has is drawn as a box; that is all there is to do.
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")
                figure.savefig(part, format="png", bbox_inches="tight", pad_inches=0.1)
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)


def _fonts():
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)]


def legible(text):
    """Whether the installed fonts have every character of `text`."""
    from matplotlib import font_manager

    if text.isascii():
        return True
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in _fonts()]
    return all(any(font.get_char_index(ord(c)) for font in fonts) for c in text)


def count(n, one, many=None):
    """'1 clip', '2,000 clips'"""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def plain(text, longest=32):
    """`text` on one line, unprintable characters as `?`, cut in the middle past `longest`:
    the start and the end of a class or file name tell more than its middle."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[:longest - 1 - tail]}…{text[len(text) - tail:]}"


def label_right(ax, labels, size=9):
    """Writes labels [(y, text, colour)] right of the axes at height y (data units), moved apart
    where they would lie on each other. Call it when the limits of the axes are final."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top)
    lines = max(text.count("\n") + 1 for _, text, _ in labels)
    gap = 1.25 * size * lines / 72 * ax.figure.dpi / ax.bbox.height
    labels = sorted(labels, key=lambda label: label[0])
    to_axes = ax.transData + ax.transAxes.inverted()
    left = ax.get_xlim()[0]
    heights = apart([to_axes.transform((left, y))[1] for y, _, _ in labels], gap)
    for height, (_, text, colour) in zip(heights, labels):
        ax.annotate(text, (1, height), xycoords="axes fraction", xytext=(5, 0),
                    textcoords="offset points", va="center", color=colour, fontsize=size,
                    annotation_clip=False)


def apart(heights, gap):
    """Ascending heights, clipped to 0..1 -> heights at least `gap` apart, moved little."""
    heights = [min(max(h, 0.0), 1.0) for h in heights]
    for _ in range(20 * len(heights)):
        for i in range(len(heights) - 1):
            push = (gap - (heights[i + 1] - heights[i])) / 2
            if push > 0:
                heights[i] -= push
                heights[i + 1] += push
    return heights
