"""RUN/report.html: what a fine-tuning run did, as one page without script or network, for a desk and for a phone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from weightport.finetuning.display.gallery import gallery
from weightport.finetuning.display.progress import TIMINGS
from weightport.finetuning.display.report_style import STYLE
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics import headline
from weightport.formatting import count
from weightport.reports.curves import Curve, chart, curve, figure, legend, text
from weightport.reports.page import bullets, document, section
from weightport.writing import own_file

HEADLINE = 6
"""Metrics shown large at most; the curves show all of them."""

ROW = 6
"""Large figures in a row at most, on a wide screen."""

SMALL = 140
"""Pixels of height of the small charts."""


@dataclass(frozen=True)
class RunSummary:
    """All that the report shows; nothing else, and no clock, enters it.

    `settings`: the resolved recipe, nested as in its file. `trainable`: (module group, trainable parameters, all
    parameters). `history`: Trainer's log_history. `metrics`: those of the model that was saved, with or without
    Trainer's "eval_"; `measured_at` is its step. `pictures`: by Prediction.index, decoded. `notes`: warnings, skipped
    samples, what the published guide does wrong.
    """

    title: str
    command: str
    settings: Mapping[str, Any]
    trainable: Sequence[tuple[str, int, int]]
    history: Sequence[Mapping[str, float]]
    metrics: Mapping[str, float]
    predictions: Sequence[Prediction]
    pictures: Mapping[int, Image.Image]
    notes: Sequence[str]
    measured_at: int | None = None


def write_report(path: Path, summary: RunSummary) -> None:
    """Write the page to `path`, replacing an earlier one in a single step. Raises OutputError."""
    # Made before the file is touched: a page that cannot be made leaves the earlier one.
    page = report_page(summary).encode("utf-8")
    with own_file(Path(path)) as work:
        work.write_bytes(page)


def report_page(summary: RunSummary) -> str:
    """The whole page, as text. The same summary gives the same page."""
    title = text(summary.title)
    losses = [curve(summary.history, "loss", "training loss"), curve(summary.history, "eval_loss", "evaluation loss")]
    sections = (
        _headline(summary),
        _notes(summary.notes),
        section("Loss", _loss(losses)),
        section("Metrics", _charts(_metrics(summary.history)) + _details(summary.metrics)),
        section("Optimization", _charts(_optimization(summary.history))),
        section("Samples", gallery(summary.predictions, summary.pictures)),
        section("Trainable parameters", _trainable(summary.trainable)),
        section("Settings", _settings(summary.settings)),
    )
    command = f'<p class="command"><code>{text(summary.command)}</code></p>\n' if summary.command else ""
    footer = "Made by weightport. Point at a curve to read its figures."
    return document(title, STYLE, command + "".join(sections), footer)


def _headline(summary: RunSummary) -> str:
    """Metrics first, then losses, then what they cost."""
    steps, epochs, seconds = (_latest(summary.history, key) for key in ("step", "epoch", "train_runtime"))
    at = summary.measured_at
    where = "" if at is None or at == steps else f", at step {figure(at)}"
    cards = [
        _card(figure(value), f"{name}{where}", "measured")
        for name, value in headline(_plain_metrics(summary.metrics)).items()
        if name != "loss"
    ][:HEADLINE]
    trained = curve(summary.history, "loss")
    if trained.points:
        last = trained.last
        cards.append(_card(figure(last.value), "training loss, last logged", "plain" if last.finite else "bad"))
    evaluated = [point for point in curve(summary.history, "eval_loss").points if point.finite]
    if evaluated:
        best = min(evaluated, key=lambda point: point.value)
        cards.append(_card(figure(best.value), f"evaluation loss, lowest, at step {figure(best.step)}"))
    if steps is not None:
        cards.append(_card(figure(steps), f"steps, {epochs:.4g} epochs" if epochs is not None else "steps"))
    if seconds is not None and 0 <= seconds < 1e9:
        cards.append(_card(duration(seconds), "training time"))
    rate = _latest(summary.history, "train_samples_per_second")
    if rate is not None:
        cards.append(_card(figure(rate), "samples a second"))
    learned, every = sum(row[1] for row in summary.trainable), sum(row[2] for row in summary.trainable)
    if every:
        cards.append(_card(_percent(learned, every), f"of {count(every)} parameters trained"))
    # As many columns as leave the rows even.
    columns = math.ceil(len(cards) / math.ceil(len(cards) / ROW)) if cards else 0
    return f'<ul class="headline" style="--columns: {columns}">{"".join(cards)}</ul>\n' if cards else ""


def duration(seconds: float) -> str:
    """3 h 12 min · 20 min 34 s · 7.3 s: the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _card(value: str, label: str, style: str = "plain") -> str:
    return f'<li class="{style}"><strong>{text(value)}</strong><span>{text(label)}</span></li>'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<section class="notes">\n<h2>Notes</h2>\n{bullets(map(text, notes))}\n</section>\n'


