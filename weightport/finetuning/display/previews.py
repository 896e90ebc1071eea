"""A few answers of the model in the terminal, the same samples after each evaluation, so that one sees them change."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import click
from rich.cells import cell_len, chop_cells, set_cell_size

from weightport.finetuning.data.samples import Objects
from weightport.finetuning.evaluation.predictions import Prediction

WIDEST = 120
"""Cells of a line on a wide terminal: a Chinese character takes two."""

LABEL = 13
"""Cells before a text: two of indent, the longest label and two more."""

ANSWER_LINES = 3
"""A longer answer is cut, as a prompt is after one line."""


def spread(predictions: Iterable[Prediction], count: int) -> list[Prediction]:
    """At most `count` of them, evenly over the data set from its first sample on, in the order of their indexes.

    The choice depends on the indexes alone, so each evaluation of the same data set shows the same samples. A sample
    that was predicted twice, as padding of the last batch among processes, counts once.
    """
    ordered = sorted({each.index: each for each in predictions}.values(), key=lambda each: each.index)
    chosen = min(max(count, 0), len(ordered))
    return [ordered[i * len(ordered) // chosen] for i in range(chosen)]


def preview_lines(predictions: Sequence[Prediction], count: int, *, width: int | None = None) -> list[str]:
    """Prompt, the model's answer, and the data's reference of `count` samples, each line within `width` cells (the
    terminal's by default).

    Line breaks and runs of spaces become one space, and control characters a visible sign: neither a data set nor a
    model can steer the terminal.
    """
    room = max((width or min(shutil.get_terminal_size().columns, WIDEST)) - LABEL, 16)
    lines: list[str] = []
    for each in spread(predictions, count):
        lines.append(_within(f"sample {each.index} · {_plain(each.place)}", room + LABEL))
        lines += _labelled("asked", each.prompt, room, 1)
        lines += _labelled(_said(each), _answer(each), room, ANSWER_LINES)
        lines += _labelled("reference", _reference(each), room, ANSWER_LINES)
    return lines


def show_previews(
    predictions: Sequence[Prediction], count: int, *, write: Callable[[str], object] = click.echo
) -> None:
    """Writes the lines of `preview_lines`, one call of `write` a line."""
    for line in preview_lines(predictions, count):
        write(line)


def described(objects: Objects) -> str:
    """`5 boxes: 3 dog, 2 cat`: what is in a picture in a line, the most frequent first."""
    counted = sorted(Counter(objects.labels).items(), key=lambda item: (-item[1], item[0]))
    boxes = f"{len(objects.boxes)} box{'' if len(objects.boxes) == 1 else 'es'}"
    named = ", ".join(f"{number} {label}" for label, number in counted)
    return f"{boxes}: {named}" if named else boxes


def _answer(each: Prediction) -> str:
    if each.found is not None:
        return described(each.found)
    return each.text


def _said(each: Prediction) -> str:
    """The label of an answer, with a mark where it is one of the references."""
    if each.found is not None or each.text.strip() not in {reference.strip() for reference in each.references}:
        return "model"
    return "model ✓"


def _reference(each: Prediction) -> str:
    if each.expected is not None:
        return described(each.expected)
    others = len(each.references) - 1
    first = each.references[0] if each.references else ""
    return f"{first} (or {others} other{'' if others == 1 else 's'})" if others > 0 else first


def _labelled(label: str, text: str, room: int, most: int) -> list[str]:
    text = _plain(text) or "(nothing)"
    rows = chop_cells(text, room)
    if len(rows) > most:
        rows = [*rows[: most - 1], _within(rows[most - 1] + rows[most], room)]
    return [f"  {name:<{LABEL - 2}}{row.strip()}" for name, row in zip([label, *[""] * len(rows)], rows)]


def _within(text: str, room: int) -> str:
    return text if cell_len(text) <= room else set_cell_size(text, room - 1).rstrip() + "…"


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
