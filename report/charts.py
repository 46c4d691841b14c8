"""Small charts as SVG that take their colours from the page: light, dark, print. Text in them has the size of the page's
where a chart is drawn about WIDTH pixels wide, as it is on a phone and in each column of a wider page."""
import math

import numpy as np

from .markup import clean, element
from .style import apart, plain

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 40, 82, 12, 36
ALONE = 16  # right margin of a line without a name
FITS = 12  # classes of a confusion matrix that a phone shows whole
LINES = ("blue", "vermilion", "green", "purple")  # classes of the style sheet


def svg(label, *content, width=WIDTH, height=HEIGHT, **attributes):
    return element("svg", content, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, **attributes)


def line_chart(label, series, x_label, best=None, log=False, percent=False, top=None, band=None, marks=()):
    """Lines over a common axis, named at their right ends where there are several.

    series: [(name, x, y)], values that are not finite are left out; best: x of the dashed line, with a ring on each line;
    log: logarithmic y; top: where the y axis ends at least; band: (x, low, high) shaded behind the first line, cut where
    single peaks would press the rest flat; marks: x of ticks at the bottom. Returns Markup, or None where there is nothing to draw.
    """
    series = [(name, np.asarray(x, float), np.asarray(y, float)) for name, x, y in series]
    series = [(name, x[keep], y[keep]) for name, x, y in series
              if (keep := np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log))).any()]
    if not series:
        return None
    xs, ys = (np.concatenate([part[i] for part in series]) for i in (1, 2))
    x_low, x_high = xs.min(), xs.max()
    right = RIGHT if len(series) > 1 else ALONE
    if band is not None and np.isfinite(band[2]).any():
        top = max(top or 0.0, float(np.nanpercentile(np.where(np.isfinite(band[2]), band[2], np.nan), 98)))
    if log:
        peak = min(y.max() for _, _, y in series)
        low, high = math.log10(max(ys.min() / 1.3, peak / 1e3)), math.log10(ys.max() * 1.5)
        y_ticks = [10.0 ** e for e in range(math.ceil(low), math.floor(high) + 1)]
    else:
        low, high = min(0.0, ys.min()), max(ys.max() * 1.06, top or 0.0) or 1.0
        y_ticks = [tick for tick in nice_ticks(low, high, 4)]

    def at_x(x):
        return LEFT + (np.asarray(x) - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - right) + (x_high == x_low) * 8

    def at_y(y):
        y = np.log10(np.maximum(y, 10.0 ** low)) if log else np.clip(y, low, high)
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_y_axis([(at_y(tick), _tick(tick, percent, log)) for tick in y_ticks], right),
             _x_axis([(at_x(tick), f"{tick:,.0f}") for tick in whole_ticks(x_low, x_high)], x_label, right)]
    if band is not None:
        x, lower, upper = (np.asarray(part, float) for part in band)
        keep = np.isfinite(lower) & np.isfinite(upper)
        outline = [*zip(at_x(x[keep]), at_y(upper[keep])), *reversed(list(zip(at_x(x[keep]), at_y(lower[keep]))))]
        parts.append(element("polygon", points=_points(outline), class_="band"))
    if best is not None:
        parts.append(element("line", x1=_n(at_x(best)), x2=_n(at_x(best)), y1=TOP, y2=HEIGHT - BOTTOM, class_="best"))
    ends = []
    for (name, x, y), colour in zip(series, LINES, strict=False):
        points = list(zip(at_x(x), at_y(y)))
        parts.append(element("path", d="M" + _points(points, "L"), class_=f"line {colour}"))
        if len(x) <= 60 and band is None:
            for (left, high_up), one, value in zip(points, x, y):
                ring = best is not None and one == best
                said = element("title", f"{name}, {x_label} {one:,.0f}: {_value(value, percent, log)}")
                parts.append(element("circle", said, cx=_n(left), cy=_n(high_up), r=4 if ring else 2 if len(x) > 1 else 3,
                                     class_=f"{'ring' if ring else 'dot'} {colour}"))
        ends.append((float(points[-1][1]), name, colour))
    parts += [element("line", element("title", f"step {mark:,.0f}"), x1=_n(at_x(mark)), x2=_n(at_x(mark)),
                      y1=HEIGHT - BOTTOM - 6, y2=HEIGHT - BOTTOM, class_="mark") for mark in marks]
    return svg(label, parts, _end_labels(ends) if len(ends) > 1 else None)


def _end_labels(ends):
    """The names right of the lines' ends, [(y, name, colour)], moved apart where they would lie on each other."""
    ends = sorted(ends, key=lambda end: -end[0])  # from the bottom up, as `apart` wants rising heights
    heights = apart([1 - (y - TOP) / (HEIGHT - TOP - BOTTOM) for y, _, _ in ends], 14 / (HEIGHT - TOP - BOTTOM))
    return [element("text", plain(name, 14), x=WIDTH - RIGHT + 6, y=_n(TOP + (1 - height) * (HEIGHT - TOP - BOTTOM) + 4),
                    class_=f"end {colour}") for height, (_, name, colour) in zip(heights, ends)]


