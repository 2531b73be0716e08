"""Charts as inline SVG, and the numbers behind them for the pointer. Python draws; without its script the page lacks no
more than the values under the pointer.

Colours are classes (`c0` … `c7`), which page.css gives other values by day and by night.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 420.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 8.0, 24.0
MOST_POINTS = 240
"""Of a line; more readings are averaged in as many stretches, with the range of each as a band."""
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line. `low` and `high`, if there, are the band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass
class Chart:
    """A drawn chart: its HTML, and what the page's script needs to tell values."""

    title: str
    svg: str
    now: str = ""
    """The last value, for the heading."""
    legend: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)


def number(value: float) -> str:
    """As people read it: three or four figures."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1 else f"{value:.3g}"


def condensed(name: str, x: Sequence[float], y: Sequence[float]) -> Series:
    """A series of at most MOST_POINTS: means of equal stretches, with least and greatest as the band."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if len(pairs) <= MOST_POINTS:
        return Series(name, [a for a, _ in pairs], [b for _, b in pairs])
    cuts = [round(index * len(pairs) / MOST_POINTS) for index in range(MOST_POINTS + 1)]
    parts = [pairs[begin:end] for begin, end in pairwise(cuts)]
    return Series(
        name,
        [part[-1][0] for part in parts],
        [math.fsum(b for _, b in part) / len(part) for part in parts],
        [min(b for _, b in part) for part in parts],
        [max(b for _, b in part) for part in parts],
    )


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str = "step",
    logarithmic: bool = False,
    span: tuple[float, float] | None = None,
    guide: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> Chart | None:
    """Lines over one x axis; None if there is nothing to draw. `span`: the y axis's ends; `guide`: a value to compare
    with; `marks`: names at places of the x axis."""
    series = [s for s in series if s.x and not (logarithmic and min(s.y) <= 0)]
    if not series:
        return None
    values = [v for s in series for v in (*s.y, *s.low, *s.high)] + ([] if guide is None else [guide])
    if logarithmic:
        values = [v for v in values if v > 0]
    across = _Axis(min(s.x[0] for s in series), max(s.x[-1] for s in series), LEFT, WIDTH - RIGHT)
    up = _Axis(*(span or (min(values), max(values))), HEIGHT - BOTTOM, TOP, logarithmic=logarithmic, roomy=span is None)
    parts = _grid(across, up, x_name)
    named = -math.inf
    for x, name in marks:
        at = across(x)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        if at > named and at + 6 * len(name) < WIDTH:  # only where it has room
            parts.append(f'<text class="mark" x="{at + 3:.1f}" y="{TOP + 9}">{escape(name)}</text>')
            named = at + 6 * len(name)
    if guide is not None:
        parts.append(
            f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(guide):.1f}" y2="{up(guide):.1f}"/>'
        )
    for index, s in enumerate(series):
        colour = f"c{index % COLOURS}"
        if s.low:
            edge = [*zip(s.x, s.high, strict=True), *reversed(list(zip(s.x, s.low, strict=True)))]
            parts.append(f'<polygon class="band {colour}" points="{_points(edge, across, up)}"/>')
        line = list(zip(s.x, s.y, strict=True))
        parts.append(f'<polyline class="line {colour}" points="{_points(line, across, up)}"/>')
        if len(line) <= 20:
            parts += [f'<circle class="dot {colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5"/>' for x, y in line]
    now = number(series[0].y[-1]) if len(series) == 1 else ""
    lines = [
        {
            "name": s.name,
            "c": index % COLOURS,
            "x": [round(across(x), 1) for x in s.x],
            "y": [round(up(y), 1) for y in s.y],
            "at": [number(x) for x in s.x],
            "value": [_with_range(s, index) for index in range(len(s.y))],
        }
        for index, s in enumerate(series)
    ]
    legend = [s.name for s in series] if len(series) > 1 else []
    return Chart(title, _svg(parts, HEIGHT, title), now, legend, {"x": x_name, "lines": lines})


