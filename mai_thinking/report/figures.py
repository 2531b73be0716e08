"""Figures: declared once as data and drawn once, by matplotlib, as PNG beside a Markdown page or as SVG in an HTML one.

A `Figure` has panels: a `Panel` of lines over one axis, or a `Grid` of coloured cells. Without matplotlib (the `plots`
extra) nothing is drawn, and one line says so.
"""

import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from mai_thinking.config.storage import atomic_file

MISSING = "no figures: install matplotlib, or mai_thinking[plots]"
MOST_POINTS = 240
"""Of a line; more readings are averaged in as many stretches, with the range of each as a band."""
PALETTE = ("#2f5fd0", "#d1622b", "#1f8a5b", "#a2429c", "#8a6d00", "#0f8a9d", "#c23a5e", "#66707f")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420.0, 215.0, 46.0, 10.0, 8.0, 34.0
"""Points, of a panel in a page."""
_INK, _LINE, _OWN = "#000100", "#000101", "#0002"
"""Stand for colours that the page's style sheet sets, by day and by night."""


@dataclass(frozen=True)
class Series:
    """One line. `low` and `high`, if there, are the band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: Literal["line", "noisy", "dots", "dotted"] = "line"
    """`noisy` is drawn faintly with its moving average; `dotted` and `dots` are not in the legend."""
    colour: int | None = None
    """Place in the palette; None: the series' place in its panel."""
    shade: float | None = None
    """Instead: a place between 0 and 1 in a palette for ordered things."""


@dataclass(frozen=True)
class Panel:
    """Lines over one x axis."""

    title: str
    series: Sequence[Series]
    x_name: str = "step"
    log_x: bool = False
    log_y: bool = False
    span: tuple[float, float] | None = None
    """The y axis's ends; reversed, it is upside down."""
    guides: Sequence[tuple[float, int | None]] = ()
    """Dashed levels to compare with: (y, place in the palette)."""
    marks: Sequence[tuple[float, str]] = ()
    """Names at places of the x axis."""
    bands: Sequence[tuple[float, float]] = ()
    """Shaded stretches of the x axis."""
    names: Sequence[str] = ()
    """Of x = 0, 1, 2, …, where x is no number."""

    @property
    def last(self) -> str:
        """The last value, where there is one line."""
        return number(self.series[0].y[-1]) if len(self.series) == 1 and self.series[0].y else ""

    @property
    def legend(self) -> list[tuple[str, str]]:
        """(name, colour as the page's style sheet has it) of each line, where there are several."""
        named = [(index, s) for index, s in enumerate(self.series) if s.name and s.style in ("line", "noisy")]
        shown = {s.name: _css(_colour(s, index, page=True)) for index, s in named}
        return list(shown.items()) if len(shown) > 1 else []

    def draw(self, axes: Any, *, page: bool = False) -> None:
        """Draw on matplotlib's `axes`."""
        for begin, end in self.bands:
            axes.axvspan(begin, end, color=PALETTE[2], alpha=0.2, linewidth=0)
        for index, series in enumerate(self.series):
            _draw_series(axes, series, _colour(series, index, page=page))
        ink = _INK if page else "grey"
        for level, place in self.guides:
            axes.axhline(level, color=ink if place is None else _own(place, page=page), linestyle="--", linewidth=0.8)
        for x, name in self.marks:
            axes.axvline(x, color=ink, linestyle=":", linewidth=0.8)
            axes.annotate(name, (x, 1), (2, -9), xycoords=("data", "axes fraction"), textcoords="offset points", size=7)
        axes.set_xlabel(self.x_name)
        if self.log_x:
            _make_logarithmic(axes.set_xscale, axes.xaxis)
        if self.log_y and min((v for s in self.series for v in (*s.y, *s.low)), default=0) > 0:
            _make_logarithmic(axes.set_yscale, axes.yaxis)
        if self.span is not None:
            axes.set_ylim(*self.span)
        if self.names:
            axes.set_xticks(range(len(self.names)), list(self.names))
        axes.grid(alpha=1 if page else 0.3)

    def pointer(self, axes: Any, height: float) -> dict[str, Any]:
        """What the page tells under the pointer, with places in the drawing's points."""
        lines = []
        for index, s in enumerate(self.series):
            places = [axes.transData.transform((x, y)) for x, y in zip(s.x, s.y, strict=True)]
            lines.append(
                {
                    "name": s.name,
                    "colour": _css(_colour(s, index, page=True)),
                    "x": [round(float(x), 1) for x, _ in places],
                    "y": [round(height - float(y), 1) for _, y in places],
                    "at": [number(x) for x in s.x],
                    "value": [_with_range(s, place) for place in range(len(s.y))],
                }
            )
        return {"x": self.x_name, "lines": lines, "top": _TOP, "bottom": height - _BOTTOM}