def reliability(label, curves, axes, colours=("blue", "vermilion")):
    """Reliability diagram: share right over mean confidence, what `axes` (x, y) call so, for each curve, [(name, (bins, 3)
    confidence, share right,
    clips)]; the area of a dot goes with its clips, the columns below say how many."""
    width, height, left, top, side = 360, 404, 44, 42, 270
    parts = [element("rect", x=left, y=top, width=side, height=side, class_="frame"),
             element("line", x1=left, y1=top + side, x2=left + side, y2=top, class_="best")]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(element("text", f"{tick:.0%}", x=left - 6, y=_n(top + side * (1 - tick) + 4), class_="tick right"))
        parts.append(element("text", f"{tick:.0%}", x=_n(left + side * tick), y=height - 24, class_="tick middle"))
    parts.append(element("text", axes[0], x=left + side / 2, y=height - 6, class_="axis middle"))
    parts.append(element("text", axes[1], class_="axis middle", transform=f"translate(11 {top + side / 2}) rotate(-90)"))
    most = max((float(np.asarray(bins, float).reshape(-1, 3)[:, 2].max(initial=0)) for _, bins in curves), default=0) or 1
    names = []
    for i, ((name, bins), colour) in enumerate(zip(curves, colours, strict=False)):
        bins = np.asarray(bins, float).reshape(-1, 3)
        bins = bins[bins[:, 2] > 0]
        points = [(left + side * confidence, top + side * (1 - share)) for confidence, share, _ in bins]
        if points:
            parts.append(element("path", d="M" + _points(points, "L"), class_=f"line thin {colour}"))
        for (x, y), (confidence, share, n) in zip(points, bins):
            said = element("title", f"{name}: {n:,.0f} clips, confidence {confidence:.1%}, {share:.1%} right")
            parts.append(element("circle", said, cx=_n(x), cy=_n(y), r=_n(2 + 6 * math.sqrt(n / most)), class_=f"dot {colour}"))
            column = 34 * n / most
            parts.append(element("rect", x=_n(x - 5 + 5 * i), y=_n(top + side + 42 - column), width=4, height=_n(column),
                                 class_=f"fill {colour}"))
        names.append(element("text", plain(name, 40), x=left, y=14 + 16 * i, class_=f"end {colour}"))
    parts.append(element("text", "clips", x=left - 6, y=top + side + 40, class_="tick right"))
    return svg(label, parts, names, width=width, height=height)


def scatter(label, points, x_label, y_label):
    """Points [(name, x, y in 0 to 1)], x logarithmic where it spans more than a factor of ten."""
    xs = np.array([max(x, 0.5) for _, x, _ in points], float)
    log = xs.max() > 10 * xs.min()
    scale = np.log10 if log else np.asarray
    low, high = float(scale(xs.min())), float(scale(xs.max()))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    right = 14

    def at_x(x):
        return LEFT + 8 + (float(scale(x)) - low) / (high - low) * (WIDTH - LEFT - right - 16)

    def at_y(y):
        return HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    ticks = [10.0 ** e for e in range(math.ceil(low), math.floor(high) + 1)] if log else whole_ticks(low, high)
    ticks = ticks if len(ticks) > 1 else [xs.min(), xs.max()]
    parts = [_y_axis([(at_y(y), f"{y:.0%}") for y in (0, 0.25, 0.5, 0.75, 1)], right),
             _x_axis([(at_x(x), f"{x:,.0f}") for x in ticks], x_label, right)]
    for (name, x, y), place in zip(points, xs):
        said = element("title", f"{clean(name)}: {y:.1%} {y_label}, {x:,} {x_label}")
        parts.append(element("circle", said, cx=_n(at_x(place)), cy=_n(at_y(y)), r=4, class_="dot soft blue"))
    return svg(label, parts)


def _y_axis(ticks, right):
    return [[element("line", x1=LEFT, x2=WIDTH - right, y1=_n(y), y2=_n(y), class_="grid"),
             element("text", text, x=LEFT - 6, y=_n(y + 4), class_="tick right")] for y, text in ticks]


def _x_axis(ticks, label, right):
    return [element("line", x1=LEFT, x2=WIDTH - right, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="base"),
            [element("text", text, x=_n(x), y=HEIGHT - BOTTOM + 15, class_="tick middle") for x, text in ticks],
            element("text", label, x=(LEFT + WIDTH - right) / 2, y=HEIGHT - 4, class_="axis middle")]


