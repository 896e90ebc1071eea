"""Readers of weights, held against torch, safetensors and numpy."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch
import zstandard

from fuzzing import mutation
from fuzzing.campaign import Target
from fuzzing.cases import Case
from fuzzing.judge import MismatchError
from fuzzing.pickle_grammar import STORAGES, Grower
from fuzzing.same import Documents, read_all, require_array, require_names, require_tensor
from fuzzing.targets.changes import change
from weightport.checkpoints import Checkpoint, open_checkpoint, plain, sections
from weightport.checkpoints.types import TensorRef

Read = tuple[Checkpoint, dict[str, torch.Tensor]]


def _read(name: str, folder: Path) -> Read:
    """Open, read all tensors, and what the commands show of a checkpoint."""
    checkpoint = open_checkpoint(folder / name if name else folder)
    found = read_all(checkpoint)
    sections(checkpoint)
    plain(checkpoint.document)
    return checkpoint, found


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(3, 4, generator=generator)
    return {
        "model.a.weight": base,
        "model.a.bias": base[1],
        "model.b.weight": base.t(),
        "half": base.half(),
        "brain": base.bfloat16(),
        "ids": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True, False]),
        "one.expanded": torch.ones(1).expand(4),
        "complex": torch.complex(base, base),
    }


_DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64),
)
_NAMES = ("weight", "bias", "a.b", "model.layers.0.w", "图", "x y", "", "ü", "0", "params/a", "v" * 300)


def _drawn_tensor(rng: Random, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any shape, and now and then a view: transposed, cut, repeated, reversed in its strides."""
    shape = [rng.choice((0, 1, 1, 2, 3, 5, 17)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
    count = prod(shape) * dtype.itemsize
    raw = bytes(rng.randrange(2) for _ in range(count)) if dtype == torch.bool else rng.randbytes(count)
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if count else torch.zeros(shape, dtype=dtype)
    for _ in range(rng.choice((0, 0, 1, 2))):
        choice = rng.randrange(4)
        if choice == 0 and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        elif choice == 1 and tensor.dim() and tensor.shape[0] > 1:
            tensor = tensor[rng.randrange(tensor.shape[0]) :]
        elif choice == 2 and tensor.dim() and tensor.shape[-1] > 2:
            tensor = tensor[..., ::2]
        elif choice == 3:
            tensor = tensor.unsqueeze(0).expand(rng.choice((1, 2, 3)), *tensor.shape)
    return tensor


def _drawn(rng: Random, dtypes: tuple[torch.dtype, ...] = _DTYPES) -> dict[str, torch.Tensor]:
    """Tensors by name; some share a storage."""
    found: dict[str, torch.Tensor] = {}
    for name in rng.sample(_NAMES, rng.randint(1, 5)):
        reuse = found and rng.random() < 0.2
        found[name] = rng.choice(list(found.values())) if reuse else _drawn_tensor(rng, rng.choice(dtypes))
    return found


def _or_drawn(draw: Callable[[Random], Case]) -> Callable[[Random, Case, list[Case]], Case]:
    """One input in four is drawn anew, and of these half are changed too: what is accepted is compared."""

    def made(rng: Random, case: Case, corpus: list[Case]) -> Case:
        choice = rng.random()
        if choice < 0.125:
            return draw(rng)
        return change(rng, draw(rng) if choice < 0.25 else case, corpus)

    return made


def _drawn_torch(zipped: bool, rng: Random) -> Case:
    tensors: Any = _drawn(rng)
    document = rng.choice((tensors, {"model": tensors, "epoch": 1}, {"a": [tensors, 1.5], "b": {"c": tensors}}))
    return {"in.pt": _saved(document, zipped)}


def _drawn_safetensors(rng: Random) -> Case:
    tensors = {name: tensor.contiguous().clone() for name, tensor in _drawn(rng).items() if name}
    return {
        "in.safetensors": safetensors.torch.save(tensors, rng.choice((None, {"format": "pt"}, {"a": "b", "图": ""})))
    }


def _drawn_npz(rng: Random) -> Case:
    kinds = tuple(dtype for dtype in _DTYPES if dtype != torch.bfloat16)
    arrays = {name: tensor.numpy() for name, tensor in _drawn(rng, kinds).items() if name not in ("", "file")}
    if rng.random() < 0.3:
        arrays = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    stream = io.BytesIO()
    rng.choice((np.savez, np.savez_compressed))(stream, **arrays)
    return {"in.npz": stream.getvalue()}


def _documents() -> list[Any]:
    from argparse import Namespace
    from collections import OrderedDict, defaultdict

    state = _tensors()
    small = {name: state[name] for name in ("model.a.weight", "half")}
    counts: defaultdict[str, int] = defaultdict(int, {"a": 1})
    return [
        state,
        OrderedDict(small),
        {"model": small, "args": Namespace(arch="ofa", lr=[1e-4], path=None), "extra": {"epoch": 3, "best": 0.5}},
        {"model": small, "optimizer": [{"state": {0: {"step": 1, "exp_avg": state["half"]}}}], "names": {"a", "b"}},
        {"weight": torch.nn.Parameter(state["brain"]), "numbers": [1, 2.5, "x", None, True, (1, 2)], "counts": counts},
        [state["ids"], {"inner": [state["scalar"], np.float64(1.5), np.arange(6, dtype=">i4").reshape(2, 3)]}],
    ]


def _saved(document: Any, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(document, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def _torch_seeds(zipped: bool, folder: Path) -> list[Case]:
    return [{"in.pt": _saved(document, zipped)} for document in _documents()]


def _as_torch(folder: Path, found: Read) -> bool:
    checkpoint, tensors = found
    try:
        document = torch.load(folder / "in.pt", map_location="cpu", weights_only=True)
    except Exception:
        return False
    by_identity = {id(ref): tensors[name] for name, ref in _refs(checkpoint) if name in tensors}
    comparison = Documents(by_identity)
    try:
        comparison.require("document", checkpoint.document, document)
    except MismatchError:
        if checkpoint.format == "torch-zip" and not _torch_reads_members(folder / "in.pt"):
            return False
        raise
    return comparison.tensors > 0


def _torch_reads_members(path: Path) -> bool:
    """Whether torch's archive reader gives each member as the standard library's does: of some damaged archives it
    gives memory that it never wrote to."""
    reader = torch._C.PyTorchFileReader(str(path))
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        return all(
            bytes(reader.get_record(name)) == archive.read(f"{root}/{name}") for name in reader.get_all_records()
        )


def _refs(checkpoint: Checkpoint) -> list[tuple[str, TensorRef]]:
    """The TensorRefs in the document, by the names that stand in them."""
    found: list[tuple[str, TensorRef]] = []
    stack, seen = [checkpoint.document], set()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, TensorRef):
            found.append((value.name, value))
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack += value
    return found


def _grown(rng: Random, case: Case, corpus: list[Case]) -> Case:
    if rng.random() < 0.3:
        return change(rng, case, corpus)
    program = Grower(rng).program()
    members = [("archive/data.pkl", program, 0), ("archive/byteorder", b"little", 0), ("archive/version", b"3\n", 0)]
    members += [(f"archive/data/{key}", bytes(range(size)), 0) for key, size in STORAGES.items()]
    return {"in.pt": mutation.packed(members)}


def _grammar_seeds(folder: Path) -> list[Case]:
    return [
        _grown(Random(number), {}, [{"in.pt": b""}]) for number in range(400, 440) if Random(number).random() >= 0.3
    ]


def _safetensors_seeds(folder: Path) -> list[Case]:
    tensors = {name: tensor.contiguous().clone() for name, tensor in _tensors().items()}
    return [
        {"in.safetensors": safetensors.torch.save(tensors, {"format": "pt"})},
        {"in.safetensors": safetensors.torch.save({"a": torch.zeros(2, 2), "b": torch.ones(3).half()})},
        {"in.safetensors": safetensors.torch.save({"s": torch.tensor(1.0)}, {"k": "v", "k2": ""})},
    ]


def _as_safetensors(folder: Path, found: Read) -> bool:
    theirs = safetensors.torch.load((folder / "in.safetensors").read_bytes())
    _require_all(found, theirs)
    return bool(theirs)


def _require_all(found: Read, theirs: dict[str, torch.Tensor]) -> None:
    checkpoint, tensors = found
    if all(name.isprintable() for name in theirs):
        require_names(checkpoint, theirs)
    for name in set(tensors) & set(theirs):
        require_tensor(name, tensors[name], theirs[name])


def _index_seeds(folder: Path) -> list[Case]:
    first, second = {"a": torch.zeros(2, 2), "b": torch.ones(3)}, {"c": torch.arange(4)}
    shards = {"m-1.safetensors": first, "m-2.safetensors": second}
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = json.dumps({"metadata": {"total_size": 60}, "weight_map": weight_map}).encode()
    files = {name: safetensors.torch.save(tensors) for name, tensors in shards.items()}
    torch_files = {name.replace("safetensors", "bin"): _saved(tensors, True) for name, tensors in shards.items()}
    torch_index = index.replace(b".safetensors", b".bin")
    return [
        {**files, "model.safetensors.index.json": index},
        {**files, "model.safetensors.index.json": index, "config.json": b'{"model_type": "x"}'},
        {**torch_files, "pytorch_model.bin.index.json": torch_index},
    ]


def _index_change(rng: Random, case: Case, corpus: list[Case]) -> Case:
    """Mostly the index and the companions: the shards have targets of their own."""
    if rng.random() < 0.2:
        return change(rng, case, corpus)
    return change(rng, case, corpus, keep=lambda name: not name.endswith(".json"))


def _as_shards(folder: Path, found: Read) -> bool:
    checkpoint, _ = found
    if checkpoint.format != "safetensors-sharded":
        return False
    theirs: dict[str, torch.Tensor] = {}
    weight_map = json.loads(checkpoint.files[0].read_bytes())["weight_map"]
    for name, shard in weight_map.items():
        theirs[name] = safetensors.torch.load((checkpoint.files[0].parent / shard).read_bytes())[name]
    _require_all(found, theirs)
    return bool(theirs)


def _npz_seeds(folder: Path) -> list[Case]:
    arrays = {
        "params/a": np.arange(6, dtype="<f4").reshape(2, 3),
        "b": np.asfortranarray(np.arange(6, dtype=">f8").reshape(3, 2)),
        "c": np.array(1.5, "<f2"),
        "flag": np.array([True, False]),
        "ids": np.arange(3),
        "empty": np.zeros((0, 4), "<f4"),
    }
    texts = {"names": np.array(["a", "bc"]), "bytes": np.array([b"x", b"yz"]), "w": np.ones((2, 2), "<c8")}
    made = []
    for save, content in ((np.savez, arrays), (np.savez_compressed, arrays), (np.savez, texts)):
        stream = io.BytesIO()
        save(stream, **content)
        made.append({"in.npz": stream.getvalue()})
    return made


def _as_numpy(folder: Path, found: Read) -> bool:
    _, tensors = found
    compared = False
    try:
        archive = np.load(folder / "in.npz", allow_pickle=False)
    except Exception:
        return False
    with archive:
        for name, tensor in tensors.items():
            try:
                theirs = archive[name]
            except Exception:
                continue
            require_array(name, tensor, theirs)
            compared = True
    return compared


def _zarr_seeds(folder: Path) -> list[Case]:
    pack = zstandard.ZstdCompressor().compress
    array = np.arange(12, dtype="<f4").reshape(4, 3)

    def files(name: str, chunk: tuple[int, int], compress: Callable[[bytes], bytes] | None, separator: str) -> Case:
        stated = {
            "zarr_format": 2, "shape": [4, 3], "chunks": list(chunk), "dtype": "<f4", "order": "C", "fill_value": None,
            "filters": None, "compressor": {"id": "zstd", "level": 1} if compress else None,
            "dimension_separator": separator,
        }  # fmt: skip
        made = {f"{name}/.zarray": json.dumps(stated).encode()}
        for i in range(-(-4 // chunk[0])):
            for j in range(-(-3 // chunk[1])):
                padded = np.zeros(chunk, "<f4")
                part = array[i * chunk[0] : (i + 1) * chunk[0], j * chunk[1] : (j + 1) * chunk[1]]
                padded[: part.shape[0], : part.shape[1]] = part
                data = padded.tobytes()
                made[f"{name}/{i}{separator}{j}"] = compress(data) if compress else data
        return made

    last = {"checkpoint.bv-LAST": b"000001000"}
    step = "checkpoint.bv-000001000"
    return [
        {**files(f"{step}/params~a", (2, 3), pack, "."), **files(f"{step}/params~b", (4, 2), None, "."), **last},
        {**files(f"{step}/params~a", (3, 2), pack, "/"), **files(f"{step}/opt~a", (4, 3), pack, "."), **last},
        {**files("params~x", (4, 3), pack, ".")},
    ]


def _zarr_change(rng: Random, case: Case, corpus: list[Case]) -> Case:
    made = dict(case)
    chunks = [name for name in made if not name.endswith((".zarray", "LAST"))]
    if chunks and rng.random() < 0.2:  # a chunk whose content is other, packed well
        name = rng.choice(chunks)
        try:
            data = zstandard.ZstdDecompressor().decompress(made[name], max_output_size=1 << 20)
        except zstandard.ZstdError:
            return change(rng, case, corpus)
        made[name] = zstandard.ZstdCompressor().compress(mutation.of_bytes(rng, data))
        return made
    return change(rng, case, corpus)


def _as_chunks(folder: Path, found: Read) -> bool:
    """Chunks put together by numpy: zarr itself is no dependency."""
    checkpoint, tensors = found
    compared = False
    for name, tensor in tensors.items():
        place = checkpoint.path / name.replace("/", "~")
        if not place.is_dir() or not tensor.numel():
            continue
        stated = json.loads((place / ".zarray").read_bytes())
        if stated["dtype"] == "bfloat16":
            continue
        require_array(name, tensor, _assembled(place, stated))
        compared = True
    return compared


def _assembled(place: Path, stated: dict[str, Any]) -> np.ndarray[Any, Any]:
    shape, chunk, kind = stated["shape"], stated["chunks"], np.dtype(stated["dtype"])
    whole = np.zeros(shape, kind)
    grid = [range(-(-length // step)) for length, step in zip(shape, chunk)]
    for at in np.ndindex(*map(len, grid)):
        name = stated.get("dimension_separator", ".").join(map(str, at)) or "0"
        data = (place / name).read_bytes()
        if stated.get("compressor"):
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
        part = np.frombuffer(data[: prod(chunk) * kind.itemsize], kind).reshape(chunk)
        target = tuple(slice(i * step, min((i + 1) * step, length)) for i, step, length in zip(at, chunk, shape))
        whole[target] = part[tuple(slice(0, each.stop - each.start) for each in target)]
    return whole


TARGETS = (
    Target(
        "torch-zip",
        partial(_torch_seeds, True),
        _or_drawn(partial(_drawn_torch, True)),
        partial(_read, "in.pt"),
        _as_torch,
    ),
    Target(
        "torch-legacy",
        partial(_torch_seeds, False),
        _or_drawn(partial(_drawn_torch, False)),
        partial(_read, "in.pt"),
        _as_torch,
    ),
    Target("pickle-grammar", _grammar_seeds, _grown, partial(_read, "in.pt"), _as_torch),
    Target(
        "safetensors",
        _safetensors_seeds,
        _or_drawn(_drawn_safetensors),
        partial(_read, "in.safetensors"),
        _as_safetensors,
    ),
    Target("sharded", _index_seeds, _index_change, partial(_read, ""), _as_shards),
    Target("npz", _npz_seeds, _or_drawn(_drawn_npz), partial(_read, "in.npz"), _as_numpy),
    Target("zarr", _zarr_seeds, _zarr_change, partial(_read, ""), _as_chunks),
)
