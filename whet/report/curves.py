"""Curves for `parts.html` to draw as SVG, readable at the width of a phone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
MOST_POINTS = 400
SMOOTHED_FROM = 60
"""Points from which a noisy curve is drawn faint, below its running mean."""
MOST_MARKS = 40
"""Points, of a curve that is not noisy, up to which each has a mark with its value."""


@dataclass(frozen=True)
class Line:
    """One curve: `points` are (step, value), in order of the steps."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    """A number of the page's palette."""
    dashed: bool = False
    noisy: bool = False


def figure(
    title: str, lines: Sequence[Line], note: str = "", log: bool = False
) -> dict[str, Any] | None:
    """What `parts.html` draws all `lines` from; None if none of them has a point."""
    if log:
        lines = [replace(line, points=[p for p in line.points if p[1] > 0]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    frame = _Frame(min(xs), max(xs), *_bounds(min(ys), max(ys), log), log)
    return {
        "title": title,
        "note": note,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "levels": [
            (round(frame.y(value), 1), _short(value))
            for value in _ticks(frame.low, frame.high, frame.log)
        ],
        "steps": _steps(frame),
        "lines": [_drawn(line, frame) for line in lines],
    }


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

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """The points of a polyline."""
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def _bounds(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1
    return (low - room if low < 0 or low > 0.3 * high else 0.0), high + room


def _steps(frame: _Frame) -> list[tuple[float, str, str]]:
    """Where the first, the middle and the last step stand, aligned to that place, and their
    numbers."""
    steps = sorted({frame.left, (frame.left + frame.right) // 2, frame.right})
    anchors = ["start", *["middle"] * (len(steps) - 2), "end"]
    return [(round(frame.x(s), 1), a, f"{s:,.0f}") for s, a in zip(steps, anchors, strict=False)]


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


def _drawn(line: Line, frame: _Frame) -> dict[str, Any]:
    """A curve: its paths, the faint ones first, and marks where a value can be pointed at."""
    points, noisy = _thinned(line.points), line.noisy and len(line.points) >= SMOOTHED_FROM
    paths = [(noisy, frame.path(points))]
    if noisy:
        paths.append((False, frame.path(_thinned(_running_mean(line.points)))))
    marks = [] if noisy or len(points) > MOST_MARKS else points
    return {
        "name": line.name,
        "classes": f"curve c{line.colour % 8}{' dashed' if line.dashed else ''}",
        "last": _short(line.points[-1][1]),
        "paths": paths,
        "marks": [
            (round(frame.x(x), 1), round(frame.y(y), 1), f"{line.name}, step {x:,.0f}: {y:.5g}")
            for x, y in marks
        ],
    }


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
