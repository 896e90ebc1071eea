"""A small file cannot cost much: what it has done for it is bounded, and the error names the limit."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_bytes import StorageId, pickled, tensor, write_archive
from safetensors.torch import save_file

from weightport.checkpoints import naming, open_checkpoint, pickle_budget, plain, sections
from weightport.checkpoints.pickle import reader as pickles
from weightport.errors import CheckpointError

PRIME = (1 << 61) - 1
"""Whole numbers that differ by this have the same hash in Python."""


@pytest.fixture(autouse=True)
def seconds_at_most() -> Iterator[None]:
    """Each of these inputs took minutes, or had no end. Generous, and of processor time, for busy machines."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 30


def doubled(levels: int) -> bytes:
    """A list that holds a list twice, which holds …: written out, it has 2**levels items."""
    return b"]q\x000" + b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(levels)) + b"h%c" % levels


def number(value: int) -> bytes:
    data = value.to_bytes(16, "little")
    return b"\x8a" + bytes([len(data)]) + data


def call(name: bytes, arguments: bytes) -> bytes:
    return b"c" + name.replace(b" ", b"\n") + b"\n" + arguments + b"\x85R"


WIDE_KEY = b"(" + (b"(" + b"X\x01\0\0\0a" * 60 + b"t") + b"2" * 59 + b"tq\x01"
LONG_TEXT = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
ATTRIBUTES = b"}(" + b"".join(b"X\x05\0\0\0%05dN" % i for i in range(50_000)) + b"uq\x02"

