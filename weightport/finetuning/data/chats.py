"""Chats: `messages` with roles and contents, and LLaVA's `conversations`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weightport.errors import DataError
from weightport.finetuning.data.columns import kind_of, shown, text_of

CHATS = ("messages", "conversations")
"""Columns that hold a chat."""

KEYS = (("role", "content"), ("from", "value"))
"""What a message calls its role and its text: as OpenAI's API and most trainers, and as LLaVA and ShareGPT."""

QUESTION, ANSWER, SYSTEM = "question", "answer", "system"
ROLES = {
    "user": QUESTION,
    "human": QUESTION,
    "assistant": ANSWER,
    "gpt": ANSWER,
    "model": ANSWER,
    "system": SYSTEM,
}
NOT_LEARNED = {"weight": 0, "loss": False, "training": False, "train": False}
"""What marks an answer that is context alone: OpenAI's, ms-swift's, and axolotl's ways."""

PLACE = "<image>"
"""What stands for the picture in a text."""

IMAGE_KEYS = ("image", "path", "url", "image_url")


@dataclass(frozen=True)
class Turn:
    """A question and its answer, which is `learned` or only read."""

    question: str
    answer: str
    learned: bool


@dataclass(frozen=True)
class Chat:
    """The turns of a chat. images: names of pictures in its messages. places: how many stand for a picture."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    places: int

    def history(self, number: int) -> tuple[tuple[str, str], ...]:
        """Questions and answers before the turn `number`."""
        return tuple((turn.question, turn.answer) for turn in self.turns[:number])


@dataclass(frozen=True)
class _Message:
    kind: str
    text: str
    images: tuple[str, ...]
    places: int
    learned: bool


def read_chat(found: Any, place: str, *, drop_system: bool = False) -> Chat:
    """The chat in a cell. Raises DataError, naming the message, for roles that do not alternate between question and
    answer, for a system message unless they are dropped, and for pictures in the middle of a chat."""
    if not isinstance(found, list) or not found:
        raise DataError(
            f"{place}: a list of messages was expected, found {kind_of(found) if found != [] else 'none'}."
        )
    messages = [_message(each, f"{place}, message {number}") for number, each in enumerate(found, 1)]
    first = 1 if messages[0].kind == SYSTEM else 0
    if first and messages[0].text.strip() and not drop_system:
        raise DataError(
            f"{place}, message 1: a system message, which no prompt here holds. Leave system messages out with "
            "data.drop_system=true, and write what matters in them into batch.prompt."
        )
    for number, message in enumerate(messages[first:]):
        where = f"{place}, message {first + number + 1}"
        expected = (QUESTION, ANSWER)[number % 2]
        if message.kind != expected:
            raise DataError(f"{where}: the role of a{'n' * (expected == ANSWER)} {expected} was expected, found that "
                            f"of a{'n' * (message.kind == ANSWER)} {message.kind}.")  # fmt: skip
        if message.places and number:
            raise DataError(f"{where}: a picture in the middle of a chat. One before the first question was expected.")
        if expected == ANSWER and not message.text.strip():
            raise DataError(f"{where}: an empty answer: there is nothing to learn.")
    if (len(messages) - first) % 2 or len(messages) == first:
        raise DataError(f"{place}: the chat ends with a question. An answer to it was expected.")
    pairs = zip(messages[first::2], messages[first + 1 :: 2])
    opening = messages[first]
    turns = tuple(Turn(question.text, answer.text, answer.learned) for question, answer in pairs)
    if not any(turn.learned for turn in turns):
        raise DataError(f"{place}: no answer of this chat is to be learned ({', '.join(NOT_LEARNED)}).")
    return Chat(turns, opening.images, opening.places)


def _message(found: Any, place: str) -> _Message:
    if not isinstance(found, dict):
        raise DataError(f"{place}: an object with role and content was expected, found {kind_of(found)}.")
    names = next((keys for keys in KEYS if keys[0] in found), None)
    if names is None:
        raise DataError(f"{place}: no role. Found: {', '.join(map(shown, found)) or 'nothing'}.")
    role, content = found[names[0]], found.get(names[1])
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{place}: the role {role!r:.40} is not known. Expected: {', '.join(ROLES)}.")
    texts: list[str] = []
    images: list[str] = []
    places = 0
    for part in _parts(content, names[1], place):
        if isinstance(part, str):
            count = part.count(PLACE) if ROLES[role] == QUESTION else 0
            places += count
            texts.append(part.replace(PLACE, "").strip() if count else part)
        else:
            places += 1
            images += [part["name"]] if part["name"] else []
    if places > 1:
        raise DataError(f"{place}: {places} pictures. One a sample was expected.")
    learned = not any(name in found and found[name] == value for name, value in NOT_LEARNED.items())
    return _Message(ROLES[role], "".join(texts), tuple(images), places, learned)


def _parts(content: Any, column: str, place: str) -> Iterator[str | Mapping[str, str | None]]:
    """The texts of a message's content, and its pictures as {"name": …}."""
    if not isinstance(content, list):
        yield text_of(content, column, place)
        return
    for part in content:
        if isinstance(part, str):
            yield text_of(part, column, place)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            yield text_of(part.get("text"), "text", place)
        elif kind in ("image", "image_url"):
            value = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
            value = value.get("url") if isinstance(value, dict) else value
            yield {"name": None if value is None else text_of(value, kind, place)}
        else:
            raise DataError(f"{place}: a part of the type {kind!r:.40}. Expected: text, image, image_url.")