@dataclass(frozen=True)
class Grid:
    """Coloured cells: a row each for `rows`, columns over the x axis."""

    title: str
    rows: Sequence[str]
    x: Sequence[float]
    """Each column's end; the first begins at `begin`."""
    values: Sequence[Sequence[Any]]
    """[column][row]: numbers, darker for more, on a logarithmic scale; or keys of `colours`."""
    colours: Mapping[str, str] = field(default_factory=dict)
    begin: float = 0.0
    x_name: str = "step"
    height: float = _HEIGHT
    """Points, in a page."""
    legend: Sequence[tuple[str, str]] = ()
    last: str = ""

    def draw(self, axes: Any, *, page: bool = False) -> None:
        """Draw on matplotlib's `axes`."""
        import numpy as np
        from matplotlib.colors import to_rgba

        if self.colours:
            cells = np.array([[to_rgba(self.colours[value]) for value in column] for column in self.values])
        else:
            shades = np.log1p(np.maximum(0.0, np.array(self.values, dtype=float)))
            shares = (shades - shades.min()) / max(1e-9, float(np.ptp(shades)))
            cells = np.tile(to_rgba(PALETTE[0]), (*shares.shape, 1))
            cells[..., 3] = 0.06 + 0.94 * shares
        extent = (self.begin, self.x[-1], len(self.rows) - 0.5, -0.5)
        axes.imshow(cells.swapaxes(0, 1), extent=extent, aspect="auto", interpolation="none")
        every = max(1, math.ceil(len(self.rows) / 16))
        axes.set_yticks(range(0, len(self.rows), every), list(self.rows[::every]))
        axes.set_xlabel(self.x_name)

    def pointer(self, axes: Any, height: float) -> dict[str, Any]:
        """As a panel's."""
        told = [[value if self.colours else number(value) for value in column] for column in self.values]
        bottom = height - _BOTTOM
        return {
            "x": self.x_name, "at": [number(x) for x in self.x], "rows": list(self.rows), "cells": told,
            "left": _LEFT, "wide": (_WIDTH - _LEFT - _RIGHT) / len(self.x), "top": _TOP,
            "tall": (bottom - _TOP) / len(self.rows),
        }  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, in one file."""

    name: str
    """The file's, without its ending."""
    panels: Sequence[Panel | Grid]
    columns: int = 2
    size: tuple[float, float] = (5.5, 3.6)
    """Inches, of one panel of the file."""
    heights: Sequence[float] = ()
    """Of the rows, where they differ."""


def save(figure: Figure, path: Path) -> bool:
    """Write `figure` as PNG, whole or not at all; False without matplotlib."""
    if not _can_draw():
        return False
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    columns = min(figure.columns, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    with rc_context({"text.parse_math": False}):
        size = (figure.size[0] * columns, figure.size[1] * rows)
        drawing = Drawing(figsize=size, dpi=120, layout="constrained")
        places = drawing.subplots(rows, columns, squeeze=False, height_ratios=list(figure.heights) or None).flat
        for axes, panel in zip(places, figure.panels, strict=False):
            panel.draw(axes)
            axes.set_title(panel.title, fontsize=10)
            _draw_legend(axes, panel)
        for axes in list(drawing.axes)[len(figure.panels) :]:
            axes.axis("off")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            drawing.savefig(temporary, format="png")
    return True


def to_svg(panel: Panel | Grid) -> tuple[str, dict[str, Any]] | None:
    """(an SVG element, what a page tells of it under the pointer); None without matplotlib."""
    if not _can_draw():
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    height = panel.height if isinstance(panel, Grid) else _HEIGHT
    with rc_context(_PAGE_STYLE):
        drawing = Drawing(figsize=(_WIDTH / 72, height / 72), dpi=72)
        drawing.patch.set_visible(False)
        place = _LEFT / _WIDTH, _BOTTOM / height, 1 - (_LEFT + _RIGHT) / _WIDTH, 1 - (_TOP + _BOTTOM) / height
        axes = drawing.add_axes(place, facecolor="none")
        panel.draw(axes, page=True)
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        pointer = panel.pointer(axes, height)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # A page needs no namespaces and no clipping, and its own style sheet has the colours and the font.
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:\w+)?|clip-path|version|id)="(?!m)[^"]*"| font-family: [^;"]*;', "", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', svg, count=1)
    svg = _css(svg).replace("</svg>", '<g class="pointer"></g></svg>')
    return svg.strip(), pointer


