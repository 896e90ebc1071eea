"""Arrays of an .npz are read as NumPy wrote them; bfloat16, which NumPy lacks, is recognised."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from weightport.checkpoints import Record, open_checkpoint
from weightport.errors import CheckpointError

NUMPY_TYPES = [
    "b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16", ">f4", ">i8", ">c8",
    ">f2",
]  # fmt: skip


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_type_order_and_shape_is_read_as_numpy_wrote_it(tmp_path, save):
    values = {kind.replace(">", "big"): (np.arange(12) % 2).astype(kind) for kind in NUMPY_TYPES}
    values |= {
        "params/llm/layers/attn": np.arange(24.0, dtype=np.float32).reshape(2, 3, 4),
        "params/fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }
    save(tmp_path / "c.npz", **values)
    checkpoint = open_checkpoint(tmp_path / "c.npz")
    assert checkpoint.format == "npz"
    assert list(checkpoint) == list(values)
    for name, expected in values.items():
        found = checkpoint[name].read()
        assert checkpoint[name].shape == tuple(found.shape) == expected.shape, name
        assert checkpoint[name].dtype == found.dtype
        assert np.array_equal(found.numpy(), expected.astype(expected.dtype.newbyteorder("="))), name


def test_shapes_that_python_2_wrote_are_read(tmp_path):
    data = npy(np.arange(6, dtype=np.int32).reshape(2, 3)).replace(b"(2, 3), }  ", b"(2L, 3L), }")
    found = open_checkpoint(write(tmp_path / "c.npz", {"w.npy": data}))["w"].read()
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_two_byte_void_is_bfloat16(tmp_path, save):
    expected = torch.tensor([[1.0, -2.5], [3e38, 0.1]]).to(torch.bfloat16)
    save(tmp_path / "c.npz", w=expected.view(torch.int16).numpy().view("V2"))
    found = open_checkpoint(tmp_path / "c.npz")["w"].read()
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_writing_to_an_array_leaves_the_next_reading_alone(tmp_path):
    np.savez(tmp_path / "c.npz", w=np.zeros(1000, np.uint8))
    ref = open_checkpoint(tmp_path / "c.npz")["w"]
    ref.read().fill_(7)
    assert ref.read().sum() == 0


def test_text_stays_text_and_pickled_objects_stay_unread(tmp_path):
    class Exploit:
        def __reduce__(self):
            return print, ("executed",)

    np.savez(
        tmp_path / "c.npz", w=np.ones(2), names=np.array(["a", "é"]), raw=np.array(b"x"), objects=np.array([Exploit()])
    )
    checkpoint = open_checkpoint(tmp_path / "c.npz")
    assert list(checkpoint) == ["w"]
    assert checkpoint.document["names"] == ["a", "é"] and checkpoint.document["raw"] == b"x"
    assert isinstance(checkpoint.document["objects"], Record)


HEADER = b"\x93NUMPY\x01\x00"


def header(text: bytes) -> bytes:
    return HEADER + len(text).to_bytes(2, "little") + text


MALFORMED = {
    "no array": (b"hello", "magic string, expected 8 bytes got 5"),
    "nothing": (b"", "magic string, expected 8 bytes got 0"),
    "cut in the header": (npy(np.ones(3))[:60], "array header, expected 118 bytes got 50"),
    "cut in the values": (npy(np.ones(3))[:-1], "which take 24 bytes, but holds 23"),
    "values left over": (npy(np.ones(3)) + b"x", "which take 24 bytes, but holds 25"),
    "version unknown": (b"\x93NUMPY\x07\x00" + npy(np.ones(3))[8:], r"\.npy version \(7, 0\); known are"),
    "header is code": (header(b"__import__('os').system('true')\n"), "malformed node or string"),
    "header is no dictionary": (header(b"[1]\n"), "Header is not a dictionary"),
    "shape negative": (
        header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n") + bytes(4),
        r"whole numbers from 0 up, but are \[-1\]",
    ),
    "shape huge": (
        header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }\n"),
        r"whole numbers from 0 up, but are \[99999999999999999999\]",
    ),
    "shape overflows to the right length": (
        header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }\n"),
        r"whole numbers from 0 up, but are \[4611686018427387904, 4\]",
    ),
    "type unknown": (
        header(b"{'descr': '<q4', 'fortran_order': False, 'shape': (1,), }\n") + bytes(4),
        "not a valid dtype descriptor",
    ),
    "one-byte void": (npy(np.zeros(3, "V1")), r"the type \|V1, which has no equal"),
    "dates": (npy(np.zeros(3, "M8[s]")), r"the type <M8\[s\], which has no equal"),
    "long double": (npy(np.zeros(3, np.longdouble)), "the type <f16, which has no equal"),
    "nested header": (header(b"{'descr': " + b"(" * 9000 + b"\n"), "malformed .npy header .*too many nested"),
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", MALFORMED)
def test_a_member_that_is_no_array_is_refused_by_name(tmp_path, name, compression):
    content, said = MALFORMED[name]
    path = write(tmp_path / "c.npz", {"good.npy": npy(np.ones(2)), "bad.npy": content}, compression)
    with pytest.raises(CheckpointError, match=rf"c\.npz: 'bad': .*{said}"):
        open_checkpoint(path)["bad"].read()


def test_damaged_compressed_data_is_noticed(tmp_path):
    path = write(tmp_path / "c.npz", {"w.npy": npy(np.arange(2000.0) ** 0.5)}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"'w\.npy' unpacks to 16128 bytes that do not match its size .* and checksum"
    ):
        open_checkpoint(path)["w"].read()


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(tmp_path, compression):
    path = write(tmp_path / "c.npz", {"w.npy": npy(np.ones(2))}, compression)
    with pytest.raises(CheckpointError, match="compressed by method"):
        open_checkpoint(path)
