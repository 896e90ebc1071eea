"""The parity report: every comparison, the first seam that departs, the verdict; as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightport.parity.compare import Comparison, Verdict
from weightport.parity.evidence import Evidence
from weightport.parity.localisation import Localisation

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
    localisation: Localisation | None = None
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def departures(self) -> tuple[Comparison, ...]:
        """What departs, earliest seam first."""
        place = {seam: i for i, seam in enumerate(self.order)}
        failed = [c for c in self.comparisons if not c.verdict.passes]
        return tuple(sorted(failed, key=lambda c: place.get(c.seam, len(place))))

    @property
    def passed(self) -> bool:
        """Whether nothing departs; what departs on the way only is told, and does not fail."""
        return bool(self.comparisons) and not self.departures

    @property
    def first_departure(self) -> Comparison | None:
        """The earliest seam, in forward order, at which the native model departs."""
        return next(iter(self.departures), None)

    @property
    def passing(self) -> tuple[Comparison, ...]:
        """What departs on the way and is seen by no later seam, earliest first."""
        place = {seam: i for i, seam in enumerate(self.order)}
        found = [c for c in self.comparisons if c.verdict is Verdict.PASSING]
        return tuple(sorted(found, key=lambda c: place.get(c.seam, len(place))))

    @property
    def verdict(self) -> str:
        """One sentence: what the end of the chain (logits, losses, ids) says, then what was seen on the way."""
        first = self.first_departure
        if first is not None:
            return f"departs from the original, first at {first.seam} (run {first.run}, {first.dtype}){why(first)}"
        runs = len({c.run for c in self.comparisons})
        agree = {(c.run, c.seam) for c in self.comparisons} - {(c.run, c.seam) for c in self.passing}
        said = f"same model: {len(agree)} seams of {runs} runs agree within the noise of arithmetic"
        noisy = {(c.run, c.seam) for c in self.comparisons if c.verdict is Verdict.WITHIN_NOISE}
        if noisy:
            said += f", {len(noisy)} of them within the original's own noise"
        if self.passing:
            named = ", ".join(dict.fromkeys(c.seam for c in self.passing))
            said += f"; {named} departs on the way, and no later seam shows it"
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain data: everything that the table is made of."""
        first = self.first_departure
        return {
            "made_by": f"weightport {self.versions.get('weightport', '')}",
            "passed": self.passed,
            "verdict": self.verdict,
            "first_departure": None if first is None else {"run": first.run, "seam": first.seam, "dtype": first.dtype},
            "localisation": None
            if self.localisation is None
            else {**asdict(self.localisation), "sentence": self.localisation.sentence},
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
                    "relative_own": c.relative_own,
                    "relative_allowed": c.relative_allowed,
                }
                for c in self.comparisons
            ],
            "not_compared": [asdict(each) for each in self.not_compared],
            "evidence": asdict(self.evidence),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def render(report: ParityReport, console: Console) -> None:
    """Print the report: one line a seam and pair of dtypes, the worst of all runs; what was left out; the verdict.

    A narrow console gets fewer columns, and where those are too wide too, the names of seams folded.
    """

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    source = ", ".join(str(report.source[key]) for key in ("project", "commit") if key in report.source)
    say(f"{report.model} · {report.family} · against {report.reference}" + (f" ({source})" if source else ""))
    table = _table(report, COLUMNS)
    if table.width is not None and table.width > console.width:
        table = _table(report, tuple(column for column in COLUMNS if not column.spare), console.width)
    console.print(table, crop=False)
    for line in left_out(report.not_compared):
        say(line, "yellow")
    for note in report.notes:
        say(note)
    for each in report.passing[:5]:
        say(f"departs here only  {each.seam} (run {each.run}, {each.dtype}){why(each)}", "yellow")
    for departure in report.departures[1:6]:
        say(f"departs  {departure.seam} (run {departure.run}, {departure.dtype}){why(departure)}")
    if len(report.departures) > 6:
        say(f"         … and {len(report.departures) - 6} more")
    if report.localisation is not None:
        say(f"starts at  {report.localisation.sentence}")
    say(report.verdict, "bold green" if report.passed else "bold red")


@dataclass(frozen=True)
class Column:
    """A column of the table: what it shows of a line's comparisons and of the worst of them. `spare` ones go first."""

    title: str
    show: Callable[[Sequence[Comparison], Comparison], str]
    spare: bool = False


GAP = 2
NARROWEST = 8
"""Columns that a seam's name has at least."""

