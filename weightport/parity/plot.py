"""Error by depth against the noise floor, as inline SVG: no script, no font, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from weightport.parity.compare import Comparison

ROW, TOP, BOTTOM, MARGIN = 19, 26, 12, 18
"""Pixels of a seam's row, above and below all rows, and at the right: half a tick's label."""

WIDE, NARROW = 1040, 380
"""Widths the figure is drawn for, a desk's and a phone's; the style shows one of them, and neither scrolls."""

LETTER = 6.7
"""Pixels of a letter of a seam's name, at most."""

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
    """A `figure` with the plot, drawn for two widths, and its legend; a sentence where there is nothing to plot.

    One row a seam, in forward order from the top; errors grow to the right.
    """
    seams, series = series_of(comparisons, order)
    if not seams:
        return "<p>No seam with figures was compared.</p>"
    drawn = "".join(
        f'<div class="{style}">{_drawing(seams, series, width)}</div>'
        for style, width in (("wide", WIDE), ("narrow", NARROW))
    )
    named = "".join(
        f'<li><span class="swatch s{number % COLOURS}"></span>{escape(each.name)}: largest error of all runs</li>'
        for number, each in enumerate(series)
    )
    has_own = any(point.relative_own is not None for each in series for point in each.points.values())
    own = '<li><span class="swatch own"></span>ring: the original\'s own noise there</li>' if has_own else ""
    return (
        f'<figure>{drawn}<ul class="legend">{named}<li><span class="swatch floor"></span>dashed: allowed</li>{own}'
        '<li><span class="swatch wrong"></span>departs</li></ul></figure>'
    )


def _drawing(seams: Sequence[str], series: Sequence[Series], width: int) -> str:
    left = 10 + LETTER * max(map(len, seams))
    axis = Axis.of(series, left, width - MARGIN)
    height = TOP + ROW * len(seams) + BOTTOM
    y = {seam: TOP + ROW * (i + 0.5) for i, seam in enumerate(seams)}
    parts = [
        f'<svg class="plot" role="img" aria-label="Largest error by depth, against what is allowed" '
        f'viewBox="0 0 {width} {height}" style="max-width: {width}px">'
    ]
    for tick in axis.ticks:
        x = axis.at(10.0**tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{TOP - 8}">1e{tick}</text>')
    parts.append(f'<line class="axis" x1="{left:.1f}" y1="{TOP}" x2="{left:.1f}" y2="{height - BOTTOM}"/>')
    parts += [f'<text class="seam" x="{left - 8:.1f}" y="{y[seam] + 4:.1f}">{escape(seam)}</text>' for seam in seams]
    for number, each in enumerate(series):
        parts += _drawn(each, f"s{number % COLOURS}", y, axis)
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Axis:
    """Decades from `low`, at the pixel `left`, to `high`, at `right`. An error of 0 lies at the left."""

    low: int
    high: int
    left: float
    right: float

    @classmethod
    def of(cls, series: Sequence[Series], left: float, right: float) -> Axis:
        figures = [
            value
            for each in series
            for point in each.points.values()
            for value in (point.relative, point.relative_allowed, point.relative_own)
            if value and math.isfinite(value)
        ]
        low = math.floor(math.log10(min(figures, default=1e-7)))
        return cls(low, max(math.ceil(math.log10(max(figures, default=1.0))), low + 1), left, right)

    @property
    def ticks(self) -> range:
        """As many decades as have room for their labels."""
        room = max(2, int((self.right - self.left) // 46))
        return range(self.low, self.high + 1, max(1, math.ceil((self.high - self.low) / room)))

    def at(self, value: float) -> float:
        """The place of a value in pixels from the left."""
        if value <= 0:
            return self.left
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self.left + (self.right - self.left) * max(part, 0.0)


def _drawn(series: Series, style: str, y: dict[str, float], axis: Axis) -> list[str]:
    placed = [(y[seam], point) for seam, point in series.points.items()]
    floor = " ".join(f"{axis.at(point.relative_allowed or 0.0):.1f},{at:.1f}" for at, point in placed)
    line = " ".join(f"{axis.at(point.relative or 0.0):.1f},{at:.1f}" for at, point in placed)
    drawn = [
        f'<polyline class="noise {style}" points="{floor}"/>',
        f'<polyline class="error {style}" points="{line}"/>',
    ]
    for at, point in placed:
        if point.relative_own is not None:
            drawn.append(f'<circle class="own {style}" cx="{axis.at(point.relative_own):.1f}" cy="{at:.1f}" r="5"/>')
        figures = f"{point.relative:.1e}, allowed {point.relative_allowed:.1e}"
        said = f"{point.seam}, {series.name}: {figures} (run {point.run})"
        wrong = "" if point.verdict.passes else " wrong"
        drawn.append(
            f'<circle class="point {style}{wrong}" cx="{axis.at(point.relative or 0.0):.1f}" cy="{at:.1f}" '
            f'r="{5 if wrong else 3}"><title>{escape(said)}</title></circle>'
        )
    return drawn


def _ratio(each: Comparison) -> float:
    return (each.largest or 0.0) / each.allowed if each.allowed else (each.largest or 0.0)
