"""Figures: declared once as data and drawn once, by matplotlib, for Markdown pages and HTML ones alike.

A `Figure` has panels: a `Panel` of lines over one axis, or a `Timeline`; each draws itself on matplotlib's `axes`.
Without matplotlib (the `plots` extra) nothing is drawn, and one line says so.
"""

import colorsys
import functools
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mai_thinking.config.storage import atomic_file

MISSING = "no figures: install matplotlib, or mai_thinking[plots]"
MOST_POINTS = 120
"""Of a line; more readings are averaged in as many stretches, with the range of each as a band."""
Style = Literal["line", "dots", "dotted"]
PALETTE = ("#2f5fd0", "#d1622b", "#1f8a5b", "#a2429c", "#8a6d00", "#0f8a9d", "#c23a5e", "#66707f")


@dataclass(frozen=True)
class Series:
    """One line. `low` and `high`, if there, are the band around it."""

    name: str
    """For the legend; empty: the line is not in it."""
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: Style = "line"
    """`dotted` and `dots` are not in the legend."""
    colour: int | str | None = None
    """Itself, or its place in the palette; None: the series' place in its panel."""

    def draw(self, axes: Any, place: int) -> None:
        """Draw it as the panel's series number `place`."""
        colour = place if self.colour is None else self.colour
        if isinstance(colour, int):
            colour = PALETTE[colour % len(PALETTE)]
        if len(self.low):
            axes.fill_between(self.x, self.low, self.high, color=colour, alpha=0.16, linewidth=0)
        if self.style == "dots":
            axes.plot(self.x, self.y, "o", markersize=4, color=colour)
        elif self.style == "dotted":
            axes.plot(self.x, self.y, ":", linewidth=0.9, color=colour)
        else:
            dots = {"marker": "o", "markersize": 3} if len(self.y) <= 20 else {}
            axes.plot(self.x, self.y, linewidth=1.5, color=colour, label=self.name, **dots)


@dataclass(frozen=True)
class Panel:
    """Lines over one x axis."""

    title: str
    series: Sequence[Series]
    x_name: str = "step"
    log_x: bool = False
    log_y: bool = False
    span: tuple[float, float] | None = None
    """The y axis's ends."""
    guides: Sequence[tuple[float, str]] = ()
    """Dashed levels to compare with: (y, colour)."""
    marks: Sequence[tuple[float, str]] = ()
    """Names at places of the x axis."""
    bands: Sequence[tuple[float, float]] = ()
    """Shaded stretches of the x axis."""
    names: Sequence[str] = ()
    """Of x = 0, 1, 2, …, where x is no number."""

    def draw(self, axes: Any) -> None:
        """Draw it."""
        for begin, end in self.bands:
            axes.axvspan(begin, end, color=PALETTE[2], alpha=0.2, linewidth=0)
        for place, series in enumerate(self.series):
            series.draw(axes, place)
        for level, colour in self.guides:
            axes.axhline(level, color=colour, linestyle="--", linewidth=0.8)
        for x, name in self.marks:
            axes.axvline(x, color="grey", linestyle=":", linewidth=0.8)
            axes.annotate(name, (x, 1), (2, -9), xycoords=("data", "axes fraction"), textcoords="offset points", size=7)
        if self.log_x:
            _make_logarithmic(axes.set_xscale, axes.xaxis)
        if self.log_y and min((value for s in self.series for value in (*s.y, *s.low)), default=0) > 0:
            _make_logarithmic(axes.set_yscale, axes.yaxis)
        if self.span is not None:
            axes.set_ylim(*self.span)
        if self.names:
            axes.set_xticks(range(len(self.names)), list(self.names))
        axes.grid(alpha=0.3)
        axes.set_xlabel(self.x_name)
        _add_legend(axes, fontsize=8)


@dataclass(frozen=True)
class Timeline:
    """Stretches of time, each of a colour."""

    title: str
    lanes: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
    """Lane → name, for the legend → (begin, duration) in seconds."""
    colours: Mapping[str, str]

    def draw(self, axes: Any) -> None:
        """Draw it."""
        edge = {"edgecolor": "white", "linewidth": 0.8} if len(self.lanes) > 1 else {"linewidth": 0}
        for place, stretches in enumerate(self.lanes.values()):
            for name, pieces in stretches.items():
                axes.broken_barh(pieces, (place, 1), facecolor=self.colours[name], label=name, **edge)
        axes.margins(0)
        axes.invert_yaxis()
        axes.set_yticks([place + 0.5 for place in range(len(self.lanes))], list(self.lanes))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("seconds")
        _add_legend(axes, fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1 + 0.4 / len(self.lanes)))


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, in one file."""

    name: str
    """The file's, without its ending."""
    panels: Sequence[Panel | Timeline]
    columns: int = 2
    size: tuple[float, float] = (5.5, 3.6)
    """Inches, of one panel."""
    heights: Sequence[float] | None = None
    """Of the rows, where they differ."""
    caption: str = ""
    """What is said below it."""


def draw(figure: Figure) -> bytes | None:
    """`figure` as PNG; None without matplotlib."""
    if not _can_draw():
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    columns = min(figure.columns, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    file = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # a name may have dollar signs
        size = (figure.size[0] * columns, figure.size[1] * rows)
        drawing = Drawing(figsize=size, dpi=120, layout="constrained")
        places = drawing.subplots(rows, columns, squeeze=False, height_ratios=figure.heights).flat
        for axes, panel in zip(places, figure.panels, strict=False):
            panel.draw(axes)
            axes.set_title(panel.title, fontsize=10)
        for axes in list(drawing.axes)[len(figure.panels) :]:
            axes.axis("off")
        drawing.savefig(file, format="png")
    return file.getvalue()


def save(figure: Figure, path: Path) -> bool:
    """Write `figure` as PNG, whole or not at all; False without matplotlib."""
    image = draw(figure)
    if image is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(image)
    return image is not None


def shade(place: int, of: int) -> str:
    """The colour of one of so many ordered things: from blue over red to yellow-brown."""
    hue = (0.62 + 0.5 * place / max(1, of - 1)) % 1
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.5, 0.7))
    return f"#{red:02x}{green:02x}{blue:02x}"


def condensed(name: str, x: Sequence[float], y: Sequence[float], **options: Any) -> Series:
    """A series of at most MOST_POINTS: means of equal stretches, with least and greatest as the band."""
    pairs = np.array([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]).reshape(-1, 2)
    if len(pairs) <= MOST_POINTS:
        return Series(name, pairs[:, 0].tolist(), pairs[:, 1].tolist(), **options)
    parts = np.array_split(pairs, [round(cut * len(pairs) / MOST_POINTS) for cut in range(1, MOST_POINTS)])
    mean, low, high = ([float(pick(part[:, 1])) for part in parts] for pick in (np.mean, np.min, np.max))
    return Series(name, [float(part[-1, 0]) for part in parts], mean, low, high, **options)


@functools.cache
def _can_draw() -> bool:
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        print(MISSING)
    return found


def _add_legend(axes: Any, **options: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # a name may stand for several
    if len(entries) > 1:
        axes.legend(entries.values(), entries.keys(), **options)


def _make_logarithmic(set_scale: Any, axis: Any) -> None:
    """With plain numbers at its ticks: by default they are formulas, which text is not taken for here."""
    from matplotlib.ticker import LogLocator, NullFormatter

    set_scale("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
