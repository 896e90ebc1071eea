"""Reading a sentencepiece model file (.model), without the sentencepiece package or protobuf.

The file is one protocol-buffers message, ModelProto of sentencepiece_model.proto (google/sentencepiece). Only what
decides a text's ids is read: the pieces, and the settings of the trainer and the normalizer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from weightport.errors import VocabularyError

_LARGEST = 64 << 20
"""Bytes of a model file; Gemma's, of 256000 pieces, has 4.2 MB."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class PieceType(IntEnum):
    """What a piece is for: sentencepiece's own numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    """How text is cut into pieces: sentencepiece's own numbers."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary. Among normal pieces, the one of the highest score is merged first."""

    text: str
    score: float
    type: PieceType = PieceType.NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """A vocabulary, its pieces by id. `dummy_prefix`: a space is put before every text; `trims`: runs of spaces
    become one; `maps_characters`: text is normalized by a table of its own (NFKC, say)."""

    source: str
    pieces: tuple[Piece, ...] = field(repr=False)
    algorithm: Algorithm
    byte_fallback: bool
    dummy_prefix: bool
    trims: bool
    maps_characters: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in a .model file. Raises VocabularyError for what is none, or malformed."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _LARGEST else b""
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}.") from error
    if not data:
        raise VocabularyError(f"{path} has {size} bytes; a sentencepiece model has some, and at most {_LARGEST}.")
    try:
        return _model(path, data)
    except (ValueError, IndexError, struct.error) as error:
        raise VocabularyError(
            f"{path} is not a sentencepiece model, or is damaged ({error}). Expected the .model file as it was "
            "published; a Git LFS pointer or a web page in its place is fetched again."
        ) from error


def _model(path: Path, data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int] = {}
    normalizer: dict[int, int] = {}
    mapped = False
    for number, kind, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(kind, value)))
        elif number == 2:
            trainer |= {at: each for at, _, each in _fields(_message(kind, value)) if isinstance(each, int)}
        elif number == 3:
            for at, inner, each in _fields(_message(kind, value)):
                if isinstance(each, int):
                    normalizer[at] = each
                elif at == 2 and inner == _BYTES:
                    mapped = bool(each)
    if not pieces:
        raise ValueError("it holds no pieces")
    return SentencePieceModel(
        str(path),
        tuple(pieces),
        algorithm=Algorithm(trainer.get(3, Algorithm.UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        dummy_prefix=bool(normalizer.get(3, 1)),
        trims=bool(normalizer.get(4, 1)),
        maps_characters=mapped,
    )


_PIECE_FIELDS = {1: _BYTES, 2: _FIXED32, 3: _VARINT}
"""Wire types of a piece's text, score and type."""


def _piece(data: bytes) -> Piece:
    found: dict[int, int | bytes] = {}
    for number, wire, value in _fields(data):
        if _PIECE_FIELDS.get(number, wire) != wire:
            raise ValueError(f"field {number} of a piece has the wire type {wire}")
        found[number] = value
    text, score, kind = found.get(1, b""), found.get(2, b"\0\0\0\0"), found.get(3, PieceType.NORMAL)
    if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
        raise ValueError("a piece is malformed")
    return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], PieceType(kind))


def _message(kind: int, value: int | bytes) -> bytes:
    if kind != _BYTES or not isinstance(value, bytes):
        raise ValueError("a number stands where a message should")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(number, wire type, value) of a message's fields: numbers as int, everything else as its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, kind, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of wire type {kind}")
        if at + length > len(data):
            raise ValueError("it ends in the middle of a field")
        yield key >> 3, kind, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number at `at`, the place behind it)."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
