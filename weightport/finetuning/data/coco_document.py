"""The one JSON document of a COCO file, checked, and its annotations, read one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from weightport.errors import DataError
from weightport.finetuning.data.columns import check_letters, decode_text, kind_of, shown
from weightport.finetuning.data.files import PinnedFile

Box = tuple[float, float, float, float]

TOLERANCE = 1.0
"""Pixels by which rounding may move a box over the image's edge; it is cut off there."""

MOST_PIXELS = 2**31 - 1
"""Along a side: JSON writes whole numbers that no array holds."""

_NAMES = {"images": ("id",), "annotations": ("id", "image_id", "category_id"), "categories": ("id", "name")}
"""Which values of a document are texts that messages and answers repeat; names of images are checked one by one."""


@dataclass(frozen=True)
class CocoDocument:
    """`categories`: names by id, in the file's order. `groups`: names that serve as the supercategory of others."""

    place: str
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: dict[Any, str]
    groups: frozenset[str]


def parse_document(file: PinnedFile) -> Any:
    """The JSON value in a file. Raises DataError for other encodings and broken JSON."""
    place = str(file.path)
    text = decode_text(file.read(0, file.size), place).removeprefix("\ufeff")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}, line {error.lineno}: broken JSON: {error.msg} (column {error.colno}).") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: broken JSON: {error}.") from error


def has_captions(parsed: Any) -> bool:
    """Whether a document's annotations are captions, as those of captions_*.json."""
    found = parsed.get("annotations") if isinstance(parsed, dict) else None
    first = found[0] if isinstance(found, list) and found else None
    return isinstance(first, dict) and "caption" in first and "bbox" not in first


def read_coco(parsed: Any, place: str) -> CocoDocument:
    """The document, checked. Raises DataError for what is no COCO detection file."""
    parts = read_parts(parsed, ("images", "annotations", "categories"), place)
    for category in parts["categories"]:
        if not isinstance(category.get("name"), str) or not category["name"].strip():
            raise DataError(f"{place}: the category {category['id']} has no name.")
    groups = [c.get("supercategory") for c in parts["categories"] if c.get("supercategory") != c["name"]]
    return CocoDocument(
        place,
        parts["images"],
        parts["annotations"],
        {category["id"]: category["name"] for category in parts["categories"]},
        frozenset(group for group in groups if isinstance(group, str)),
    )


def read_parts(parsed: Any, names: tuple[str, ...], place: str) -> dict[str, list[dict[str, Any]]]:
    """The lists of objects called `names`, their ids and texts checked."""
    parts = {name: _objects(parsed, name, names, place) for name in names}
    for name in names:
        for position, item in enumerate(parts[name]):
            for key in _NAMES[name]:
                if isinstance(item.get(key), str):
                    check_letters(item[key], key, f"{place}: {name}[{position}]")
        if name != "annotations":
            _check_ids(parts[name], name, place)
    return parts


def _objects(found: Any, name: str, names: tuple[str, ...], place: str) -> list[dict[str, Any]]:
    """The list of objects called `name`."""
    part = found.get(name) if isinstance(found, dict) else None
    if not isinstance(part, list) or not all(isinstance(item, dict) for item in part):
        keys = (
            f"an object with {', '.join(map(shown, list(found)[:10]))}" if isinstance(found, dict) else kind_of(found)
        )
        raise DataError(
            f"{place}: COCO {'detection' if 'categories' in names else 'captions'} JSON is an object with the lists "
            f"{', '.join(names[:-1])} and {names[-1]}; {name} is missing or no list of objects. Found: {keys}."
        )
    return part


def _check_ids(items: list[dict[str, Any]], name: str, place: str) -> None:
    seen = set()
    for position, item in enumerate(items):
        key = item.get("id")
        if not isinstance(key, (int, str)):
            raise DataError(f"{place}: {name}[{position}] has no id.")
        if key in seen:
            raise DataError(f"{place}: {name}[{position}] has the id {key}, which another one has already.")
        seen.add(key)


def read_category(annotation: dict[str, Any], document: CocoDocument, place: str) -> str:
    """The name of an annotation's category."""
    key = annotation.get("category_id")
    if not isinstance(key, (int, str)) or key not in document.categories:
        known = ", ".join(f"{key} {name}" for key, name in list(document.categories.items())[:20])
        raise DataError(f"{place}: the category {key!r} is not among the file's. Found: {known or 'none'}.")
    return document.categories[key]


def read_size(image: dict[str, Any], place: str) -> tuple[int, int]:
    """Width and height of an image in pixels."""
    width, height = image.get("width"), image.get("height")
    sides = (width, height)
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= MOST_PIXELS for side in sides):
        raise DataError(f"{place}: width and height in pixels were expected, found {width!r:.40} and {height!r:.40}.")
    return int(width), int(height)  # type: ignore[arg-type]


def read_box(annotation: dict[str, Any], size: tuple[int, int] | None, place: str) -> Box:
    """COCO's [x, y, width, height] as (x0, y0, x1, y1). Raises DataError for no area, and outside of `size`."""
    found = annotation.get("bbox")
    if not (isinstance(found, list) and len(found) == 4 and all(_is_number(value) for value in found)):
        raise DataError(f"{place}: bbox is {found!r:.80}. Four numbers were expected: x, y, width, height.")
    x, y, width, height = (float(value) for value in found)
    if width <= 0 or height <= 0:
        raise DataError(f"{place}: the box {found} has no area.")
    if size is None:
        return x, y, x + width, y + height
    right, bottom = size
    outside = min(x, y, right - x - width, bottom - y - height) < -TOLERANCE
    box = max(x, 0.0), max(y, 0.0), min(x + width, float(right)), min(y + height, float(bottom))
    if outside or box[0] >= box[2] or box[1] >= box[3]:
        raise DataError(f"{place}: the box {found} leaves the image of {right} x {bottom} pixels.")
    return box


def _is_number(value: object) -> bool:
    # NaN fails both comparisons; a whole number too large for float is compared as it is.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -MOST_PIXELS <= value <= MOST_PIXELS  # type: ignore[operator]
