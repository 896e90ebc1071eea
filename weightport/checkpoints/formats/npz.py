"""NumPy's .npz: a zip of .npy members, as big_vision and other JAX projects save parameters."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from math import prod
from typing import Any

import numpy as np

from weightport.checkpoints.dtypes import NUMPY_TYPES
from weightport.checkpoints.formats.zip_archive import Member, member_span, read_directory, read_member
from weightport.checkpoints.inflating import inflate, inflated
from weightport.checkpoints.layout import Layout, Source, StoredTensor
from weightport.checkpoints.naming import tensor_name
from weightport.checkpoints.pickle.numpy_arrays import require_unicode
from weightport.checkpoints.pickle.records import Record
from weightport.checkpoints.shown import shown
from weightport.checkpoints.source_file import SourceFile
from weightport.checkpoints.types import Checkpoint, TensorRef
from weightport.errors import CheckpointError

# Headers of plain arrays take 128 bytes, and numpy itself reads none of more than 10,000 characters.
_MAX_HEADER = 10_000 + 16
_TEXT_LIMIT = 1 << 16
# What numpy's header reader (a tokenizer, then ast.literal_eval) lets through.
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    IndexError,
    SyntaxError,
    OverflowError,
    RecursionError,
    MemoryError,
    SystemError,
    tokenize.TokenError,
)


def open_npz(file: SourceFile, members: dict[str, Member] | None = None) -> Checkpoint:
    """The checkpoint in an .npz file. Names stay as they are, slashes and all; only directory and headers are read.

    Two-byte void (`|V2`) is bfloat16. Arrays of text stand in `document` as lists, those of pickled objects as
    Records: they are not read. Raises CheckpointError for a member that is no array.
    """
    members = read_directory(file) if members is None else members
    document: dict[str, Any] = {}
    for member in members.values():
        name = _named(file, member)
        if name in document:
            raise CheckpointError(f"{file.path}: holds two arrays named {shown(name)}.")
        try:
            document[name] = _array(file, member, name)
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{file.path}: ")
            raise CheckpointError(f"{file.path}: {shown(name)}: {reason}") from error
    tensors = {name: value for name, value in document.items() if isinstance(value, TensorRef)}
    return Checkpoint(file.path, "npz", (file.path,), tensors, document, {file.path: file.state})


def _named(file: SourceFile, member: Member) -> str:
    try:
        return tensor_name(member.name.removesuffix(".npy"))
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


def _array(file: SourceFile, member: Member, name: str) -> Any:
    if not member.stored and not member.deflated:
        raise CheckpointError(f"is compressed by method {member.method}; known are 0 (stored) and 8 (deflate).")
    length = min(member.size, _MAX_HEADER)
    start = file.read(member.start, length, "its header") if member.stored else inflate(file, member, length)
    shape, fortran, kind, skip = _header(start)
    if kind.kind in "OUS" or kind.fields or kind.subdtype:
        return _not_a_tensor(file, member, skip, shape, kind)
    element = NUMPY_TYPES.get((kind.kind, kind.itemsize))
    if element is None:
        raise CheckpointError(f"has the type {kind.str}, which has no equal in torch.")
    layout = Layout.contiguous(element, shape, fortran=fortran)
    if layout.count * element.itemsize != member.size - skip:
        raise CheckpointError(
            f"has shape {shown(shape)} and type {kind.str}, which take {layout.count * element.itemsize} bytes, but "
            f"holds {member.size - skip}."
        )
    big_endian = kind.byteorder == ">"
    source: Source = inflated(file, member, skip, big_endian=big_endian)
    if member.stored:
        source = member_span(file, member, skip=skip, big_endian=big_endian)
    return TensorRef(name, shape, element, StoredTensor(layout, source), (str(file.path), name, 0, layout.stride))


def _header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, Fortran order, type and length of the .npy header that `start` begins with."""
    stream = io.BytesIO(start)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version, magic = np.lib.format.read_magic(stream), stream.tell()
        if version not in readers:
            raise CheckpointError(f"is of .npy version {version}; known are {sorted(readers)}.")
        stream = io.BytesIO(_as_python3(start, magic))
        shape, fortran, kind = readers[version](stream)
    except _HEADER_ERRORS as error:
        raise CheckpointError(f"has a malformed .npy header ({shown(str(error))}).") from error
    if not all(type(size) is int for size in shape):
        raise CheckpointError(f"has the shape {shown(shape)}.")
    return shape, bool(fortran), kind, magic + stream.tell()


def _as_python3(start: bytes, magic: int) -> bytes:
    """What follows the `magic` bytes, with a header that is one literal. Of others numpy tries whether Python 2 wrote
    them, which takes the square of their length: seconds for 2,000 characters."""
    begin = magic + (4 if start[6:7] == b"\x02" else 2)
    end = begin + int.from_bytes(start[magic:begin], "little")
    if len(start) < end:
        return start[magic:]
    header = re.sub(rb"(?<=\d)L(?=\s*[,)])", b" ", start[begin:end])
    ast.literal_eval(header.decode("latin-1"))
    return start[magic:begin] + header + start[end:]


def _not_a_tensor(file: SourceFile, member: Member, skip: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> Any:
    """Text as nested lists, if there is little of it; else a Record that says what was not read."""
    unread = Record("numpy.ndarray", (shape, kind.str))
    if kind.kind not in "US" or not kind.itemsize or member.size > _TEXT_LIMIT:
        return unread
    data = inflate(file, member) if member.deflated else read_member(file, member)
    if len(data) - skip != kind.itemsize * prod(shape):
        raise CheckpointError(f"has shape {shown(shape)} and type {kind.str}, but holds {len(data) - skip} bytes.")
    require_unicode(data[skip:], kind)
    return np.frombuffer(data[skip:], kind).reshape(shape).tolist()
