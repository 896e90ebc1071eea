"""What torch.save wrote is what is read, in both of its formats, byte for byte and without copies."""

from __future__ import annotations

import argparse
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_bytes import StorageId, storage_id, tensor, write_archive

from weightport.checkpoints import Record, TensorRef, open_checkpoint
from weightport.checkpoints.dtypes import ELEMENT_TYPES
from weightport.checkpoints.layout import Span
from weightport.checkpoints.pickle.torch_tensors import Storage, StorageView, rebuild_tensor
from weightport.checkpoints.source_file import SourceFile
from weightport.errors import CheckpointError, UnsafeCheckpointError

FORMATS = pytest.mark.parametrize("form", ["torch-zip", "torch-legacy"])


DTYPES = [
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "bool", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
]  # fmt: skip


def save(value: Any, path: Path, form: str = "torch-zip", protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=form == "torch-zip", pickle_protocol=protocol)
    return path


def raw(values: torch.Tensor) -> bytes:
    return values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_is_read_as_torch_wrote_it(tmp_path, form, protocol):
    dtypes = [getattr(torch, name) for name in DTYPES if hasattr(torch, name)]
    # Any bit pattern is a value, except for bool.
    values = {str(dtype): (torch.arange(48, dtype=torch.uint8) % 2).view(dtype) for dtype in dtypes}
    checkpoint = open_checkpoint(save(values, tmp_path / "c.pt", form, protocol))
    assert checkpoint.format == form
    assert list(checkpoint) == list(values)
    for name, expected in values.items():
        found = checkpoint[name].read()
        assert checkpoint[name].dtype == found.dtype == expected.dtype
        assert checkpoint[name].shape == found.shape == expected.shape
        assert raw(found) == raw(expected)


@FORMATS
def test_views_keep_their_elements_and_shape(tmp_path, form):
    base = torch.arange(24.0).reshape(4, 6)
    values = {
        "base": base,
        "transposed": base.t(),
        "row": base[1],
        "every_second": base[::2, 1::2],
        "expanded": base[:1].expand(5, 6),
        "expanded_scalar": torch.tensor(2.0).expand(3, 4),
        "diagonal": base.diagonal(),
        "last": base[3, 5],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "unsqueezed": base[:, None, :],
        "parameter": torch.nn.Parameter(base[2]),
    }
    checkpoint = open_checkpoint(save(values, tmp_path / "c.pt", form))
    for name, expected in values.items():
        found = checkpoint[name].read()
        assert checkpoint[name].shape == found.shape == expected.shape, name
        assert torch.equal(found, expected), name
        assert not found.requires_grad
        assert checkpoint[name].nbytes == expected.numel() * expected.element_size()


@FORMATS
def test_one_storage_under_two_names_is_recognised(tmp_path, form):
    base = torch.arange(6.0)
    values = {"a": base, "b": base, "view": base.view(2, 3), "part": base[2:], "equal": base.clone()}
    checkpoint = open_checkpoint(save(values, tmp_path / "c.pt", form))
    assert checkpoint["a"].storage == checkpoint["b"].storage
    assert checkpoint["a"].name == "a" and checkpoint["b"].name == "b"
    assert checkpoint["part"].storage != checkpoint["a"].storage
    assert checkpoint["part"].storage[:2] == checkpoint["a"].storage[:2] == checkpoint["view"].storage[:2]
    assert checkpoint["equal"].storage[:2] != checkpoint["a"].storage[:2]


def test_writing_to_a_tensor_leaves_the_file_and_the_next_reading_alone(tmp_path):
    path = save({"w": torch.zeros(1000)}, tmp_path / "c.pt")
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    first = checkpoint["w"].read()
    assert first.is_contiguous()
    first.fill_(7.0)
    assert path.read_bytes() == before
    assert checkpoint["w"].read().sum() == 0


def test_a_tensor_outlives_its_checkpoint(tmp_path):
    found = open_checkpoint(save({"w": torch.arange(1000)}, tmp_path / "c.pt"))["w"].read()
    assert found.sum() == 499500