def condensed(name: str, x: Sequence[float], y: Sequence[float], **options: Any) -> Series:
    """A series of at most MOST_POINTS: means of equal stretches, with least and greatest as the band."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if len(pairs) <= MOST_POINTS:
        return Series(name, [a for a, _ in pairs], [b for _, b in pairs], **options)
    cuts = [round(index * len(pairs) / MOST_POINTS) for index in range(MOST_POINTS + 1)]
    parts = [pairs[begin:end] for begin, end in pairwise(cuts)]
    return Series(
        name,
        [part[-1][0] for part in parts],
        [math.fsum(b for _, b in part) / len(part) for part in parts],
        [min(b for _, b in part) for part in parts],
        [max(b for _, b in part) for part in parts],
        **options,
    )


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential moving average, from the first value on."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else keep * smoothed[-1] + (1 - keep) * value)
    return smoothed


def number(value: float) -> str:
    """As people read it: three or four figures."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1 else f"{value:.3g}"


_PAGE_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "page", "text.parse_math": False, "font.size": 9, "text.color": _INK,
    "axes.edgecolor": _LINE, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "grid.color": _LINE,
    "xtick.major.size": 0, "xtick.minor.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
}  # fmt: skip


@functools.cache
def _can_draw() -> bool:
    try:
        import matplotlib
    except ImportError:
        print(MISSING)
        return False
    return bool(matplotlib)


def _make_logarithmic(set_scale: Any, axis: Any) -> None:
    """With plain numbers at its ticks: matplotlib's own are formulas, which text is not taken for here."""
    from matplotlib.ticker import LogLocator, NullFormatter

    set_scale("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(lambda value, _: number(value))
    axis.set_minor_formatter(NullFormatter())


def _draw_series(axes: Any, series: Series, colour: str) -> None:
    x, y = list(series.x), list(series.y)
    if series.low:
        axes.fill_between(x, list(series.low), list(series.high), color=colour, alpha=0.16, linewidth=0)
    match series.style:
        case "dots":
            axes.plot(x, y, "o", markersize=4, color=colour)
            return
        case "dotted":
            axes.plot(x, y, ":", linewidth=0.9, color=colour)
            return
        case "noisy" if len(y) > 40:
            axes.plot(x, y, linewidth=0.6, alpha=0.45, color=colour)
            y = smooth(y)
    dots = {"marker": "o", "markersize": 3} if len(y) <= 20 else {}
    axes.plot(x, y, linewidth=1.5, color=colour, label=series.name, **dots)


def _draw_legend(axes: Any, panel: Panel | Grid) -> None:
    if isinstance(panel, Grid):
        from matplotlib.patches import Patch

        patches = [Patch(color=colour, label=name) for name, colour in panel.legend]
        if patches:
            axes.legend(handles=patches, fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.25))
    elif panel.legend:
        axes.legend(fontsize=8)


def _own(place: int, *, page: bool) -> str:
    place %= len(PALETTE)
    return f"{_OWN}{place:02x}" if page else PALETTE[place]


def _colour(series: Series, index: int, *, page: bool) -> str:
    if series.shade is None:
        return _own(index if series.colour is None else series.colour, page=page)
    # From blue over red to yellow-brown, neither end lost on white or black.
    from colorsys import hls_to_rgb

    rgb = hls_to_rgb((0.62 + 0.5 * series.shade) % 1, 0.5, 0.7)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _css(text: str) -> str:
    """The colours that stand for the style sheet's, replaced by its names."""
    text = text.replace(_INK, "var(--soft)").replace(_LINE, "var(--line)")
    return re.sub(_OWN + r"(\d\d)", lambda match: f"var(--c{int(match[1])})", text)


def _with_range(series: Series, place: int) -> str:
    told = number(series.y[place])
    if not series.low or series.low[place] == series.high[place]:
        return told
    return f"{told} ({number(series.low[place])} – {number(series.high[place])})"
