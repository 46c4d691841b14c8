"""The look of all pictures: colours, fonts, short names, figures as PNG files and as inline SVG."""
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from util import atomic_write, printable

# Colours on a light and on a dark page, the only ones of the page and the pictures. The hues are
# those of Okabe and Ito (2008), safe for colour-blind readers; some are darker, for contrast.
PALETTE = {
    "paper": ("#fdfdfb", "#161614"), "panel": ("#f5f4f0", "#201f1d"), "ink": ("#1c1b19", "#eae8e2"),
    "soft": ("#63615b", "#a5a29a"), "line": ("#e2e0da", "#37352f"), "on": ("#ffffff", "#111111"),
    "blue": ("#0072b2", "#56b4e9"), "vermilion": ("#c24e00", "#f28a45"),
    "green": ("#007a59", "#2fbf95"), "purple": ("#9a3f76", "#dd8fbd"),
    "orange": ("#e69f00", "#e69f00"), "sky": ("#2f8fc7", "#8fd0f5"),
}
_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
BLUE, VERMILION, GREEN, PURPLE = (_LIGHT[c] for c in ("blue", "vermilion", "green", "purple"))
ORANGE, SKY = _LIGHT["orange"], _LIGHT["sky"]
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
INK, GREY, LINE, PAPER = (_LIGHT[c] for c in ("ink", "soft", "line", "paper"))

_STYLE = {
    "figure.dpi": 130, "savefig.dpi": 130, "savefig.facecolor": "white",
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "figure.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.titlecolor": INK, "axes.labelcolor": INK,
    "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.grid": False, "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.6, "lines.markersize": 3.5,
    # Class and file names are text, never mathematics: `$` and `_` are drawn as they stand.
    "text.parse_math": False, "text.usetex": False,
}
_SVG_STYLE = {
    "figure.dpi": 72, "font.size": 11, "svg.fonttype": "none", "axes.facecolor": "none",
    "axes.labelcolor": GREY, "xtick.labelcolor": GREY, "ytick.labelcolor": GREY,
    "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0,
    "axes.spines.left": False,
}

# DejaVu comes with matplotlib and lacks Chinese, Japanese, Korean, Thai and Indic scripts; the
# first of these that is installed fills in.
_FALLBACK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Unifont", "Arial Unicode MS", "Hiragino Sans", "PingFang SC",
    "Microsoft YaHei", "Malgun Gothic", "Noto Sans Thai", "Noto Sans Devanagari", "Nirmala UI",
)
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


@contextmanager
def new_figure(size: tuple[float, float], layout: str | None = None, **settings) -> Iterator:
    """A matplotlib figure of `size` (width, height) inches in the shared style.

    No pyplot: it keeps global state and picks a backend for the whole process.
    """
    import matplotlib
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {**_STYLE, "font.family": _fonts(), **settings}
    with matplotlib.style.context(["default", style]), warnings.catch_warnings():
        # A character that no font has is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


@contextmanager
def picture(out: str | Path, size: tuple[float, float], layout: str | None = None) -> Iterator:
    """A figure that is written to `out` as PNG when the block ends, whole or not at all.

    The file holds all that is drawn, also outside of `size`: a picture can give its axes the
    whole figure and let labels of any length stand around it.
    """
    with new_figure(size, layout) as figure:
        yield figure
        with atomic_write(out, "wb") as file:
            figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.1)


@contextmanager
def svg_figure(size: tuple[float, float]) -> Iterator:
    """A figure for `to_svg`, with axes as quiet as the page's text."""
    with new_figure(size, **_SVG_STYLE) as figure:
        yield figure


def to_svg(figure, label: str) -> str:
    """A figure from `svg_figure` as an <svg> element for the page.

    Colours of PALETTE become the CSS variables of their names, so that the chart follows the
    page's light or dark mode. An artist's attribute `tooltips`, a text for each of its markers,
    becomes <title> elements. label: for screen readers; different for each chart of a page.
    """
    import matplotlib

    tooltips = {}
    for i, artist in enumerate(figure.findobj(lambda artist: hasattr(artist, "tooltips"))):
        artist.set_gid(f"tooltips{i}")
        tooltips[f"tooltips{i}"] = artist.tooltips
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # the same ids every time
        figure.savefig(file, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(file.getvalue())
    root.attrib = {"viewBox": root.get("viewBox"), "role": "img", "aria-label": printable(label)}
    for group in root.iter(f"{{{_SVG}}}g"):
        texts = tooltips.get(group.attrib.pop("id", None), ())
        for marker, text in zip(group.iter(f"{{{_SVG}}}use"), texts, strict=False):
            ElementTree.SubElement(marker, f"{{{_SVG}}}title").text = printable(text)
    for definitions in root.findall(f"{{{_SVG}}}defs"):
        for style in definitions.findall(f"{{{_SVG}}}style"):
            definitions.remove(style)  # it would apply to the whole page
    for element in root.iter():
        for name in {"d", "x", "y", "transform"} & set(element.attrib):
            element.set(name, re.sub(r"\d+\.\d{3,}", _two_decimals, element.get(name)))
        if "style" in element.attrib:
            element.set("style", re.sub("#[0-9a-f]{6}", _css_variable, element.get("style")))
    return ElementTree.tostring(root, encoding="unicode")


def _two_decimals(match):
    return f"{float(match[0]):.2f}"


def _css_variable(match):
    names = [name for name, colour in _LIGHT.items() if colour == match[0]]
    return f"var(--{names[0]})" if names else match[0]


def _fonts():
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)]


def legible(text: str) -> bool:
    """Whether the installed fonts have every character of `text`."""
    from matplotlib import font_manager

    if text.isascii():
        return True
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in _fonts()]
    return all(any(font.get_char_index(ord(c)) for font in fonts) for c in text)


def shorten(text: object, longest: int = 32) -> str:
    """`text` on one line, unprintable characters as `?`, cut in the middle past `longest`.

    The start and the end of a class or file name tell more than its middle.
    """
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[:longest - 1 - tail]}…{text[len(text) - tail:]}"


def label_right(ax, labels: Sequence[tuple[float, str, str]], size: float | None = None) -> None:
    """Write labels [(y, text, colour)] right of the axes at height y (data units).

    Labels that would overlap are moved apart. Call it when the limits of the axes are final.
    size: in points, by default as the axis labels.
    """
    size = size or ax.xaxis.label.get_fontsize()
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top)
    lines = max(text.count("\n") + 1 for _, text, _ in labels)
    gap = 1.25 * size * lines / 72 * ax.figure.dpi / ax.bbox.height
    labels = sorted(labels, key=lambda label: label[0])
    to_axes = ax.transData + ax.transAxes.inverted()
    left = ax.get_xlim()[0]
    heights = spread_out([to_axes.transform((left, y))[1] for y, _, _ in labels], gap)
    for height, (_, text, colour) in zip(heights, labels):
        ax.annotate(text, (1, height), xycoords="axes fraction", xytext=(5, 0),
                    textcoords="offset points", va="center", color=colour, fontsize=size,
                    annotation_clip=False)


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, clipped to 0..1 -> heights at least `gap` apart, moved little."""
    heights = [min(max(h, 0.0), 1.0) for h in heights]
    for _ in range(20 * len(heights)):
        for i in range(len(heights) - 1):
            push = (gap - (heights[i + 1] - heights[i])) / 2
            if push > 0:
                heights[i] -= push
                heights[i + 1] += push
    return heights