def test_unaligned_storage_is_not_misread(tmp_path):
    # Python's zipfile does not align members as torch does.
    values = np.arange(12, dtype="<f8")
    document = {"w": tensor(storage_id("0", 12, torch.DoubleStorage), 0, (3, 4), (4, 1))}
    for root in ("a", "ab", "abc", "abcd"):
        path = write_archive(tmp_path / f"{root}.pt", document, {"0": values.tobytes()}, root=root)
        assert open_checkpoint(path)["w"].read().tolist() == values.reshape(3, 4).tolist()


@pytest.mark.parametrize(
    ("kind", "numpy_type"),
    [
        (torch.FloatStorage, "f4"),
        (torch.LongStorage, "i8"),
        (torch.HalfStorage, "f2"),
        (torch.ByteStorage, "u1"),
        (torch.ComplexFloatStorage, "c8"),
    ],
)
def test_big_endian_archives_are_turned_around(tmp_path, kind, numpy_type):
    values = np.arange(1, 13).astype(">" + numpy_type)
    document = {"w": tensor(storage_id("0", 12, kind), 2, (2, 5), (5, 1))}
    path = write_archive(tmp_path / "c.pt", document, {"0": values.tobytes()}, byteorder=b"big")
    assert open_checkpoint(path)["w"].read().flatten().tolist() == values[2:].tolist()


def test_an_archive_of_before_the_byteorder_record_is_little_endian(tmp_path):
    document = {"w": tensor(storage_id("0", 2), 0, (2,), (1,))}
    path = write_archive(tmp_path / "c.pt", document, {"0": np.float32([1, 2]).tobytes()}, byteorder=None)
    assert open_checkpoint(path)["w"].read().tolist() == [1.0, 2.0]


def test_an_unknown_byte_order_is_refused(tmp_path):
    path = write_archive(tmp_path / "c.pt", {"a": 1}, byteorder=b"middle")
    with pytest.raises(CheckpointError, match="byte order"):
        open_checkpoint(path)


def test_archives_with_torchs_own_alignment_and_crc_options_open(tmp_path):
    previous = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"w": torch.arange(3)}, tmp_path / "c.pt")
    finally:
        torch.serialization.set_crc32_options(previous)
    assert open_checkpoint(path)["w"].read().tolist() == [0, 1, 2]


@FORMATS
def test_names_join_keys_with_dots_and_the_rest_stays_as_plain_data(tmp_path, form):
    value = OrderedDict(
        args=argparse.Namespace(lr=[0.1], arch="ofa_base", nested=argparse.Namespace(ema=torch.ones(2))),
        model=OrderedDict([("encoder.layer_norm.bias", torch.zeros(3))]),
        optimizer={"state": {0: {"exp_avg": torch.ones(1)}, 1: {"exp_avg": torch.ones(2)}}},
        history=[(1, torch.tensor(4)), defaultdict(list, {"x": [torch.tensor(5)]})],
        epoch=3,
    )
    checkpoint = open_checkpoint(save(value, tmp_path / "c.pt", form))
    assert list(checkpoint) == [
        "args.nested.ema",
        "model.encoder.layer_norm.bias",
        "optimizer.state.0.exp_avg",
        "optimizer.state.1.exp_avg",
        "history.0.1",
        "history.1.x.0",
    ]
    document = checkpoint.document
    args = document["args"]
    assert isinstance(args, Record) and args.type_name == "argparse.Namespace"
    assert args["lr"] == [0.1] and args.get("arch") == "ofa_base" and args.get("absent", 7) == 7
    assert document["epoch"] == 3
    placed = document["model"]["encoder.layer_norm.bias"]
    assert isinstance(placed, TensorRef) and placed.name == "model.encoder.layer_norm.bias"
    assert list(checkpoint.section("model")) == ["encoder.layer_norm.bias"]


@FORMATS
def test_a_lone_tensor_and_a_list_of_tensors_have_names(tmp_path, form):
    assert list(open_checkpoint(save(torch.ones(2), tmp_path / "one.pt", form))) == ["tensor"]
    assert list(open_checkpoint(save([torch.ones(2), {"w": torch.ones(1)}], tmp_path / "two.pt", form))) == [
        "0",
        "1.w",
    ]


def test_a_dictionary_that_stands_twice_gives_both_names(tmp_path):
    weights = {"w": torch.ones(2)}
    checkpoint = open_checkpoint(save({"model": weights, "ema": weights}, tmp_path / "c.pt"))
    assert list(checkpoint) == ["model.w", "ema.w"]
    assert checkpoint["model.w"].storage == checkpoint["ema.w"].storage


