"""Plots as inline SVG, without a plotting library.

Colours come from CSS variables of the page, so that the plots follow its light and dark theme; whatever colour says,
shape (marks) or dashes (lines) say too, for printers and for eyes that see colours differently. Every mark has a
title that browsers show and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]

MARKS = {
    "circle": '<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
    "square": '<rect x="{x0:.1f}" y="{y0:.1f}" width="7.6" height="7.6"/>',
    "triangle": '<path d="M{x:.1f} {top:.1f}l4.9 8.4h-9.8z"/>',
    "hanging": '<path d="M{x:.1f} {foot:.1f}l4.9 -8.4h-9.8z"/>',
    "diamond": '<path class="here" d="M{x:.1f} {y7:.1f}l7 7l-7 7l-7 -7z"/>',
    "ring": '<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9"/>',
}
DASHES = ("", "7 4", "2 3", "9 3 2 3")


def plainly(value: float) -> str:
    """Three digits: `plainly(0.25) == "0.25"`."""
    return f"{value:.3g}"


def percents(value: float) -> str:
    """A fraction as a whole percentage: `percents(0.25) == "25 %"`."""
    return f"{100 * value:.3g} %"


@dataclass(frozen=True)
class Axis:
    """A range of numbers along one side: label, ends, linear or logarithmic, and how its numbers are written."""

    label: str
    low: float
    high: float
    log: bool = False
    write: Callable[[float], str] = plainly

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high end."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int) -> list[float]:
        """Round numbers within the range."""
        return log_ticks(self.low, self.high) if self.log else round_ticks(self.low, self.high, wanted)


def axis(label: str, values: Iterable[float], *, log: bool = False, write: Callable[[float], str] = plainly) -> Axis:
    """An axis that shows all of these values: from 0 if linear, by whole ticks."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    if log:
        return Axis(label, min(known) / 1.25, max(known) * 1.25, log=True, write=write)
    most = max(*known, 1e-12)
    step = round_step(most)
    return Axis(label, 0.0, step * math.ceil(most / step - 1e-9), write=write)


def round_step(span: float, wanted: int = 5) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts a span into about `wanted` pieces."""
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * 0.999)


def round_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Multiples of a round step between the ends."""
    step = round_step(high - low, wanted)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; only the powers where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 200 else (1,)
    return [d * 10.0**power for power in powers for d in digits if low <= d * 10.0**power <= high]


@dataclass
class Plot:
    """A picture with two axes; add lines and marks, then write it with `svg`."""

    title: str
    x: Axis
    y: Axis
    width: int = 460
    height: int = 300
    left: int = 56
    bottom: int = 44
    right: int = 22
    top: int = 12
    ticks: int = 5  # about as many along each side
    parts: list[str] = field(default_factory=list)

    def at(self, point: Point) -> Point:
        """Pixels of a point."""
        wide, high = self.width - self.left - self.right, self.height - self.top - self.bottom
        return (self.left + self.x.place(point[0]) * wide, self.height - self.bottom - self.y.place(point[1]) * high)

    def line(self, points: Sequence[Point], kind: int = 0) -> None:
        """Join points by the line of series 0, 1 or 2."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))
        dashes = f' stroke-dasharray="{DASHES[kind]}"' if DASHES[kind] else ""
        self.parts.append(f'<polyline class="line s{kind}"{dashes} points="{path}"/>')

    def mark(self, point: Point, title: str, kind: int = 0, shape: str = "circle") -> None:
        """Put a mark of series 0, 1 or 2 with a title."""
        x, y = self.at(point)
        drawn = MARKS[shape].format(x=x, y=y, x0=x - 3.8, y0=y - 3.8, top=y - 5.2, foot=y + 5.2, y7=y - 7)
        self.parts.append(f'<g class="mark s{kind}"><title>{escape(title)}</title>{drawn}</g>')

    def label(self, point: Point, text: str, *, right: bool | None = None) -> None:
        """Write beside a point: on its right or left, or where there is more room."""
        x, y = self.at(point)
        right = x < (self.left + self.width) / 2 if right is None else right
        anchor, dx = ("start", 12) if right else ("end", -12)
        dy = -8 if y > self.top + 24 else 18
        place = f'x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="label" {place}>{escape(text)}</text>')

    def svg(self) -> str:
        """The whole picture."""
        body = "".join([*self._grid(), *self.parts])
        size = f'viewBox="0 0 {self.width} {self.height}"'
        return f'<svg class="plot" role="img" aria-label="{escape(self.title)}" {size}>{body}</svg>'

    def _grid(self) -> Iterable[str]:
        end, floor = self.width - self.right, self.height - self.bottom
        for tick in self.y.ticks(self.ticks):
            _, y = self.at((self.x.low, tick))
            yield f'<line class="grid" x1="{self.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{self.left - 7}" y="{y + 4:.1f}" text-anchor="end">{self.y.write(tick)}</text>'
        for tick in self.x.ticks(self.ticks):
            x, _ = self.at((tick, self.y.low))
            yield f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>'
            yield f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{self.x.write(tick)}</text>'
        yield f'<line class="axis" x1="{self.left}" x2="{end}" y1="{floor}" y2="{floor}"/>'
        middle = (self.left + end) / 2
        place = f'x="{middle:.0f}" y="{self.height - 6}" text-anchor="middle"'
        yield f'<text class="name" {place}>{escape(self.x.label)}</text>'
        if self.y.label:
            centre = (self.top + floor) / 2
            turned = f'transform="translate(13 {centre:.0f}) rotate(-90)"'
            yield f'<text class="name" {turned} text-anchor="middle">{escape(self.y.label)}</text>'


def legend_key(kind: int, *, shape: str = "", line: bool = False) -> str:
    """A small sample of a series for a legend."""
    drawn = ""
    if line:
        dashes = f' stroke-dasharray="{DASHES[kind]}"' if DASHES[kind] else ""
        drawn += f'<line class="line s{kind}"{dashes} x1="1" x2="27" y1="7" y2="7"/>'
    if shape:
        mark = MARKS[shape].format(x=14, y=7, x0=10.2, y0=3.2, top=1.8, foot=12.2, y7=0)
        drawn += f'<g class="mark s{kind}">{mark}</g>'
    return f'<svg class="key" aria-hidden="true" viewBox="0 0 28 14" width="28" height="14">{drawn}</svg>'
