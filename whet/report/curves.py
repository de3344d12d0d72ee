"""Curves as plain SVG, readable at the width of a phone; they follow the page's colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
MOST_POINTS = 400
SMOOTHED_FROM = 60
"""Points from which a noisy curve is drawn faint, below its running mean."""


@dataclass(frozen=True)
class Line:
    """One curve: `points` are (step, value), in order of the steps."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    """A number of the page's palette."""
    dashed: bool = False
    noisy: bool = False


def chart(title: str, lines: Sequence[Line], note: str = "", log: bool = False) -> str:
    """A figure with all `lines`; nothing if none of them has a point."""
    lines = [line for line in lines if line.points]
    if log:
        lines = [Line(**{**vars(line), "points": _positive(line.points)}) for line in lines]
        lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    frame = _Frame(min(xs), max(xs), *_bounds(min(ys), max(ys), log), log)
    last = ", ".join(f"{line.name} {_short(line.points[-1][1])}" for line in lines)
    drawn = "".join(_draw(line, frame) for line in lines)
    return (
        f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>"
        f"{_legend(lines)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}; last: {escape(last)}">{_axes(frame)}{drawn}</svg></figure>'
    )


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the drawing."""

    left: float
    right: float
    low: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        share = (value - self.left) / ((self.right - self.left) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high, value = self.low, self.high, value
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)


def _bounds(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1
    return (low - room if low < 0 or low > 0.3 * high else 0.0), high + room


def _axes(frame: _Frame) -> str:
    parts = []
    for value in _ticks(frame.low, frame.high, frame.log):
        y = frame.y(value)
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        place = f'x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end"'
        parts.append(f'<line class="grid" {ends}/><text {place}>{_short(value)}</text>')
    steps = sorted({frame.left, (frame.left + frame.right) // 2, frame.right})
    for value in steps:
        anchor = "start" if value == frame.left else "end" if value == frame.right else "middle"
        anchor = anchor if len(steps) > 1 else "start"
        at = f'x="{frame.x(value):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}"'
        parts.append(f"<text {at}>{value:,.0f}</text>")
    return "".join(parts)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Three to six round numbers between the two."""
    if log and high / low > 30:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return [10.0**power for power in powers]
    size = (high - low) / 4 or 1
    unit = 10 ** math.floor(math.log10(size))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= size * 0.99)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float) -> str:
    """Four digits, from 10,000 to 999,999 all of them."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _draw(line: Line, frame: _Frame) -> str:
    classes = f"curve c{line.colour % 8}{' dashed' if line.dashed else ''}"
    points = _thinned(line.points)
    if line.noisy and len(line.points) >= SMOOTHED_FROM:
        mean = _thinned(_running_mean(line.points))
        return _path(points, frame, f"{classes} faint") + _path(mean, frame, classes)
    marks = ""
    if len(points) <= 40:  # a value can be pointed at
        marks = "".join(
            f'<circle class="{classes}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5">'
            f"<title>{escape(line.name)}, step {x:,.0f}: {y:.5g}</title></circle>"
            for x, y in points
        )
    return _path(points, frame, classes) + marks


def _path(points: Sequence[tuple[float, float]], frame: _Frame, classes: str) -> str:
    places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    return f'<polyline class="{classes}" points="{places}"/>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Few points that keep the least and the largest value of each stretch."""
    size = max(1, -(-2 * len(points) // MOST_POINTS))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential, over about a twentieth of the run, without a bias at its beginning."""
    keep = 1 - 20 / max(len(points), 21)
    total = weight = 0.0
    found = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        found.append((x, total / weight))
    return found


def _positive(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y > 0]


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><polyline class="curve '
        f'c{line.colour % 8}{" dashed" if line.dashed else ""}" points="0,4 24,4"/></svg>'
        f"{escape(line.name)} <b>{_short(line.points[-1][1])}</b></li>"
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'