PICKLES: dict[str, tuple[bytes, str]] = {
    "memory layout of lists": (
        call(b"torch.serialization _get_layout", doubled(60)),
        "a memory layout is called list",
    ),
    "device of lists": (call(b"torch device", doubled(60)), "a device is called list and None"),
    "tensor type of lists": (
        b"ctorch._tensor\n_rebuild_from_type\n(" + doubled(60) + b"ccollections\nCounter\n)tR",
        "a tensor of type 'collections.Counter' is made by list",
    ),
    "long key used again and again": (b"}0" + WIDE_KEY + b"}" + b"h\x01Ns" * 50_000, "for a key, which cannot be one"),
    "keys of many parts": (b"}" + b"((X\x01\0\0\0att" * 1 + b"(" + b"K\x01" * 16 + b"t\x86Ns", "a key of 21 parts"),
    "keys of one hash": (
        b"}(" + b"".join(number(1 + PRIME * i) + b"N" for i in range(30_000)) + b"u",
        "more than 5,000 dictionary keys of other numbers than small whole ones",
    ),
    "set of one hash": (
        call(b"builtins set", b"](" + b"".join(number(1 + PRIME * i) for i in range(30_000)) + b"e"),
        "more than 5,000 dictionary keys",
    ),
    "sets of few numbers, again and again": (
        b"](" + b"".join(number(1 + PRIME * i) for i in range(400)) + b"eq\x010"
        b"cbuiltins\nset\nq\x020" + b"(" + b"h\x02h\x01\x85R" * 10_000 + b"t",
        "more than 5,000 dictionary keys|copies its own data",
    ),
    "numbers of objects with one hash": (
        b"".join(b"Np%d\n0" % (1 + PRIME * i) for i in range(30_000)) + b"N",
        "gives an object the number 2305843009213693952",
    ),
    "attributes copied to every object": (
        ATTRIBUTES + b"0(" + b"cm\nC\n)\x81h\x02b" * 20_000 + b"t",
        "copies its own data over and over",
    ),
    "arguments inside arguments": (
        b"](" + b"N" * 100_000 + b"e\x85q\x010("
        b"" + b"ccopyreg\n__newobj_ex__\n(cbuiltins\nlist\nh\x01}tR" * 20_000 + b"t",
        "copies its own data over and over",
    ),
    "text of Python 2 turned to bytes": (
        LONG_TEXT + b"q\x010cnumpy\ndtype\nX\x02\0\0\0S1\x85Rq\x020("
        b"" + b"cnumpy.core.multiarray\nscalar\nh\x02h\x01\x86R" * 20_000 + b"t",
        "copies its own data over and over|does not hold its bytes",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_makes_work_is_refused(tmp_path, name: str):
    data, problem = PICKLES[name]
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_checkpoint(write_archive(tmp_path / "c.pt", data + b"."))
    assert len(str(caught.value)) < 1000


def test_text_keys_and_parameter_numbers_are_not_limited(tmp_path):
    value = {"state": dict.fromkeys(range(20_000), 1), "ranks": {(f"a{i}", "b"): i for i in range(20_000)}}
    assert open_checkpoint(write_archive(tmp_path / "c.pt", value)).document == value


def test_containers_and_objects_are_limited_in_number(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_budget, "MAX_OBJECTS", 1000)
    for many in (b"}" * 1001, b"\x85" * 1001, b"\x94" * 1001, b"cm\nC\nq\x010" + b"h\x01)R" * 251):
        with pytest.raises(CheckpointError, match="describes more than 1,000 objects"):
            open_checkpoint(write_archive(tmp_path / "c.pt", b"(N" + many + b"t."))
    open_checkpoint(write_archive(tmp_path / "c.pt", b"(" + b"}" * 999 + b"t."))


def test_opcodes_are_limited_in_number(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(CheckpointError, match="more than 1,000 pickle opcodes"):
        open_checkpoint(write_archive(tmp_path / "c.pt", b"(" + b"N" * 1000 + b"t."))


def test_names_are_limited_in_length_altogether(tmp_path, monkeypatch):
    monkeypatch.setattr(naming, "_MAX_NAMES", 10_000)
    weight = tensor(StorageId(("storage", torch.FloatStorage, "0", "cpu", 1)), 0, (1,), (1,))
    value = {"a" * 1000: {str(number): weight for number in range(11)}}
    with pytest.raises(CheckpointError, match="names its tensors with more than 10,000 characters"):
        open_checkpoint(write_archive(tmp_path / "c.pt", value, {"0": bytes(4)}))


def test_a_storage_type_that_is_no_class_is_not_written_out(tmp_path):
    key: list[object] = []
    for _ in range(60):
        key = [key, key]
    value = tensor(StorageId(("storage", key, "0", "cpu", 1)), 0, (1,), (1,))
    with pytest.raises(CheckpointError, match="a storage of the unknown type list"):
        open_checkpoint(write_archive(tmp_path / "c.pt", value))


NUMPY = {
    "a terabyte of empty texts": (b"S0", (1 << 40,), b"", None),
    "dimensions beyond an index": (b"f4", (0, 1 << 62, 1 << 62), b"", "cannot hold an array of shape"),
    "a dimension beyond an index": (b"f4", (0, 1 << 63), b"", "cannot hold an array of shape"),
    "more bytes than there are": (b"f4", (1 << 40,), b"abcd", "does not hold its bytes"),
}


@pytest.mark.parametrize("name", NUMPY)
def test_a_pickled_array_takes_no_more_than_its_bytes(tmp_path, name: str):
    code, shape, data, problem = NUMPY[name]
    array = b"cnumpy.core.numeric\n_frombuffer\n(" + pickled(data, 3)[2:-1]
    array += b"cnumpy\ndtype\nX\x02\0\0\0" + code + b"\x85R" + pickled(shape, 2)[2:-1] + b"tR."
    path = write_archive(tmp_path / "c.pt", array)
    if problem is None:
        assert "numpy.ndarray" in str(plain(open_checkpoint(path).document))
        return
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(path)


NO_CHARACTERS = [b"\xff\xff\xff\xff", b"\0\0\x11\0", b"\0\xd8\0\0"]


@pytest.mark.parametrize("point", NO_CHARACTERS)
def test_a_pickled_text_that_is_not_unicode_is_refused(tmp_path, point: bytes):
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\nX\x02\0\0\0U1\x85RC\x04" + point + b"tR."
    with pytest.raises(CheckpointError, match="type <U1 holds text that is not Unicode"):
        open_checkpoint(write_archive(tmp_path / "c.pt", scalar))


def test_an_array_for_a_byte_order_is_refused(tmp_path):
    order = b"cnumpy.core.numeric\n_frombuffer\n(C\x08abcdefghcnumpy\ndtype\nX\x02\0\0\0f4\x85R\x88\x85tR"
    state = b"(K\x03" + order.replace(b"\x88\x85", b"K\x02\x85") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    with pytest.raises(CheckpointError, match="a numpy type's state is not of numpy's form"):
        open_checkpoint(write_archive(tmp_path / "c.pt", b"cnumpy\ndtype\nX\x02\0\0\0f4\x85R" + state + b"b."))


def write_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(name: str = "a", shape: str = "1") -> str:
    return f'{{"{name}": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}}}'


HEADERS: dict[str, tuple[str, str]] = {
    "key twice at the end": (
        "{" + ",".join(f'"k{i}":0' for i in range(60_000)) + ',"k59999":0}',
        "'k59999' stands twice",
    ),
    "endless name": (entry("a" * 5000), "a name of 5000 characters; the longest have 4096"),
    "number without end": (entry(shape="9" * 5000), "header is malformed"),
    "many dimensions": (entry(shape="1," * 99_999 + "1"), "claims 100000 dimensions"),
    "surrogate in a name": (entry("\\ud800"), "is not Unicode"),
    "surrogate in the metadata": ('{"__metadata__": {"a": "\\ud800"}}', "is not Unicode"),
    "nested without end": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nests too deep"),
    "many containers": ('{"a": [' + "[]," * 4_000_000 + "[]]}", "more than 4,000,000 lists and objects"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_that_makes_work_is_refused(tmp_path, name: str):
    header, problem = HEADERS[name]
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_checkpoint(write_header(tmp_path / "c.safetensors", header.encode(), bytes(4)))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("shard", "problem"),
    [
        ("x" * 400, "a file name of 400 characters; the longest have 255"),
        ("\ud800", "is not Unicode"),
        ("ü" * 200, "a file name of 200 characters"),
    ],
)
def test_an_index_that_names_no_possible_file_is_refused(tmp_path, shard: str, problem: str):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(index)


def test_shards_of_many_files_are_matched_in_one_pass(tmp_path):
    names = {f"t{number}": f"m-{number}.safetensors" for number in range(300)}
    for name, file in names.items():
        save_file({name: torch.zeros(1)}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert open_checkpoint(tmp_path).keys() == names.keys()


def test_sections_of_many_keys_with_dots_are_found_in_time(tmp_path):
    weight = tensor(StorageId(("storage", torch.FloatStorage, "0", "cpu", 1)), 0, (1,), (1,))
    value = {f"key.{number}": [weight] for number in range(5_000)} | {f"t.{number}": weight for number in range(5_000)}
    found = sections(open_checkpoint(write_archive(tmp_path / "c.pt", value, {"0": bytes(4)})))
    assert [section.tensors for section in found[:2]] == [1, 1] and found[-1].tensors == 5_000


def npz_of(change: Callable[[bytes], bytes], path: Path, array: np.ndarray) -> Path:
    """An archive of one array whose .npy bytes were changed, with the checksum of the changed ones."""
    import io
    import zipfile

    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", change(stream.getvalue()))
    return path


def test_a_header_that_numpys_own_reader_trips_over_is_refused(tmp_path):
    path = npz_of(lambda data: data.replace(b"'<f4', ", b"(), '<f4"), tmp_path / "c.npz", np.zeros(2, "<f4"))
    with pytest.raises(CheckpointError, match=r"'x': has a malformed \.npy header"):
        open_checkpoint(path)


@pytest.mark.parametrize("point", NO_CHARACTERS)
def test_an_array_of_text_that_is_not_unicode_is_refused(tmp_path, point: bytes):
    path = npz_of(lambda data: data[:-4] + point, tmp_path / "c.npz", np.array(["ab"]))
    with pytest.raises(CheckpointError, match="'x': a numpy array of type <U2 holds text that is not Unicode"):
        open_checkpoint(path)


def test_opening_a_compressed_array_unpacks_its_header_only(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "c.npz", w=np.random.default_rng(0).random(1 << 20, np.float32))
    counted = 0
    from weightport.checkpoints.source_file import SourceFile

    real = SourceFile.read_into

    def counting(self: SourceFile, buffer: memoryview, offset: int, what: str) -> None:
        nonlocal counted
        counted += len(buffer)
        real(self, buffer, offset, what)

    monkeypatch.setattr(SourceFile, "read_into", counting)
    checkpoint = open_checkpoint(tmp_path / "c.npz")
    assert counted < 200_000
    assert checkpoint["w"].read().shape == (1 << 20,)
