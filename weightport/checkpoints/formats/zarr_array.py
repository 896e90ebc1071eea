"""One array as tensorstore's zarr driver writes it: a folder with .zarray (zarr version 2) and a file for each chunk.

Read are the arrays that JAX projects save: C order, no filters, chunks stored plainly or compressed with zstd, which
needs the `zstandard` package. Chunks are unpacked front to back and side by side, so that an array of any size and any
chunks costs the memory of a few blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

from weightport.checkpoints.dtypes import ELEMENT_TYPES, NUMPY_TYPES, ElementType
from weightport.checkpoints.formats.sharded import read_json
from weightport.checkpoints.forward_run import ForwardRun
from weightport.checkpoints.layout import Layout, StoredTensor
from weightport.checkpoints.shown import shown
from weightport.checkpoints.source_file import SourceFile
from weightport.checkpoints.types import TensorRef
from weightport.errors import CheckpointError
from weightport.extras import install_command
from weightport.file_state import FileState

METADATA = ".zarray"
_BLOCK_BYTES = 1 << 20
_SKIPPED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class ZarrArray:
    """An array's description, checked: `chunk` is the shape of every chunk, those at the edges padded to it.

    `files` are its metadata and its chunks in row-major order, `states` in which state each was found.
    """

    folder: Path
    shape: tuple[int, ...]
    element: ElementType
    chunk: tuple[int, ...]
    big_endian: bool
    compressed: bool
    separator: str
    files: tuple[Path, ...]
    states: dict[Path, FileState]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.element.itemsize

    def ref(self, name: str) -> TensorRef:
        """The array as a tensor that is called `name`."""
        run = ForwardRun(partial(_blocks, self), self.nbytes, big_endian=self.big_endian)
        layout = Layout.contiguous(self.element, self.shape)
        return TensorRef(name, self.shape, self.element, StoredTensor(layout, run), (str(self.folder), name))

    def chunk_file(self, place: tuple[int, ...]) -> Path:
        """The file of the chunk at this place of the grid."""
        return self.folder / _chunk_name(place, self.separator)


def open_zarr_array(folder: Path) -> ZarrArray:
    """The array in `folder`; no chunk is read. Raises CheckpointError for what is malformed, of another kind, or lacks
    chunks."""
    path = folder / METADATA
    stated = read_json(path)
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path}: should describe an array, but holds {shown(stated, 80)}.")
    shape, chunk = _sizes(path, stated, "shape", 0), _sizes(path, stated, "chunks", 1)
    element, big_endian = _element(path, stated.get("dtype"))
    compressor, separator = stated.get("compressor"), stated.get("dimension_separator", ".")
    wrong = {
        "zarr_format": stated.get("zarr_format") != 2,
        "order": stated.get("order", "C") != "C",
        "filters": bool(stated.get("filters")),
        "compressor": compressor is not None and not (isinstance(compressor, dict) and compressor.get("id") == "zstd"),
        "dimension_separator": separator not in (".", "/"),
    }
    for key in (key for key, differs in wrong.items() if differs):
        raise CheckpointError(
            f"{path}: {key} is {shown(json.dumps(stated.get(key)), 80)}; read are zarr 2 arrays in C order, without "
            "filters, plain or compressed with zstd."
        )
    if len(chunk) != len(shape):
        raise CheckpointError(f"{path}: has the shape {list(shape)}, but chunks of {list(chunk)}.")
    Layout.contiguous(element, shape)
    found = ZarrArray(folder, shape, element, chunk, big_endian, compressor is not None, separator, (), {})
    files = (path, *_chunks(found))
    return replace(found, files=files, states={file: _state(file) for file in files})


def _sizes(path: Path, stated: dict[str, Any], key: str, least: int) -> tuple[int, ...]:
    sizes = stated.get(key)
    if not isinstance(sizes, list) or not all(type(size) is int and least <= size < 1 << 40 for size in sizes):
        raise CheckpointError(f"{path}: {key} should be a list of whole numbers, but is {shown(sizes, 80)}.")
    return tuple(sizes)


def _element(path: Path, name: Any) -> tuple[ElementType, bool]:
    """(element type, whether its bytes are in the other order) of a dtype's name; bfloat16 is tensorstore's own."""
    if name == "bfloat16":
        return ELEMENT_TYPES["bfloat16"], False
    try:
        kind = np.dtype(name) if isinstance(name, str) and len(name) <= 8 else None
    except TypeError:
        kind = None
    element = NUMPY_TYPES.get((kind.kind, kind.itemsize)) if kind is not None and kind.kind != "V" else None
    if kind is None or element is None:
        raise CheckpointError(f"{path}: has the dtype {shown(name, 80)}, which has no equal in torch.")
    return element, kind.byteorder == ">"


def _chunk_name(place: tuple[int, ...], separator: str) -> str:
    return separator.join(map(str, place)) if place else "0"


def _grid(array: ZarrArray) -> tuple[int, ...]:
    return tuple(ceil(size / part) for size, part in zip(array.shape, array.chunk))


def _chunks(array: ZarrArray) -> Iterator[Path]:
    """The chunks' files. Raises CheckpointError where one is not there."""
    grid = _grid(array)
    nested = array.separator == "/" and len(grid) > 1
    present = {
        file.relative_to(array.folder).as_posix()
        for file in (array.folder.rglob("*") if nested else array.folder.iterdir())
    } - {METADATA}
    missing = prod(grid) - len(present)
    if missing <= 0:
        # No more names are made than the folder has entries.
        absent = [name for place in _places(grid) if (name := _chunk_name(place, array.separator)) not in present]
        if not absent:
            return (array.folder / _chunk_name(place, array.separator) for place in _places(grid))
        missing, named = len(absent), f": {shown(tuple(absent[:3]))}"
    else:
        named = ""
    raise CheckpointError(
        f"{array.folder}: lacks {missing} of its {prod(grid)} chunks{named}. The copy is not complete, or the step "
        "was never finished: a trainer writes every chunk, also one of zeros."
    )