def heat_map(title: str, rows: Sequence[str], steps: Sequence[float], values: Sequence[Sequence[float]]) -> Chart:
    """A row for each of `rows`, over steps; `values[step][row]`, darker for more, logarithmically."""
    count = min(len(steps), 120)
    cuts = [round(index * len(steps) / count) for index in range(count + 1)]
    grid = [
        [math.fsum(value[row] for value in values[begin:end]) / (end - begin) for row in range(len(rows))]
        for begin, end in pairwise(cuts)
    ]
    shades = [[math.log1p(max(0.0, value)) for value in column] for column in grid]
    least, most = min(map(min, shades)), max(map(max, shades))
    tall = max(6.0, min(60.0, (HEIGHT - TOP - BOTTOM) / len(rows)))
    bottom = TOP + tall * len(rows)
    across = _Axis(steps[0], steps[-1], LEFT, WIDTH - RIGHT)
    wide = (WIDTH - RIGHT - LEFT) / count
    parts = []
    for index, column in enumerate(shades):
        for row, shade in enumerate(column):
            part = (shade - least) / max(1e-9, most - least)
            parts.append(
                f'<rect class="heat" x="{LEFT + index * wide:.2f}" y="{TOP + row * tall:.1f}" width="{wide + 0.3:.2f}" '
                f'height="{tall - 1:.1f}" fill-opacity="{0.06 + 0.94 * part:.2f}"/>'
            )
    every = math.ceil(12 / tall)
    for row in range(0, len(rows), every):
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{TOP + (row + 0.5) * tall + 3:.1f}" text-anchor="end">'
            f"{escape(rows[row])}</text>"
        )
    parts += _x_ticks(across, bottom, "step")
    data = {
        "left": LEFT, "wide": wide, "top": TOP, "tall": tall, "rows": list(rows), "x": "step",
        "at": [number(steps[end - 1]) for end in cuts[1:]],
        "cells": [[number(value) for value in column] for column in grid],
    }  # fmt: skip
    return Chart(
        title,
        _svg(parts, bottom + BOTTOM, title),
        f"{number(math.expm1(least))} – {number(math.expm1(most))}",
        (),
        data,
    )


def strip(title: str, spans: Sequence[tuple[float, float, int, str]]) -> str:
    """A timeline: (begin, end, colour, what it says) side by side, all between 0 and 1."""
    parts = [
        f'<rect class="s{colour}" x="{begin * 1000:.1f}" width="{max(0.4, (end - begin) * 1000):.1f}" height="40">'
        f"<title>{escape(text)}</title></rect>"
        for begin, end, colour, text in spans
    ]
    return (
        f'<svg class="strip" viewBox="0 0 1000 40" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


class _Axis:
    """From values to places on the page, with ticks at round values."""

    def __init__(
        self, low: float, high: float, begin: float, end: float, *, logarithmic: bool = False, roomy: bool = False
    ) -> None:
        self.begin, self.end, self.logarithmic = begin, end, logarithmic
        if logarithmic:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-9 * max(1.0, abs(high)):
            room = 0.5 if logarithmic else abs(high) * 0.1 or 1.0
            low, high = low - room, high + room
        elif roomy:
            low, high = (0.0 if not logarithmic and 0 <= low < 0.3 * high else low), high + 0.04 * (high - low)
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        x = math.log10(max(value, 1e-300)) if self.logarithmic else value
        share = (min(max(x, self.low), self.high) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self, about: int) -> list[float]:
        low, high = self.low, self.high
        if self.logarithmic and high - low < 1:
            low, high = 10.0**low, 10.0**high
        elif self.logarithmic:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            of = (1,) if high - low > 2 else (1, 2, 5)
            every = max(1, math.ceil(len(decades) / 6)) if of == (1,) else 1
            values = [m * 10.0**d for d in decades if d % every == 0 for m in of]
            return [v for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]
        rough = (high - low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        width = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
        return [float(f"{index * width:.12g}") for index in range(first, last + 1)]


def _grid(across: _Axis, up: _Axis, x_name: str) -> list[str]:
    parts = []
    for value in up.ticks(5):
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{escape(number(value))}</text>'
        )
    return parts + _x_ticks(across, HEIGHT - BOTTOM, x_name)


def _x_ticks(across: _Axis, bottom: float, name: str) -> list[str]:
    ticks = across.ticks(5)
    parts = []
    for index, value in enumerate(ticks):
        x, text = across(value), number(value)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        text = f"{name} {text}" if index == len(ticks) - 1 else text
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 14:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )
    return parts


def _with_range(series: Series, index: int) -> str:
    told = number(series.y[index])
    if not series.low or series.low[index] == series.high[index]:
        return told
    return f"{told} ({number(series.low[index])} – {number(series.high[index])})"


def _points(pairs: Sequence[tuple[float, float]], across: _Axis, up: _Axis) -> str:
    return " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in pairs)


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">{"".join(parts)}'
        f'<g class="pointer"></g></svg>'
    )
