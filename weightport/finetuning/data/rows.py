"""Normalised rows: what a record of any format becomes, read by columns or as a chat."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from weightport.errors import DataError
from weightport.finetuning.data.chats import CHATS, read_chat
from weightport.finetuning.data.columns import (
    IMAGE_NAMES,
    Columns,
    answers_of,
    find_columns,
    kind_of,
    question_of,
    value_of,
)
from weightport.finetuning.data.settings import DataSettings


@dataclass(frozen=True)
class Row:
    """One thing to learn. `image`: the picture's name as the record has it, None for text alone. `history`: earlier
    (question, answer) pairs of a chat."""

    image: Any
    question: str
    answers: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()


class RowReader(Protocol):
    """The rows of a record; raises DataError, naming `place`, for a record without any."""

    def __call__(self, record: dict[str, Any], place: str) -> Sequence[Row]: ...


@dataclass(frozen=True)
class ColumnRows:
    """A row a record, from its columns. `text_only`: the image may be missing or empty."""

    columns: Columns
    text_only: bool = False

    def __call__(self, record: dict[str, Any], place: str) -> Sequence[Row]:
        columns = self.columns
        image = None
        if columns.image is not None:
            image = record.get(columns.image) if self.text_only else value_of(record, columns.image, place)
        if isinstance(image, list):
            named = _listed(image, str(columns.image), place)
            _require_one(named, place)
            image = named[0] if named else None
        return (
            Row(
                None if self.text_only and image == "" else image,
                question_of(record, columns.prefix, place),
                answers_of(record, columns.suffix, place),
            ),
        )


@dataclass(frozen=True)
class ChatRows:
    """A row for each answer of a chat in the column `messages`. `alone`: without the questions and answers before
    it. `drop_system`: system messages are left out."""

    messages: str
    images: tuple[str, ...]
    alone: bool = False
    needs_image: bool = True
    drop_system: bool = False

    def __call__(self, record: dict[str, Any], place: str) -> Sequence[Row]:
        chat = read_chat(value_of(record, self.messages, place), place, drop_system=self.drop_system)
        named = [name for column in self.images for name in _listed(record.get(column), column, place)]
        named += chat.images
        _require_one(named, place)
        if chat.places and not named and self.needs_image:
            raise DataError(f"{place}: <image> stands for a picture, and none is named.")
        image = named[0] if named else None
        return [
            Row(image, turn.question, (turn.answer,), () if self.alone else chat.history(number))
            for number, turn in enumerate(chat.turns)
            if turn.learned
        ]


def _require_one(named: Sequence[Any], place: str) -> None:
    if len(named) > 1:
        raise DataError(f"{place}: {len(named)} pictures. One a sample was expected.")


def _listed(value: Any, column: str, place: str) -> Sequence[Any]:
    """The names in a cell that holds one, a list of them, or nothing."""
    found = value if isinstance(value, list) else [] if value is None or value == "" else [value]
    names = [each.get("path") if isinstance(each, dict) else each for each in found]
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"{place}: {column!r} holds {kind_of(name)} where the name of an image was expected.")
    return names


def row_reader(found: Collection[str], settings: DataSettings, place: str, *, needs_image: bool = True) -> RowReader:
    """How records with the columns `found` are read. `needs_image`: they name their picture, unless the settings allow
    text alone. Raises DataError listing the columns where one is missing."""
    messages = next((name for name in CHATS if name in found), None)
    asked_for = settings.prefix_column or settings.suffix_column
    if messages is not None and asked_for is None:
        images = (settings.image_column,) if settings.image_column else IMAGE_NAMES
        return ChatRows(messages, images, settings.turns == "alone", needs_image, settings.drop_system)
    columns = find_columns(tuple(found), settings, place, needs_image=needs_image and not settings.text_only)
    return ColumnRows(columns, settings.text_only or not needs_image)