def _places(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, grid))


def _state(path: Path) -> FileState:
    try:
        return FileState.of(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error


class _Chunk:
    """One chunk, unpacked from its beginning on."""

    def __init__(self, array: ZarrArray, place: tuple[int, ...]) -> None:
        self.path = array.chunk_file(place)
        self.size, self.at = prod(array.chunk) * array.element.itemsize, 0
        file = SourceFile(self.path)
        array.states[self.path].require_same(file.state, self.path)
        stream = _FileStream(file)
        self._stream: Any = _unpacked(stream) if array.compressed else stream

    def read(self, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from `offset` on, which is not before what was read last. Raises CheckpointError."""
        while self.at < offset:
            self._next(min(offset - self.at, _SKIPPED_AT_ONCE))
        return self._next(nbytes)

    def close(self) -> None:
        """Raises CheckpointError unless the chunk ends where it should."""
        self.read(self.size, 0)
        if self._take(1):
            raise CheckpointError(f"{self.path}: unpacks to more than its {self.size} bytes. It is damaged.")

    def _next(self, nbytes: int) -> bytes:
        found = bytearray()
        while len(found) < nbytes and (part := self._take(nbytes - len(found))):
            found += part
        if len(found) < nbytes:
            raise CheckpointError(
                f"{self.path}: ends at byte {self.at + len(found)} of {self.size}. It is truncated or damaged; fetch "
                "it again."
            )
        self.at += nbytes
        return bytes(found)

    def _take(self, nbytes: int) -> bytes:
        try:
            found: bytes = self._stream.read(nbytes)
        except CheckpointError:
            raise
        except Exception as error:
            if type(error).__name__ != "ZstdError" and not isinstance(error, ValueError):
                raise
            raise CheckpointError(f"{self.path}: cannot be unpacked ({error}). Fetch it again.") from error
        return found


class _FileStream:
    """A file from its beginning on, for a decompressor."""

    def __init__(self, file: SourceFile) -> None:
        self.file, self.at = file, 0

    def read(self, size: int = -1) -> bytes:
        rest = self.file.size - self.at
        found = self.file.read(self.at, rest if size < 0 else min(size, rest), "a chunk")
        self.at += len(found)
        return found


def _unpacked(stream: _FileStream) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise CheckpointError(
            f"{stream.file.path}: is compressed with zstd, which takes the `zstandard` package to read. Install it: "
            f"{install_command('zarr')}"
        ) from error
    source: Any = stream
    return zstandard.ZstdDecompressor().stream_reader(source, read_size=_BLOCK_BYTES)


def _blocks(array: ZarrArray) -> Iterator[bytes]:
    """The array's bytes in row-major order, whatever its chunks are.

    The last axis that is divided decides the runs: each is a piece of one chunk, and the pieces of a chunk come in
    the chunk's own order. Chunks are closed when their last piece was had.
    """
    grid, shape, chunk, width = _grid(array), array.shape, array.chunk, array.element.itemsize
    divided = max((axis for axis, parts in enumerate(grid) if parts > 1), default=0)
    inner, chunk_inner = prod(shape[divided + 1 :]), prod(chunk[divided + 1 :])
    if inner != chunk_inner and shape:
        # A chunk that is wider than the array along an axis that is not divided.
        divided, inner, chunk_inner = len(shape) - 1, 1, 1
    open_chunks: dict[tuple[int, ...], _Chunk] = {}
    gathered: list[bytes] = []
    held = 0
    if not shape:
        only = _Chunk(array, ())
        yield only.read(0, width)
        only.close()
        return
    for outer in product(*map(range, shape[:divided])):
        for part in range(grid[divided]):
            place = (*(index // size for index, size in zip(outer, chunk)), part, *(0,) * (len(shape) - divided - 1))
            one = open_chunks.get(place) or open_chunks.setdefault(place, _Chunk(array, place))
            first = 0
            for index, size in zip(outer, chunk):
                first = first * size + index % size
            first *= chunk[divided] * chunk_inner * width
            length = min(chunk[divided], shape[divided] - part * chunk[divided]) * inner * width
            for at in range(first, first + length, _BLOCK_BYTES):
                gathered.append(one.read(at, min(_BLOCK_BYTES, first + length - at)))
                held += len(gathered[-1])
                if held >= _BLOCK_BYTES:
                    yield b"".join(gathered)
                    gathered, held = [], 0
            if _is_last(outer, chunk, shape):
                open_chunks.pop(place).close()
    if gathered:
        yield b"".join(gathered)


def _is_last(outer: tuple[int, ...], chunk: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a chunk has no index behind `outer`."""
    return all((index + 1) % size == 0 or index + 1 == whole for index, size, whole in zip(outer, chunk, shape))
