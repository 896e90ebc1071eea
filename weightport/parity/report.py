"""The parity report: every comparison, the first seam that departs, the verdict; as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .compare import Comparison, Verdict

GROUPS = ("grad.", "grad_norm.", "after.")
"""Seams with one line a parameter; the table shows a line for all of them, and names those that depart."""


@dataclass(frozen=True)
class NotCompared:
    """A seam that the reference holds and the report could not judge, and why."""

    run: str
    seam: str
    reason: str


@dataclass(frozen=True)
class ParityReport:
    """What `check_parity` found. Comparisons are in forward order: by seam within a run, runs as the reference has
    them."""

    model: Path
    reference: Path
    family: str
    source: Mapping[str, Any]
    dtypes: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    not_compared: tuple[NotCompared, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def departures(self) -> tuple[Comparison, ...]:
        """What departs, earliest seam first."""
        place = {seam: i for i, seam in enumerate(self.order)}
        failed = [c for c in self.comparisons if not c.verdict.passes]
        return tuple(sorted(failed, key=lambda c: place.get(c.seam, len(place))))

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and not self.departures

    @property
    def first_departure(self) -> Comparison | None:
        """The earliest seam, in forward order, at which the native model departs."""
        return next(iter(self.departures), None)

    @property
    def verdict(self) -> str:
        """One sentence."""
        runs = len({c.run for c in self.comparisons})
        first = self.first_departure
        if first is None:
            seams = len({(c.run, c.seam) for c in self.comparisons})
            return f"same model: {seams} seams of {runs} runs agree within the noise of arithmetic"
        return f"departs from the original, first at {first.seam} (run {first.run}, {first.dtype}){_why(first)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: everything that the table is made of."""
        first = self.first_departure
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "first_departure": None if first is None else {"run": first.run, "seam": first.seam, "dtype": first.dtype},
            "model": self.model.name,
            "reference": self.reference.name,
            "family": self.family,
            "source": dict(self.source),
            "dtypes": list(self.dtypes),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "comparisons": [
                {
                    **asdict(c),
                    "verdict": c.verdict.value,
                    "relative": c.relative,
                    "relative_allowed": c.relative_allowed,
                }
                for c in self.comparisons
            ],
            "not_compared": [asdict(each) for each in self.not_compared],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def render(report: ParityReport, console: Console) -> None:
    """Print the report: one line a seam and pair of dtypes, the worst of all runs, then what was left out and the
    verdict."""
    source = ", ".join(str(report.source[key]) for key in ("project", "commit") if key in report.source)
    console.print(
        Text(f"{report.model} · {report.family} · against {report.reference}" + (f" ({source})" if source else ""))
    )
    console.print(_table(report))
    if report.not_compared:
        console.print(_left_out(report.not_compared))
    for note in report.notes:
        console.print(Text(note))
    for departure in report.departures[1:6]:
        console.print(Text(f"departs  {departure.seam} (run {departure.run}, {departure.dtype}){_why(departure)}"))
    if len(report.departures) > 6:
        console.print(Text(f"         … and {len(report.departures) - 6} more"))
    console.print(Text(report.verdict, style="bold green" if report.passed else "bold red"))


def _table(report: ParityReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("seam", no_wrap=True)
    table.add_column("runs", justify="right")
    table.add_column("native / original", no_wrap=True)
    for title in ("largest", "mean", "scale", "relative", "allowed", "agree"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for seam, rows in _grouped(report):
        worst = max(rows, key=_badness)
        agreements = [row.agreement for row in rows if row.agreement is not None]
        table.add_row(
            seam,
            str(len({row.run for row in rows})),
            f"{worst.dtype} / {worst.against}",
            _number(worst.largest),
            _number(worst.mean),
            _number(worst.scale),
            _number(worst.relative),
            _number(worst.relative_allowed),
            f"{min(agreements):.2%}" if agreements else "",
            Text(worst.verdict.value, style="" if worst.verdict.passes else "bold red"),
        )
    return table


def _grouped(report: ParityReport) -> list[tuple[str, list[Comparison]]]:
    """Comparisons by line of the table, in forward order."""
    place = {seam: i for i, seam in enumerate(report.order)}
    lines: dict[tuple[str, str, str], list[Comparison]] = {}
    for comparison in sorted(report.comparisons, key=lambda c: place.get(c.seam, len(place))):
        name = next((prefix + "*" for prefix in GROUPS if comparison.seam.startswith(prefix)), comparison.seam)
        lines.setdefault((name, comparison.dtype, comparison.against), []).append(comparison)
    labelled = []
    for (name, _, _), rows in lines.items():
        count = len({row.seam for row in rows})
        labelled.append((f"{name} ({count})" if name.endswith("*") else name, rows))
    return labelled


def _badness(comparison: Comparison) -> tuple[bool, float]:
    if comparison.largest is None or not comparison.allowed:
        return not comparison.verdict.passes, comparison.largest or 0.0
    return not comparison.verdict.passes, comparison.largest / comparison.allowed


def _left_out(not_compared: Sequence[NotCompared]) -> Text:
    reasons: dict[str, set[str]] = {}
    for each in not_compared:
        reasons.setdefault(each.reason, set()).add(each.seam)
    lines = []
    for reason, seams in reasons.items():
        names = sorted(seams)
        lines.append(
            f"not compared: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''} ({reason})"
        )
    return Text("\n".join(lines), style="yellow")


def _why(comparison: Comparison) -> str:
    if comparison.note:
        return f": {comparison.note}"
    if comparison.largest is not None and comparison.allowed is not None:
        return f": error {comparison.largest:.1e}, allowed {comparison.allowed:.1e}"
    return f": {comparison.agreement:.2%} of the ids are equal" if comparison.agreement is not None else ""


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


__all__ = ["NotCompared", "ParityReport", "Verdict", "render"]