STYLES = {Verdict.DEPARTS: "bold red", Verdict.PASSING: "yellow"}
SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}

COLUMNS = (
    Column("runs", lambda rows, worst: str(len({row.run for row in rows})), spare=True),
    Column(
        "native/original",
        lambda rows, worst: f"{SHORT.get(worst.dtype, worst.dtype)}/{SHORT.get(worst.against, worst.against)}",
    ),
    Column("largest", lambda rows, worst: _number(worst.largest)),
    Column("mean", lambda rows, worst: _number(worst.mean), spare=True),
    Column("scale", lambda rows, worst: _number(worst.scale), spare=True),
    Column("relative", lambda rows, worst: _number(worst.relative)),
    Column("own", lambda rows, worst: _number(worst.relative_own), spare=True),
    Column("allowed", lambda rows, worst: _number(worst.relative_allowed)),
    Column("equal", lambda rows, worst: _lowest_agreement(rows)),
    Column("", lambda rows, worst: worst.verdict.value),
)


def _table(report: ParityReport, columns: Sequence[Column], available: int | None = None) -> Table:
    """The table, as wide as its figures need; in fewer `available` columns its names are folded."""
    lines, styles = [("seam", *(column.title for column in columns))], []
    for seam, rows in grouped(report):
        worst = worst_of(rows)
        lines.append((seam, *(column.show(rows, worst) for column in columns)))
        styles.append(STYLES.get(worst.verdict, ""))
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    surplus = sum(widths) + GAP * len(widths) - available if available is not None else 0
    widths[0] = min(widths[0], max(widths[0] - surplus, NARROWEST))
    table = Table(
        box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold", width=sum(widths) + GAP * len(widths)
    )
    for title, width in zip(lines[0], widths):
        figures = title not in ("seam", "")
        # Figures are never cut or folded, names may be.
        table.add_column(
            title, justify="right" if figures else "left", no_wrap=title != "seam", overflow="fold", width=width
        )
    for cells, style in zip(lines[1:], styles):
        table.add_row(*cells, style=style)
    return table


def _lowest_agreement(rows: Sequence[Comparison]) -> str:
    agreements = [row.agreement for row in rows if row.agreement is not None]
    return f"{min(agreements):.2%}" if agreements else ""


def grouped(report: ParityReport) -> list[tuple[str, list[Comparison]]]:
    """Comparisons by line of the table, in forward order."""
    place = {seam: i for i, seam in enumerate(report.order)}
    lines: dict[tuple[str, str, str, str], list[Comparison]] = {}
    for comparison in sorted(report.comparisons, key=lambda c: place.get(c.seam, len(place))):
        name = next((prefix + "*" for prefix in GROUPS if comparison.seam.startswith(prefix)), comparison.seam)
        lines.setdefault((name, comparison.dtype, comparison.against, comparison.attention), []).append(comparison)
    labelled = []
    for (name, _, _, attention), rows in lines.items():
        count = len({row.seam for row in rows})
        label = f"{name} ({count})" if name.endswith("*") else name
        labelled.append((f"{label} · {attention}" if attention else label, rows))
    return labelled


def worst_of(rows: Sequence[Comparison]) -> Comparison:
    """What a line of the table shows: the comparison that departs, or comes closest to."""
    return max(rows, key=_badness)


_GRAVITY = (Verdict.AGREES, Verdict.TIED, Verdict.WITHIN_NOISE, Verdict.PASSING, Verdict.DEPARTS)


def _badness(comparison: Comparison) -> tuple[int, float]:
    gravity = _GRAVITY.index(comparison.verdict)
    if comparison.largest is None or not comparison.allowed:
        return gravity, comparison.largest or 0.0
    return gravity, comparison.largest / comparison.allowed


def left_out(not_compared: Sequence[NotCompared]) -> list[str]:
    reasons: dict[str, set[str]] = {}
    for each in not_compared:
        reasons.setdefault(each.reason, set()).add(each.seam)
    lines = []
    for reason, seams in reasons.items():
        names = sorted(seams)
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        lines.append(f"not compared: {', '.join(names[:6])}{more} ({reason})")
    return lines


def why(comparison: Comparison) -> str:
    if comparison.note:
        return f": {comparison.note}"
    if comparison.largest is not None and comparison.allowed is not None:
        return f": error {comparison.largest:.1e}, allowed {comparison.allowed:.1e}"
    return f": {comparison.agreement:.2%} of the ids are equal" if comparison.agreement is not None else ""


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


__all__ = ["NotCompared", "ParityReport", "Verdict", "render"]