def test_two_tensors_of_one_name_are_refused(tmp_path):
    path = save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"two tensors that would both be named 'a\.b'"):
        open_checkpoint(path)


def test_a_whole_pickled_module_has_the_names_of_its_state_dict(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    checkpoint = open_checkpoint(save(model, tmp_path / "c.pt"))
    assert set(checkpoint) == set(model.state_dict())
    for name, expected in model.state_dict().items():
        assert torch.equal(checkpoint[name].read(), expected)


@FORMATS
def test_numpy_scalars_and_arrays_are_plain_values(tmp_path, form):
    value = {
        "loss": np.float64(1.25),
        "half": np.float16(0.5),
        "step": np.int64(-7),
        "flag": np.bool_(True),
        "text": np.str_("ofa"),
        "complex": np.complex64(1 + 2j),
        "big": np.array([1, 2], ">i4"),
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar_array": np.array(3.0),
        "empty": np.zeros((0, 2)),
        "state": np.random.RandomState(0).get_state(),
        "objects": np.array([{}, None], dtype=object),
    }
    document = open_checkpoint(save(value, tmp_path / "c.pt", form)).document
    assert document["loss"] == 1.25 and type(document["loss"]) is float
    assert document["half"] == 0.5 and document["step"] == -7 and document["flag"] is True
    assert document["text"] == "ofa" and document["complex"] == 1 + 2j
    for name in ("big", "array", "fortran", "scalar_array", "empty"):
        assert np.array_equal(document[name], value[name]) and document[name].shape == value[name].shape
    assert np.array_equal(document["state"][1], value["state"][1])
    assert isinstance(document["objects"], Record)


def test_plain_values_of_every_kind_survive(tmp_path):
    value = {
        "none": None,
        "truth": (True, False),
        "whole": [0, -1, 255, 65535, -(2**31), 2**31, 2**200, -(2**200)],
        "real": [0.1, float("inf")],
        "text": "中文 é",
        "bytes": b"\x00\xff",
        "bytearray": bytearray(b"xy"),
        "set": {1, 2},
        "frozen": frozenset({"a"}),
        "complex": 1 - 2j,
        "range": range(3),
        "slice": slice(1, 5, 2),
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        ("a", 1): "tuple key",
    }
    for protocol in (2, 3, 4, 5):
        document = open_checkpoint(save(value, tmp_path / f"{protocol}.pt", protocol=protocol)).document
        assert document == {**value, "size": (2, 3), "device": "cuda:1"}


def test_the_oldest_protocol_that_torch_reads_back_is_understood(tmp_path):
    value = {"w": torch.arange(3.0), "n": [1, -5, True, 2**70, 1.5, "é\n'", None, (1, 2, 3, 4)]}
    torch.save(value, tmp_path / "c.pt", pickle_protocol=1)
    checkpoint = open_checkpoint(tmp_path / "c.pt")
    assert checkpoint.document["n"] == value["n"]
    assert checkpoint["w"].read().tolist() == [0, 1, 2]


def test_a_storage_that_is_part_of_another_gives_that_part(tmp_path):
    # Until torch 0.4 a storage could be a view of another: (view's key, offset, length) at the end of its id.
    path = tmp_path / "floats"
    path.write_bytes(np.arange(8, dtype="<f4").tobytes())
    base = Storage(path, "0", ELEMENT_TYPES["float32"], 8, 32, Span(SourceFile(path), 0, 32))
    ref = rebuild_tensor(StorageView(base, 2, 4), 1, (3,), (1,))
    assert ref.read().tolist() == [3.0, 4.0, 5.0]
    with pytest.raises(CheckpointError, match="ends at byte"):
        rebuild_tensor(StorageView(base, 2, 4), 1, (4,), (1,))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: torch.sparse_coo_tensor([[0]], [1.0], (2,)), "sparse"),
        (lambda: torch.eye(2).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.empty(3, device="meta"), "without values"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conj"),
    ],
)
def test_tensors_without_plain_values_are_refused_by_name(tmp_path, make, problem):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save({"w": make()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(path)


def test_a_torchscript_program_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "c.pt"))
    with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        open_checkpoint(tmp_path / "c.pt")


