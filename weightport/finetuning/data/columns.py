"""Which column holds the image, which the question, which the answer; and how a value is checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weightport.errors import DataError
from weightport.finetuning.data.settings import DataSettings

# Tried in this order. "question", "answers": DocVQA; "text": image and caption pairs; "file_name": imagefolder's
# metadata.jsonl; "jpg" … "webp", "txt", "cls": WebDataset's.
IMAGE_NAMES = ("image", "img", "file_name", "image_path", "picture", "jpg", "jpeg", "png", "webp", "images")
PREFIX_NAMES = ("prefix", "question", "query", "prompt", "instruction")
SUFFIX_NAMES = ("suffix", "answers", "answer", "captions", "caption", "text", "response", "label", "txt",
                "cls")  # fmt: skip

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Columns:
    """Names of the columns. Without a `prefix` column nothing is asked but what the recipe's prompt says; without an
    `image` column rows are text alone, or their picture is where the format keeps it."""

    image: str | None
    prefix: str | None
    suffix: str

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(name for name in (self.image, self.prefix, self.suffix) if name is not None)


class WrittenNumber(float):
    """A JSON number with a fraction or an exponent, and how it is written: 1.50 is an answer of four characters."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number


def find_columns(found: Sequence[str], settings: DataSettings, place: str, *, needs_image: bool = True) -> Columns:
    """The columns that the settings name, or the known ones; without one of images where none is needed. Raises
    DataError listing the columns found."""
    prefix = _find(found, "prefix", settings.prefix_column, PREFIX_NAMES, place)
    image = _required if needs_image else _find
    return Columns(
        image=image(found, "image", settings.image_column, IMAGE_NAMES, place),
        prefix=prefix,
        suffix=_required(found, "suffix", settings.suffix_column, SUFFIX_NAMES, place),
    )


def find_image_column(found: Sequence[str], settings: DataSettings, place: str) -> str:
    """The column of images alone. Raises DataError listing the columns found."""
    return _required(found, "image", settings.image_column, IMAGE_NAMES, place)


def _find(found: Sequence[str], role: str, given: str | None, known: Sequence[str], place: str) -> str | None:
    if given is None:
        return next((name for name in known if name in found), None)
    if given not in found:
        names = ", ".join(map(shown, found)) or "none"
        raise DataError(f"{place}: no column {given!r} (data.{role}_column). Found: {names}.")
    return given


def _required(found: Sequence[str], role: str, given: str | None, known: Sequence[str], place: str) -> str:
    name = _find(found, role, given, known, place)
    if name is None:
        raise DataError(
            f"{place}: no column for the {role}: looked for {', '.join(known)}; found "
            f"{', '.join(map(shown, found)) or 'none'}. "
            f"Name it with data.{role}_column."
            + (" Rows of text alone are taken with data.text_only=true." if role == "image" else "")
        )
    return name


def parse_object(content: bytes, place: str) -> dict[str, Any]:
    """The JSON object that a line holds. Raises DataError for other encodings, broken JSON and other values."""
    text = decode_text(content, place)
    try:
        found = json.loads(text, parse_float=WrittenNumber)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: broken JSON: {error.msg} (column {error.pos + 1}).") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: broken JSON: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{place}: a JSON object was expected, found {kind_of(found)}.")
    return found


def decode_text(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise DataError(
            f"{place}: not UTF-8 (byte 0x{byte:02x} at position {error.start + 1}). Save the file as UTF-8."
        ) from error


def value_of(row: dict[str, Any], column: str, place: str) -> Any:
    try:
        return row[column]
    except KeyError as error:
        raise DataError(f"{place}: no {column!r}. Found: {', '.join(map(repr, row)) or 'nothing'}.") from error


def question_of(row: dict[str, Any], column: str | None, place: str) -> str:
    """The text of the prefix; it may be empty."""
    return "" if column is None else text_of(value_of(row, column, place), column, place)


def answers_of(row: dict[str, Any], column: str, place: str) -> tuple[str, ...]:
    """All answers of a row, which holds one text or number or a list of them, none of them blank."""
    value = value_of(row, column, place)
    answers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not answers or value is None:
        raise DataError(f"{place}: {column!r} is empty: there is no answer to learn.")
    texts = tuple(text_of(_number_as_text(answer), column, place) for answer in answers)
    if not all(text.strip() for text in texts):
        raise DataError(f"{place}: {column!r} holds an empty text: there is no answer to learn.")
    return texts


def _number_as_text(value: Any) -> Any:
    """A finite number as it is written; everything else as it is."""
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return value


def text_of(value: Any, column: str, place: str) -> str:
    """A text that every tokenizer takes. Raises DataError for anything else."""
    if not isinstance(value, str):
        hint = " Write it as a string that holds JSON." if isinstance(value, dict) else ""
        raise DataError(f"{place}: {column!r} holds {kind_of(value)} where a text was expected.{hint}")
    check_letters(value, column, place)
    return value


def check_letters(value: str, column: str, place: str) -> None:
    """JSON's escapes can write half of a surrogate pair, which no tokenizer and no file system takes."""
    if not value.isascii() and _SURROGATES.search(value):
        raise DataError(f"{place}: {column!r} holds half of a surrogate pair, which is no character.")


def shown(name: object) -> str:
    """A name from a file as a message can hold it: half of a surrogate pair as its escape."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def kind_of(value: Any) -> str:
    """What a JSON value is called."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float):
        return "a number" if math.isfinite(value) else "NaN or infinity"
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
