"""The parity report as one HTML page: no script, no network, light and dark, readable on a phone and from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from weightport.parity.compare import Comparison, Verdict
from weightport.parity.evidence import Evidence, Hypotheses
from weightport.parity.plot import plot
from weightport.parity.report import COLUMNS, ParityReport, grouped, left_out, why, worst_of
from weightport.reports.page import bullets, document, section
from weightport.reports.page_style import STYLE

SAME = '<span class="soft">the same</span>'


def page(report: ParityReport) -> str:
    """The whole page, as text."""
    title = f"{report.model.resolve().name} · parity with {report.source.get('project', report.family)}"
    sections = (
        _verdict(report),
        section("Error by depth", plot(report.comparisons, report.order), _PLOT_NOTE),
        section("Seams", _seams(report)),
        section("Departures", _departures(report)) if report.departures[1:] else "",
        section("Generated", _texts(report.evidence.texts)),
        section("Images", _images(report.evidence)),
        section("Provenance", _facts(_provenance(report))),
        section("Dropped tensors", _dropped(report.evidence)),
        section("Not compared", bullets(map(escape, left_out(report.not_compared)))),
        section("Environment", _facts({**report.evidence.environment, "compared in": ", ".join(report.dtypes)})),
    )
    footer = (
        f"Made by weightport {escape(report.versions.get('weightport', ''))}. Errors are the largest of a seam, in "
        "units of the reference's root mean square there."
    )
    return document(escape(title), STYLE, "".join(sections), footer)


_PLOT_NOTE = (
    "Each point is the largest error at a seam, the worst of all runs, in units of the seam's scale; forward order "
    "from the top. A point to the right of its dashed line departs."
)


def _verdict(report: ParityReport) -> str:
    place = report.localisation
    where = f"<p>Starts at <code>{escape(place.sentence)}</code></p>" if place is not None else ""
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return (
        f'<section class="verdict{"" if report.passed else " bad"}">'
        f"<strong>{'Passed' if report.passed else 'Failed'}: {escape(report.verdict)}</strong>{where}{notes}"
        "</section>\n"
    )


def _seams(report: ParityReport) -> str:
    """One fold a seam, closed where it agrees; the filter hides those."""
    by_seam: dict[str, list[tuple[str, list[Comparison]]]] = {}
    for label, rows in grouped(report):
        by_seam.setdefault(label.partition(" · ")[0], []).append((label, rows))
    folds = [_fold(seam, lines) for seam, lines in by_seam.items()]
    agree = sum('class="seam agrees"' in fold for fold in folds)
    return (
        '<div class="seams"><div class="filter">'
        f'<input type="radio" name="shown" id="shown-all" checked="checked"/><label for="shown-all">all {len(folds)}'
        '</label><input type="radio" name="shown" id="shown-rest"/><label for="shown-rest">'
        f"{len(folds) - agree} that do not simply agree</label></div>{''.join(folds)}</div>"
    )


def _fold(seam: str, lines: list[tuple[str, list[Comparison]]]) -> str:
    worst = worst_of([row for _, rows in lines for row in rows])
    agrees = worst.verdict in (Verdict.AGREES, Verdict.TIED)
    style = "agrees" if agrees else "open" if worst.verdict.passes else "wrong"
    titles = [column.title or "verdict" for column in COLUMNS]
    body = []
    for label, rows in lines:
        line = worst_of(rows)
        cells = "".join(
            f'<td class="figure" data-label="{escape(title)}">{escape(shown)}</td>'
            for title, column in zip(titles, COLUMNS)
            if (shown := column.show(rows, line)) or title != "equal"
        )
        attention = label.partition(" · ")[2]
        body.append(f"<tr>{f'<td>{escape(label)}</td>' if attention else ''}{cells}</tr>")
    part = (worst.largest or 0.0) / worst.allowed if worst.allowed else 0.0
    figures = (
        f"{worst.relative:.1e} of {worst.relative_allowed:.1e}"
        if worst.relative_allowed and worst.relative is not None
        else ""
    )
    bar = f'<span class="bar"><span style="width: {min(part, 1.0):.0%}"></span></span>' if worst.allowed else ""
    opened = "" if agrees else ' open="open"'
    return (
        f'<details class="seam {style}"{opened}><summary><span class="seam-name">{escape(seam)}</span>'
        f'<span class="said">{escape(worst.verdict.value)}</span><span class="soft">{figures}</span>{bar}</summary>'
        f"<table><tbody>{''.join(body)}</tbody></table></details>"
    )


def _departures(report: ParityReport) -> str:
    return bullets(
        f"<code>{escape(each.seam)}</code> in run {escape(each.run)}, {each.dtype}{escape(why(each))}"
        for each in report.departures
    )


def _texts(texts: Iterable[Hypotheses]) -> str:
    rows = [
        f"<tr><td>{escape(each.run)}</td><td>{escape(original)}</td><td>"
        f"{SAME if native == original else escape(native)}</td></tr>"
        for each in texts
        for original, native in zip(each.original, each.native)
    ]
    if not rows:
        return ""
    return (
        '<div class="scroll"><table class="texts"><thead><tr><th>run</th><th>original</th><th>native</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _images(evidence: Evidence) -> str:
    shown = "".join(
        f'<figure><img src="{uri}" alt="Input image of run {escape(run)}">'
        f"<figcaption>{escape(run)}</figcaption></figure>"
        for run, uri in evidence.images
    )
    return f'<div class="images">{shown}</div>' if shown else ""


def _provenance(report: ParityReport) -> dict[str, Any]:
    original = {f"original: {name}": value for name, value in report.source.items()}
    converted = dict(report.evidence.provenance)
    read = {
        str(file.get("name")): f"SHA-256 {file.get('sha256', '')}"
        for source in converted.pop("sources", {}).values()
        for file in source.get("files", ())
    }
    converted.pop("versions", None)
    return {"model": report.model, "reference": report.reference, **original, **converted, **read}


def _dropped(evidence: Evidence) -> str:
    return bullets(
        f"<code>{escape(str(each.get('name')))}</code> {escape(str(each.get('dtype', '')))} "
        f"{escape(str(each.get('shape', '')))}: {escape(str(each.get('because', '')))}"
        for each in evidence.dropped
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(_plain(value))}</dd>" for name, value in facts.items() if value
    )
    return f"<dl>{rows}</dl>" if rows else ""


def _plain(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
