"""Curves over training steps as inline SVG that keeps its text size from a phone to a wide screen, without script."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

COLOURS = 4
"""Curves have the classes s0 to s3; further ones repeat them."""

DOTS = 40
"""A curve of at most so many points shows each as a dot."""

HOVERS = 200
"""At most so many points of a curve say their figures under the pointer."""

BUCKETS = 500
"""Longer curves are drawn by the lowest and the highest point of so many equal parts: no spike is lost."""

NOISY, WINDOWS = 60, 25
"""A curve of at least NOISY points may be drawn smoothed as well: the mean of a WINDOWS-th of it around each point."""

DRAWABLE = 1e100
"""Larger figures are as good as infinite: the axis could not be divided."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Point:
    """One logged figure, at an optimizer step; `epoch` is a fraction where it is known."""

    step: float
    value: float
    epoch: float | None = None

    @property
    def finite(self) -> bool:
        return abs(self.value) < DRAWABLE


@dataclass(frozen=True)
class Curve:
    """One figure through the run, in the order of its steps."""

    name: str
    points: tuple[Point, ...]

    @property
    def last(self) -> Point:
        return self.points[-1]

    def smoothed(self) -> tuple[Point, ...]:
        """The mean of the finite neighbours of each finite point; empty for a curve too short to be noisy."""
        finite = [point for point in self.points if point.finite]
        if len(finite) < NOISY:
            return ()
        sums = [0.0]
        for point in finite:
            sums.append(sums[-1] + point.value)
        reach = max(1, len(finite) // WINDOWS // 2)
        means = []
        for i, point in enumerate(finite):
            first, end = max(0, i - reach), min(len(finite), i + reach + 1)
            means.append(Point(point.step, (sums[end] - sums[first]) / (end - first), point.epoch))
        return tuple(means)


def curve(history: Iterable[Mapping[str, Any]], key: str, name: str = "") -> Curve:
    """What the entries of a Trainer's log_history hold under `key`. Entries without a step are left out."""
    found = (
        Point(float(entry["step"]), float(entry[key]), _number(entry.get("epoch")))
        for entry in history
        if _number(entry.get("step")) is not None and _number(entry.get(key)) is not None
    )
    points = sorted((point for point in found if abs(point.step) < DRAWABLE), key=lambda point: point.step)
    return Curve(name or key, tuple(points))


def chart(curves: Sequence[Curve], *, label: str, height: int = 240, smooth: bool = False) -> str:
    """The curves on common axes; "" when none has a point. What is no number breaks its line and is marked.

    Widths are percentages of the plot and heights are pixels, so that a narrow screen narrows the plot and not its
    text: only the lines themselves lie in a nested drawing that is stretched.
    """
    drawn = [each for each in curves if each.points]
    if not drawn:
        return ""
    axes = Axes.of(drawn, height)
    parts = [f'<svg class="chart" role="img" aria-label="{text(label)}" height="{height}">']
    for tick in axes.values:
        y = axes.y(tick)
        parts.append(f'<line class="grid" x1="0" y1="{y:.1f}" x2="100%" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="-8" y="{y + 4:.1f}">{figure(tick)}</text>')
    parts.append(f'<line class="axis" x1="0" y1="{height}" x2="100%" y2="{height}"/>')
    parts.append(f'<text class="tick" x="-14" y="{height + 18}">step</text>')
    for tick in axes.steps:
        parts.append(f'<text class="step" x="{axes.x(tick):.2f}%" y="{height + 18}">{figure(tick)}</text>')
    parts.append(f'<svg viewBox="0 0 1000 {height}" preserveAspectRatio="none" width="100%" height="{height}">')
    for number, each in enumerate(drawn):
        means = each.smoothed() if smooth else ()
        parts += _lines(each.points, f"s{number % COLOURS}{' raw' if means else ''}", axes)
        parts += _lines(means, f"s{number % COLOURS}", axes)
    parts.append("</svg>")
    for number, each in enumerate(drawn):
        parts += _points(each, f"s{number % COLOURS}", axes)
    parts.append("</svg>")
    return "".join(parts)


def legend(curves: Sequence[Curve]) -> str:
    """Names beside their colours, in the order that `chart` gives them."""
    drawn = [each for each in curves if each.points]
    items = (
        f'<li><span class="swatch s{number % COLOURS}"></span>{text(each.name)}</li>'
        for number, each in enumerate(drawn)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


@dataclass(frozen=True)
class Axes:
    """Steps from `first` to `last` across, values from `low` to `high` upwards over `height` pixels."""

    first: float
    last: float
    low: float
    high: float
    height: int

    @classmethod
    def of(cls, curves: Sequence[Curve], height: int) -> Axes:
        points = [point for each in curves for point in each.points]
        values = [point.value for point in points if point.finite]
        low, high = min(values, default=0.0), max(values, default=1.0)
        # A figure that comes near zero, or never changes, is read against zero.
        if 0 <= low <= high / 2 or low == high:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            high = 1.0
        room = (high - low) * 0.06
        first, last = min(0.0, min(point.step for point in points)), max(point.step for point in points)
        return cls(first, last if last > first else first + 1, low if low == 0 else low - room, high + room, height)

    @property
    def values(self) -> list[float]:
        return ticks(self.low, self.high, max(2, self.height // 35))

    @property
    def steps(self) -> list[float]:
        return [tick for tick in ticks(self.first, self.last, 5) if tick == int(tick)]

    def x(self, step: float) -> float:
        """Percent from the left."""
        return 100 * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return self.height * (self.high - value) / (self.high - self.low)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round figures (1, 2, 5 times a power of ten apart) within [low, high], about `most` of them and seldom more."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
    # Divided again, so that three tenths are 0.3 and not 0.30000000000000004.
    return [float(f"{number * apart:.12g}") for number in range(first, last + 1)]


def figure(value: float) -> str:
    """1,200 · 0.3142 · 5e-05 · nan: four significant digits, as a reader wants them."""
    if math.isfinite(value) and value == int(value):
        return f"{int(value):,}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.4g}"


def text(value: object) -> str:
    """Anything as the text of a page or of an attribute: escaped, without what no browser shows and no file holds."""
    return escape(_UNPRINTABLE.sub("\ufffd", str(value)))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _lines(points: Sequence[Point], style: str, axes: Axes) -> list[str]:
    """A polyline for each unbroken stretch of finite points."""
    stretches: list[list[Point]] = [[]]
    for point in points:
        if point.finite:
            stretches[-1].append(point)
        elif stretches[-1]:
            stretches.append([])
    drawn = []
    for stretch in filter(lambda points: len(points) > 1, stretches):
        places = " ".join(f"{10 * axes.x(p.step):.1f},{axes.y(p.value):.1f}" for p in _thinned(stretch))
        drawn.append(f'<polyline class="{style}" points="{places}"/>')
    return drawn


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    if len(points) <= 2 * BUCKETS:
        return points
    kept = []
    for i in range(BUCKETS):
        part = points[i * len(points) // BUCKETS : (i + 1) * len(points) // BUCKETS]
        extremes = {min(part, key=lambda point: point.value), max(part, key=lambda point: point.value)}
        kept += sorted(extremes, key=lambda point: point.step)
    return [points[0], *kept, points[-1]]


def _points(each: Curve, style: str, axes: Axes) -> list[str]:
    """Dots, or places for the pointer alone where dots would hide the line; crosses for what is no number."""
    shown = " dot" if len(each.points) <= DOTS else ""
    stride = max(1, math.ceil(len(each.points) / HOVERS))
    chosen = [point for i, point in enumerate(each.points) if point.finite and (i % stride == 0 or point is each.last)]
    drawn = []
    for point in chosen:
        at = f'cx="{axes.x(point.step):.2f}%" cy="{axes.y(point.value):.1f}"'
        mark = f'<circle class="dot {style}" {at} r="3.5"/>' if shown else ""
        drawn.append(
            f'<g class="place {style}">{mark}<circle class="hover" {at} r="9"/>'
            f"<title>{text(_said(each, point))}</title></g>"
        )
    broken = [point for point in each.points if not point.finite][:HOVERS]
    drawn += (
        f'<text class="broken" x="{axes.x(point.step):.2f}%" y="12">×<title>{text(_said(each, point))}</title></text>'
        for point in broken
    )
    return drawn


def _said(each: Curve, point: Point) -> str:
    epoch = f", epoch {point.epoch:.2f}" if point.epoch is not None else ""
    return f"{each.name} {figure(point.value)} at step {figure(point.step)}{epoch}"