def _loss(losses: Sequence[Curve]) -> str:
    drawn = chart(losses, label="Loss over optimizer steps", height=260, smooth=True)
    if not drawn:
        return '<p class="soft">No loss was logged.</p>'
    smooth = any(each.smoothed() for each in losses)
    note = '<p class="soft">Thin: as logged. Bold: the mean of neighbouring steps.</p>\n' if smooth else ""
    return f"{note}<figure>{drawn}{legend(losses)}</figure>"


def _charts(curves: Sequence[Curve]) -> str:
    figures = (
        f'<figure><figcaption><span>{text(each.name)}</span><span class="soft">last {figure(each.last.value)}</span>'
        f"</figcaption>{chart([each], label=f'{each.name} over optimizer steps', height=SMALL)}</figure>"
        for each in curves
        if each.points
    )
    drawn = "".join(figures)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _metrics(history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    names = dict.fromkeys(name for entry in history for name in entry if name.startswith("eval_"))
    wanted = headline(_plain_metrics(dict.fromkeys(names, 0.0)))
    return [curve(history, f"eval_{name}", name) for name in wanted if name != "loss"]


def _details(metrics: Mapping[str, float]) -> str:
    """What metrics give beside their own figure, folded away."""
    plain = _plain_metrics(metrics)
    rows = "".join(
        f"<dt>{text(name)}</dt><dd>{text(figure(value))}</dd>"
        for name, value in plain.items()
        if name not in headline(plain)
    )
    return f"<details><summary>Further figures</summary><dl>{rows}</dl></details>" if rows else ""


def _optimization(history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    return [curve(history, "learning_rate", "learning rate"), curve(history, "grad_norm", "gradient norm")]


def _plain_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without Trainer's "eval_", and without what it says about speed and place."""
    named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {
        name: value
        for name, value in named.items()
        if not name.endswith(TIMINGS) and name not in ("epoch", "step") and isinstance(value, (int, float))
    }


def _latest(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [entry[key] for entry in history if isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])]
    return found[-1] if found else None


def _trainable(rows: Iterable[tuple[str, int, int]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    total = ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))
    heads = "".join(f"<th>{head}</th>" for head in ("module", "trainable", "parameters", "share", ""))
    return (
        f'<table class="parts"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(map(_part, rows))}</tbody><tfoot>{_part(total)}</tfoot></table>"
    )


def _part(row: tuple[str, int, int]) -> str:
    name, learned, every = row
    share = _percent(learned, every)
    bar = 100 * learned / every if every else 0.0
    return (
        f'<tr><td class="seam-name">{text(name)}</td><td class="figure">{learned:,}</td>'
        f'<td class="figure">{every:,}</td><td class="figure">{share}</td>'
        f'<td><span class="share"><i style="width:{bar:.2f}%"></i></span></td></tr>'
    )


def _percent(part: int, whole: int) -> str:
    """100 % and 0 % are said of all and of nothing alone."""
    if not whole or part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 0.01), 99.99):.2f} %"


def _settings(settings: Mapping[str, Any]) -> str:
    """A list for each group of the recipe, single values first."""
    single = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    named = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    drawn = "".join(_group(name, group) for name, group in {"": single, **named}.items() if group)
    return f'<div class="settings">{drawn}</div>' if drawn else ""


def _group(name: str, settings: Mapping[str, Any]) -> str:
    title = f"<h3>{text(name)}</h3>" if name else ""
    rows = "".join(f"<dt>{text(key)}</dt><dd>{text(_plain(value))}</dd>" for key, value in _flat(settings))
    return f"<div>{title}<dl>{rows}</dl></div>"


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Deeper groups with dotted names, as `--set` writes them."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _plain(value: Any) -> str:
    """As YAML has it on one line; small numbers as people write learning rates."""
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, (bool, dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
