"""Samples in the run's report: the picture with its boxes, what was asked, said and wanted, differences marked."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from io import BytesIO

from PIL import Image

from weightport.finetuning.data.samples import Objects
from weightport.finetuning.display.previews import described, spread
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.reports.curves import text

SHOWN = 48
"""Samples on a page at most."""

THUMBNAIL = 320
"""Pixels of the longer side of a shown picture."""

JPEG_QUALITY = 82

COMPARED = 2_000
"""Characters: what is longer is shown whole, without marks (comparing takes quadratic time)."""

REFERENCES = 5
"""References of a sample that are shown and compared at most."""

ALIKE = 0.3
"""Below this ratio (difflib: twice the common pieces over all) two texts have nothing in common worth marking."""

# Chinese, Japanese and Korean characters stand for themselves; elsewhere a word is the piece that differs.
_CJK = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_PIECES = re.compile(rf"[{_CJK}]|\s+|[^\W{_CJK}]+|.")


def gallery(predictions: Sequence[Prediction], pictures: Mapping[int, Image.Image]) -> str:
    """Cards of the samples, those with a picture before all others; empty without predictions."""
    if not predictions:
        return ""
    chosen = predictions if len(predictions) <= SHOWN else [each for each in predictions if each.index in pictures]
    shown = spread(chosen or predictions, SHOWN)
    note = f"{len(shown):,} of {len(predictions):,} samples. " if len(shown) < len(predictions) else ""
    boxes = any(each.found is not None or each.expected is not None for each in shown)
    legend = (
        '<ul class="legend"><li><span class="swatch expected"></span>reference box</li>'
        '<li><span class="swatch found"></span>the model\'s box</li></ul>'
    )
    cards = "".join(_card(each, pictures.get(each.index)) for each in shown)
    return (
        f'<p class="soft">{note}References are the right answers of the data, not output of the model. What an answer '
        "and the nearest reference do not share is <mark>marked</mark>.</p>\n"
        f'{legend if boxes else ""}<div class="gallery">{cards}</div>'
    )


def reduced(picture: Image.Image) -> Image.Image:
    """The picture in RGB with at most THUMBNAIL pixels on the longer side."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


def thumbnail(picture: Image.Image) -> str:
    """A data URI of the reduced picture as JPEG."""
    held = BytesIO()
    reduced(picture).save(held, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode('ascii')}"


def differences(said: str, wanted: str) -> tuple[str, str]:
    """(said, wanted) as HTML, pieces that the other lacks in `mark` elements; unmarked when too long or too unlike."""
    plain = text(said), text(wanted)
    if said == wanted or max(len(said), len(wanted)) > COMPARED:
        return plain
    ours, theirs = _PIECES.findall(said), _PIECES.findall(wanted)
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    if matcher.ratio() < ALIKE:
        return plain
    shown: tuple[list[str], list[str]] = ([], [])
    for kind, start, end, other_start, other_end in matcher.get_opcodes():
        for parts, piece, style in (
            (shown[0], "".join(ours[start:end]), "surplus"),
            (shown[1], "".join(theirs[other_start:other_end]), "missing"),
        ):
            if piece:
                parts.append(text(piece) if kind == "equal" else f'<mark class="{style}">{text(piece)}</mark>')
    return "".join(shown[0]), "".join(shown[1])


def _card(each: Prediction, picture: Image.Image | None) -> str:
    shot = f'<div class="shot">{_image(each, picture)}{_boxes(each)}</div>' if picture is not None else ""
    references = each.references[:REFERENCES]
    answer, wanted = text(each.text), [text(reference) for reference in references]
    if references:
        nearest = _nearest(each.text, references)
        answer, wanted[nearest] = differences(each.text, references[nearest])
    more = len(each.references) - len(references)
    rows = (
        _said("asked", text(each.prompt) if each.prompt else ""),
        _said("model answered", answer or '<span class="soft">nothing</span>'),
        _said("model's boxes", text(described(each.found)) if each.found is not None else ""),
        *(_said("reference" if i == 0 else "or reference", reference) for i, reference in enumerate(wanted)),
        f'<p class="soft">and {more:,} more</p>' if more > 0 else "",
        _said("reference boxes", text(described(each.expected)) if each.expected is not None else ""),
    )
    return (
        f'<article class="sample">{shot}<h3>Sample {each.index}{_judged(each)}</h3>{"".join(rows)}'
        f'<p class="place">{text(each.place)}{f" · {text(each.key)}" if each.key else ""}</p></article>'
    )


def _judged(each: Prediction) -> str:
    """A word where the answer is a reference; a detection's boxes are judged by eye and by AP."""
    if each.expected is not None or not each.references:
        return ""
    if each.text.strip() in {reference.strip() for reference in each.references}:
        return '<span class="right">equals a reference</span>'
    return '<span class="other">differs</span>'


def _said(label: str, shown: str) -> str:
    return f'<span class="said">{label}</span><blockquote>{shown}</blockquote>' if shown else ""


def _image(each: Prediction, picture: Image.Image) -> str:
    return f'<img src="{thumbnail(picture)}" alt="Picture of sample {each.index}, {text(each.key)}">'


def _nearest(said: str, references: Sequence[str]) -> int:
    def alike(i: int) -> float:
        return SequenceMatcher(None, said[:COMPARED], references[i][:COMPARED], autojunk=False).quick_ratio()

    return references.index(said) if said in references else max(range(len(references)), key=alike)


def _boxes(each: Prediction) -> str:
    drawn = [
        shape
        for objects, style in ((each.expected, "expected"), (each.found, "found"))
        if objects is not None
        for shape in _shapes(objects, style)
    ]
    return f'<svg aria-hidden="true">{"".join(drawn)}</svg>' if drawn else ""


def _shapes(objects: Objects, style: str) -> list[str]:
    """Rectangles and labels in percent of the picture, so that they follow its size. No box leaves the picture."""
    width, height = objects.size
    if width <= 0 or height <= 0:
        return []
    shapes = []
    for i, box in enumerate(objects.boxes):
        if not all(math.isfinite(side) for side in box):
            continue
        left, right = (100 * min(max(side / width, 0.0), 1.0) for side in (min(box[0::2]), max(box[0::2])))
        top, bottom = (100 * min(max(side / height, 0.0), 1.0) for side in (min(box[1::2]), max(box[1::2])))
        label = objects.labels[i] if i < len(objects.labels) else ""
        score = f" {objects.scores[i]:.2f}" if objects.scores is not None and i < len(objects.scores) else ""
        said = f"{label}{score}"
        # Expected labels stand at the top of their box, found ones at its bottom: one that is right hides no other.
        at, shift = (top, 14) if style == "expected" else (bottom, -5)
        shapes.append(
            f'<rect class="{style}" x="{left:.2f}%" y="{top:.2f}%" '
            f'width="{right - left:.2f}%" height="{bottom - top:.2f}%"><title>{style}: {text(said)}</title></rect>'
            f'<text class="{style}" x="{left:.2f}%" y="{at:.2f}%" dx="4" dy="{shift}">{text(said)}</text>'
        )
    return shapes
