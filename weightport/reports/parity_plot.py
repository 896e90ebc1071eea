"""Error by depth against the noise floor, as inline SVG: no script, no font, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from weightport.parity.compare import Comparison

HEIGHT, TOP, LEFT, RIGHT = 260, 16, 58, 24
STEP, WIDEST, WIDTH = 30, 56, 1000
"""Pixels between seams: the first at least, the second at most, so that a short plot fills about the third."""

LABELS = 120
"""Pixels below the axis for seam names, which stand at an angle."""

COLOURS = 4
"""Series have the classes s0 to s3; further ones repeat them."""


@dataclass(frozen=True)
class Series:
    """The worst of all runs at each seam, in one pair of dtypes. Figures are in units of the seam's scale."""

    name: str
    points: dict[str, Comparison]


def series_of(comparisons: Sequence[Comparison], order: Sequence[str]) -> tuple[list[str], list[Series]]:
    """(seams in forward order, series): the seams with figures, gradients and buffers left out."""
    place = {seam: i for i, seam in enumerate(order)}
    found: dict[tuple[str, str, str], dict[str, Comparison]] = {}
    for each in sorted(comparisons, key=lambda c: place.get(c.seam, len(place))):
        if each.relative is None or each.relative_allowed is None or each.seam.startswith(("grad", "after.")):
            continue
        points = found.setdefault((each.dtype, each.against, each.attention), {})
        if each.seam not in points or _ratio(each) > _ratio(points[each.seam]):
            points[each.seam] = each
    seams = sorted({seam for points in found.values() for seam in points}, key=lambda s: place.get(s, len(place)))
    named = [
        Series(f"{dtype} against {against}" + (f", {attention}" if attention else ""), points)
        for (dtype, against, attention), points in found.items()
    ]
    return seams, named


def plot(comparisons: Sequence[Comparison], order: Sequence[str]) -> str:
    """A `figure` with the plot and its legend; a sentence where there is nothing to plot."""
    seams, series = series_of(comparisons, order)
    if not seams:
        return "<p>No seam with figures was compared.</p>"
    axis = Axis.of(series)
    step = min(WIDEST, max(STEP, WIDTH // len(seams)))
    width = LEFT + step * len(seams) + RIGHT
    x = {seam: LEFT + step * (i + 0.5) for i, seam in enumerate(seams)}
    parts = [
        f'<svg class="plot" role="img" aria-label="Largest error by depth, against the noise floor" '
        f'viewBox="0 0 {width} {TOP + HEIGHT + LABELS}" width="{width}" height="{TOP + HEIGHT + LABELS}">'
    ]
    for tick in axis.ticks:
        y = axis.at(10.0**tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{width - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}">1e{tick}</text>')
    bottom = TOP + HEIGHT
    parts.append(f'<text class="tick" x="{LEFT - 8}" y="{bottom + 4}">0</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{width - RIGHT}" y2="{bottom}"/>')
    for seam in seams:
        parts.append(
            f'<text class="seam" transform="translate({x[seam] + 4:.1f} {bottom + 14}) rotate(-50)">'
            f"{escape(seam)}</text>"
        )
    for number, each in enumerate(series):
        parts += _drawn(each, f"s{number % COLOURS}", x, axis)
    parts.append("</svg>")
    legend = "".join(
        f'<li><span class="swatch s{number % COLOURS}"></span>{escape(each.name)}</li>'
        for number, each in enumerate(series)
    )
    return (
        f'<figure><div class="scroll">{"".join(parts)}</div><ul class="legend">{legend}'
        '<li><span class="swatch floor"></span>noise floor (dashed): what arithmetic allows</li>'
        '<li><span class="swatch wrong"></span>departs</li></ul></figure>'
    )


@dataclass(frozen=True)
class Axis:
    """Decades from `low` to `high`, the largest at the top. An error of 0 lies on the axis itself."""

    low: int
    high: int

    @classmethod
    def of(cls, series: Sequence[Series]) -> Axis:
        figures = [
            value
            for each in series
            for point in each.points.values()
            for value in (point.relative, point.relative_allowed)
            if value and math.isfinite(value)
        ]
        low = math.floor(math.log10(min(figures, default=1e-7)))
        return cls(low - 1, max(math.ceil(math.log10(max(figures, default=1.0))), low + 1))

    @property
    def ticks(self) -> range:
        step = max(1, math.ceil((self.high - self.low) / 9))
        return range(self.low + 1, self.high + 1, step)

    def at(self, value: float) -> float:
        """The height of a value in pixels from the top."""
        if value <= 0:
            return TOP + HEIGHT
        return TOP + HEIGHT * (self.high - math.log10(value)) / (self.high - self.low)


def _drawn(series: Series, style: str, x: dict[str, float], axis: Axis) -> list[str]:
    placed = [(x[seam], point) for seam, point in series.points.items()]
    floor = " ".join(f"{at:.1f},{axis.at(point.relative_allowed or 0.0):.1f}" for at, point in placed)
    line = " ".join(f"{at:.1f},{axis.at(point.relative or 0.0):.1f}" for at, point in placed)
    drawn = [
        f'<polyline class="noise {style}" points="{floor}"/>',
        f'<polyline class="error {style}" points="{line}"/>',
    ]
    for at, point in placed:
        figures = f"{point.relative:.1e}, allowed {point.relative_allowed:.1e}"
        said = f"{point.seam}, {series.name}: {figures} (run {point.run})"
        wrong = "" if point.verdict.passes else " wrong"
        drawn.append(
            f'<circle class="point {style}{wrong}" cx="{at:.1f}" cy="{axis.at(point.relative or 0.0):.1f}" '
            f'r="{6 if wrong else 3.5}"><title>{escape(said)}</title></circle>'
        )
    return drawn


def _ratio(each: Comparison) -> float:
    return (each.largest or 0.0) / each.allowed if each.allowed else (each.largest or 0.0)