FAR = 1 << 61
BEYOND = "ends at byte 52 of a storage of 48 bytes"
WHOLE = "must be whole numbers from 0 up"


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "said"),
    [
        (0, (13,), (1,), BEYOND),
        (12, (1,), (1,), BEYOND),
        (1, (3, 4), (4, 1), BEYOND),
        (0, (2,), (12,), BEYOND),
        (0, (2, 2), (FAR, FAR), "ends at byte .* of a storage of 48 bytes"),
        (0, (FAR, FAR), (0, 0), "is larger than torch can hold"),
        (0, (1 << 33,), (0,), "would fill 34359738368 bytes from a file of"),
        (-1, (2,), (1,), WHOLE),
        (0, (-2,), (1,), WHOLE),
        (3, (2,), (-1,), WHOLE),
        (0, (2, 2), (1,), "claims 2 dimensions and 1 strides"),
        (0, (True,), (1,), WHOLE),
        (0, (2.0,), (1,), WHOLE),
        (0, "ab", (1,), "should be a tuple, but are 'ab'"),
        (0, ((),), (1,), WHOLE),
        (0, (1,) * 65, (1,) * 65, "claims 65 dimensions and 65 strides"),
        (0, (0, FAR, FAR), (1, 1, 1), "is larger than torch can hold"),
        (None, (2,), (1,), "offset None"),
        (1 << 200, (2,), (1,), WHOLE),
    ],
)
def test_a_layout_that_leaves_its_storage_is_refused(tmp_path, offset, shape, stride, said):
    path = write_archive(tmp_path / "c.pt", {"w": tensor(storage_id(), offset, shape, stride)}, {"0": bytes(48)})
    with pytest.raises(CheckpointError, match=rf"c\.pt: .*{said}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        (storage_id("../../x"), r"the storage '\.\./\.\./x', which the archive does not hold"),
        (storage_id("1"), "the storage '1', which the archive does not hold"),
        (storage_id(count=13), "claims 52 bytes for the storage '0', which has 48"),
        (storage_id(count=11), "claims 44 bytes for the storage '0', which has 48"),
        (storage_id(count=-12), "a storage '0' of -12 elements"),
        (storage_id(count=1 << 80), "a storage '0' of 1208925819614629174706176 elements"),
        (storage_id(kind=torch.DoubleStorage), "claims 96 bytes for the storage '0', which has 48"),
        (storage_id(kind=dict), "a storage of the unknown type 'builtins.dict'"),
        (StorageId(("storage", torch.FloatStorage, "0", "cpu")), r"'cpu'\], which is no storage"),
        (StorageId(("module", torch.FloatStorage)), "should be made of a storage, but is made of Symbol"),
        (StorageId(("storage", torch.FloatStorage, None, "cpu", 12)), "a storage None of 12 elements"),
        (StorageId(("storage", torch.FloatStorage, ("0",), "cpu", 12)), r"a storage \['0'\] of 12 elements"),
        (StorageId(("storage", torch.QInt8Storage, "0", "cpu", 48)), "quantized values"),
        (StorageId(()), r"refers to \[\], which is no storage"),
        ("text", "should be made of a storage, but is made of 'text'"),
        (None, "should be made of a storage, but is made of None"),
    ],
)
def test_a_storage_that_the_archive_does_not_hold_is_refused(tmp_path, storage, said):
    path = write_archive(tmp_path / "c.pt", {"w": tensor(storage, 0, (12,), (1,))}, {"0": bytes(48)})
    with pytest.raises(CheckpointError, match=rf"c\.pt: .*{said}"):
        open_checkpoint(path)


def test_compressed_storages_are_refused_with_the_reason(tmp_path):
    document = {"w": tensor(storage_id(), 0, (12,), (1,))}
    path = write_archive(tmp_path / "c.pt", document, {"0": bytes(48)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(path)


def test_a_file_that_shrinks_after_opening_gives_an_error_not_a_crash(tmp_path):
    path = save({"w": torch.zeros(100_000)}, tmp_path / "c.pt")
    ref = open_checkpoint(path)["w"]
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="shrunk"):
        ref.read()
