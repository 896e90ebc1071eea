"""A safetensors file is read as the library wrote it, and one whose header lies is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightport.checkpoints import open_checkpoint
from weightport.errors import CheckpointError

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32",
    "uint16", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
]  # fmt: skip


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None, pad: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(first: int = 0, last: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def test_every_dtype_is_read_as_the_library_wrote_it(tmp_path):
    values = {name: (torch.arange(48, dtype=torch.uint8) % 2).view(getattr(torch, name)) for name in DTYPES}
    values |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 3), "matrix": torch.arange(6).reshape(2, 3)}
    save_file(values, tmp_path / "c.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "c.safetensors")
    assert checkpoint.format == "safetensors"
    assert checkpoint.document == {"metadata": {"format": "pt"}}
    assert set(checkpoint) == set(values)
    for name, expected in values.items():
        found = checkpoint[name].read()
        assert found.dtype == expected.dtype == checkpoint[name].dtype
        assert found.shape == expected.shape == checkpoint[name].shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_tensors_come_in_the_order_of_their_bytes_without_copies(tmp_path):
    path = write(tmp_path / "c", {"b": entry(8, 16), "a": entry(0, 8)}, struct.pack("<4f", 1, 2, 3, 4), pad=7)
    checkpoint = open_checkpoint(path)
    assert list(checkpoint) == ["a", "b"]
    assert checkpoint["b"].read().tolist() == [3.0, 4.0]


@pytest.mark.parametrize("pad", range(8))
def test_a_header_of_any_length_gives_the_right_bytes(tmp_path, pad):
    path = write(
        tmp_path / "c", {"a": entry(0, 8), "b": entry(8, 24, (2,), "F64")}, struct.pack("<2f2d", 1, 2, 3, 4), pad=pad
    )
    assert open_checkpoint(path)["b"].read().tolist() == [3.0, 4.0]
    assert open_checkpoint(path)["a"].read().tolist() == [1.0, 2.0]


ENTRY = json.dumps(entry()).encode()
MALFORMED: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' at bytes 4 to 12 overlaps"),
    "same bytes": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), "'b' at bytes 0 to 8 overlaps"),
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), "'b' at bytes 12 to 20 leaves 4 bytes unused"),
    "hole at the start": ({"a": entry(4, 12)}, bytes(12), "'a' at bytes 4 to 12 leaves 4 bytes unused"),
    "bytes left over": ({"a": entry(0, 8)}, bytes(9), "end at byte 77, but the file has 78"),
    "bytes missing": ({"a": entry(0, 8)}, bytes(7), "end at byte 77, but the file has 76"),
    "shape too large": ({"a": entry(0, 8, (3,))}, bytes(8), "which take 12 bytes, but stands at bytes 0 to 8"),
    "shape too small": ({"a": entry(0, 8, (1,))}, bytes(8), "which take 4 bytes, but stands at bytes 0 to 8"),
    "shape negative": ({"a": entry(0, 8, (-2, -1))}, bytes(8), "that are not whole numbers"),
    "shape of floats": ({"a": entry(0, 8, (2.0,))}, bytes(8), "that are not whole numbers"),
    "shape of truths": ({"a": entry(0, 4, (True,))}, bytes(4), "that are not whole numbers"),
    "shape overflows": ({"a": entry(0, 8, (1 << 62, 1 << 62, 4))}, bytes(8), "must be whole numbers from 0 up"),
    "shape is no list": ({"a": {**entry(), "shape": 2}}, bytes(8), "that are not whole numbers"),
    "offsets reversed": ({"a": entry(8, 0)}, bytes(8), "but stands at bytes 8 to 0"),
    "offsets negative": ({"a": entry(-8, 0)}, bytes(8), "that are not whole numbers"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 8, 8]}}, bytes(8), "that are not whole numbers"),
    "dtype unknown": ({"a": entry(dtype="F7")}, bytes(8), "has dtype 'F7'; known are"),
    "dtype no text": ({"a": entry(dtype=["F32"])}, bytes(8), "has dtype list; known are"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "should have dtype, shape and data_offsets"),
    "field surplus": ({"a": {**entry(), "code": "x"}}, bytes(8), "should have dtype, shape and data_offsets"),
    "entry is no object": ({"a": [1]}, b"", "should have dtype, shape and data_offsets"),
    "metadata is no object": ({"__metadata__": [1]}, b"", "__metadata__ should map text to text"),
    "metadata not text": ({"__metadata__": {"a": 1}}, b"", "__metadata__ should map text to text"),
    "name twice": (b'{"a":%s,"a":%s}' % (ENTRY, ENTRY), bytes(8), "'a' stands twice"),
    "header no object": (b"{]", b"", "Expecting property name"),
    "header cut": (b'{"a":', b"", "Expecting value"),
    "header not UTF-8": (b'{"\xff":1}', b"", "can't decode byte 0xff"),
    "half a surrogate": (b'{"\\ud800":%s}' % ENTRY, bytes(8), "which is not Unicode"),
    "number of too many digits": (b'{"a":' + b"9" * 10_000 + b"}", b"", r"Exceeds the limit \(4300 digits\)"),
    "nested without end": (b'{"a":' + b"[" * 200_000 + b"}", b"", "nests too deep"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_header_that_does_not_fit_the_bytes_is_refused(tmp_path, name):
    header, data, said = MALFORMED[name]
    path = write(tmp_path / "c.safetensors", header, data)
    with pytest.raises(CheckpointError, match=rf"c\.safetensors: .*{said}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (10_000, "header should be 10000 bytes at byte 8, but the file has 77"),
        (100_000_001, "of no known format"),
        (1 << 63, "of no known format"),
    ],
)
def test_a_header_longer_than_the_file_is_refused(tmp_path, length, said):
    path = write(tmp_path / "c.safetensors", {"a": entry()}, bytes(8), length=length)
    with pytest.raises(CheckpointError, match=rf"c\.safetensors: .*{said}"):
        open_checkpoint(path)