def nice_ticks(low, high, n):
    """About n round numbers from low to high: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / n or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def whole_ticks(low, high):
    """Whole numbers among `nice_ticks`, the first value and perhaps the last with them."""
    ticks = sorted({round(tick) for tick in nice_ticks(low, high, 4) if low <= tick <= high and abs(tick - round(tick)) < 1e-6})
    return ticks if len(ticks) > 1 else sorted({round(low), round(high)})


def envelope(x, y, n=300):
    """A long row of values in at most n stretches -> (x, mean, lowest, highest) of each; what is not finite does not count."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) == 0:
        return (np.zeros(0),) * 4
    starts = np.unique(np.linspace(0, len(x), min(n, len(x)), endpoint=False).astype(int))
    size = np.diff([*starts, len(x)])
    return (x[starts + size // 2], np.add.reduceat(y, starts) / size, np.minimum.reduceat(y, starts),
            np.maximum.reduceat(y, starts))


def thinned(x, y, n=400):
    """At most about n of the points of a smooth curve, its first, highest and last among them."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    keep = np.unique([*range(0, len(x), max(1, len(x) // n)), len(x) - 1, int(np.nanargmax(y)) if np.isfinite(y).any() else 0])
    return x[keep], y[keep]


def _points(points, between=" "):
    return between.join(f"{_n(x)},{_n(y)}" for x, y in points)


def _n(value):
    return f"{float(value):.1f}".removesuffix(".0")


def _tick(value, percent, log):
    return f"{value:.0%}" if percent else _value(value, False, log) if log else f"{value:.10g}"


def _value(value, percent, log):
    if percent:
        return f"{value:.1%}"
    if log:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.3f}"


def matrix(counts, names, order):
    """The confusion matrix of the classes in `order`, rows the truth. A cell's colour is its share of the row; each has
    data-cell="row,column" in class indices. Up to FITS classes it is one picture that shrinks with the page; beyond, names and
    cells are apart, so that the names can stay in place while the cells are scrolled."""
    n = len(order)
    size = 28 if n <= FITS else 22 if n <= 30 else 15
    shown = [plain(names[i], 14 if n <= FITS else 20) for i in order]
    letters = max(map(len, shown))
    side, top = 7 * letters + 46, 7 * letters + 12  # of the names: in pixels, generous for wide fonts
    support = counts.sum(axis=1)
    rows, columns, cells = [], [], []
    for at, (i, name) in enumerate(zip(order, shown, strict=True)):
        middle = at * size + size / 2
        rows.append([element("text", element("title", clean(names[i])), name, x=_n(side - 36), y=_n(middle + 4), class_="tick right"),
                     element("text", f"{support[i]:,}", x=_n(side - 5), y=_n(middle + 4), class_="tick right quiet")])
        columns.append(element("text", element("title", clean(names[i])), name, class_="tick",
                               transform=f"translate({_n(middle + 4)} {_n(top - 6)}) rotate(-90)"))
        if support[i] == 0:
            cells.append(element("rect", x=0, y=at * size, width=n * size, height=size, class_="none"))
        cells += [_cell(counts[i, j], support[i], names, i, j, at, to, size, n <= 20) for to, j in enumerate(order) if counts[i, j]]
    grid = [element("path", d="".join(f"M{k * size},0V{n * size}M0,{k * size}H{n * size}" for k in range(n + 1)), class_="grid")]
    what, width = "confusion matrix, truth in rows, answers in columns", n * size + 1
    if n <= FITS:
        parts = [element("g", part, transform=f"translate({_n(x)} {_n(y)})") for part, x, y in (
            (rows, 0, top), (columns, side, 0), (grid + cells, side, top))]
        return element("svg", parts, viewBox=f"0 0 {_n(side + width)} {_n(top + width)}", width=_n(side + width), role="group",
                       aria_label=what, class_="matrix")
    return element("div", element("div", class_="corner"), _piece(columns, width, top, "columns"), _piece(rows, side, width, "rows"),
                   element("svg", grid, cells, viewBox=f"0 0 {width} {width}", width=width, height=width, role="group", aria_label=what),
                   class_="matrix scroll", style=f"--side:{_n(side)}px;--top:{_n(top)}px")


def _piece(content, width, height, name):
    return element("svg", content, viewBox=f"0 0 {_n(width)} {_n(height)}", width=_n(width), height=_n(height), class_=name,
                   aria_hidden="true")


def _cell(n, support, names, i, j, at, to, size, written):
    share = n / support
    box = element("rect", x=_n(to * size + 0.5), y=_n(at * size + 0.5), width=size - 1, height=size - 1,
                  fill_opacity=f"{0.12 + 0.88 * share ** 0.6:.2f}")  # a few percent show beside a strong diagonal
    number = element("text", int(n), x=_n(to * size + size / 2), y=_n(at * size + size / 2 + 4),
                     class_="middle" + " strong" * bool(share > 0.4)) if written else None
    what = "rightly named" if i == j else f"taken for {clean(names[j])}"
    return element("g", box, number, class_="cell " + ("right-cell" if i == j else "wrong-cell"), role="button", tabindex="-1",
                   data_cell=f"{i},{j}", data_at=f"{at},{to}", aria_label=f"{clean(names[i])} {what}: {n:,} of {support:,} clips")
