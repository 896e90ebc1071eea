"""The streaming writer: what stands in the files, held against the safetensors library."""

from __future__ import annotations

import hashlib
import json
import os
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from weightport.checkpoints import TensorRef, lazy_tensors
from weightport.checkpoints.types import NamedTensors
from weightport.converters.native import NativeTensors
from weightport.converters.plan import plan
from weightport.converters.rules import move, permute, split, table, tie
from weightport.errors import CoverageError, NonFiniteError
from weightport.writing.safetensors_shards import lay_out, write_shards


def refs(tensors: dict[str, torch.Tensor]) -> NamedTensors:
    return NamedTensors(TensorRef.of(n, tuple(t.shape), t.dtype, lambda t=t: t, (n,)) for n, t in tensors.items())


def made(tensors, rules, shapes, **options):
    return plan(refs(tensors), rules, NativeTensors(shapes), **options)


def test_files_load_with_the_safetensors_library_and_hold_the_same_bits(tmp_path):
    tensors = {
        "half": torch.randn(5, 3).half(),
        "bf": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(2, 3, dtype=torch.float64),
    }
    done = made(tensors, table(move("**", "out.**")), {"out." + n: tuple(t.shape) for n, t in tensors.items()})
    (file,) = write_shards(lay_out(done.targets, 10**9), tmp_path, allow_nonfinite=False)
    loaded = load_file(tmp_path / file.file)
    assert loaded.keys() == {"out." + name for name in tensors}
    for name, tensor in tensors.items():
        assert loaded["out." + name].dtype == tensor.dtype
        assert torch.equal(loaded["out." + name], tensor)
    content = (tmp_path / file.file).read_bytes()
    assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with safe_open(tmp_path / file.file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_views_of_every_operation_are_written_contiguously(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", 64)  # several chunks a tensor
    tensors = {"m": torch.randn(9, 31), "qkv": torch.randn(12, 5)}
    rules = table(permute("m", "t"), split("qkv", into=("q", "k", "v"), dim=0))
    done = made(tensors, rules, {"t": (31, 9), "q": (4, 5), "k": (4, 5), "v": (4, 5)})
    write_shards(lay_out(done.targets, 10**9), tmp_path, allow_nonfinite=False)
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["t"], tensors["m"].T)
    assert torch.equal(torch.cat([loaded["q"], loaded["k"], loaded["v"]]), tensors["qkv"])


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(tmp_path):
    tensors = {f"a{i}": torch.randn(100) for i in range(7)}
    done = made(tensors, table(move("**", "**")), dict.fromkeys(tensors, (100,)))
    shards = lay_out(done.targets, 900)
    write_shards(shards, tmp_path)
    assert len(shards) == 4
    assert all(shard.nbytes <= 900 for shard in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_a_dtype_changes_floating_point_tensors_only(tmp_path):
    tensors = {"w": torch.randn(4), "count": torch.tensor(5)}
    done = made(tensors, table(move("**", "**")), {"w": (4,), "count": ()}, dtype=torch.bfloat16)
    write_shards(lay_out(done.targets, 10**9), tmp_path, allow_nonfinite=False)
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["w"], tensors["w"].bfloat16())
    assert loaded["count"].dtype == torch.int64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_nonfinite_value_is_found_and_named(tmp_path, value, dtype):
    tensor = torch.zeros(100_000, dtype=dtype)
    tensor[77_777] = value
    done = made({"layer.weight": tensor}, table(move("**", "**")), {"layer.weight": (100_000,)})
    with pytest.raises(NonFiniteError, match=r"layer\.weight holds NaN or infinity"):
        write_shards(lay_out(done.targets, 10**9), tmp_path, allow_nonfinite=False)
    write_shards(lay_out(done.targets, 10**9), tmp_path, allow_nonfinite=True)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["layer.weight"].nan_to_num(), tensor.nan_to_num())


def test_a_value_too_large_for_the_chosen_dtype_is_found(tmp_path):
    done = made({"w": torch.tensor([1e6])}, table(move("**", "**")), {"w": (1,)}, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match="dtype too narrow"):
        write_shards(lay_out(done.targets, 10**9), tmp_path, allow_nonfinite=False)


def test_tied_copies_that_differ_are_refused(tmp_path):
    tensors = {"a": torch.zeros(3), "b": torch.tensor([0.0, 0.0, -0.0])}
    done = made(tensors, table(tie("a", "b", to="x")), {"x": (3,)})
    with pytest.raises(CoverageError, match="b and a are one matrix"):
        write_shards(lay_out(done.targets, 10**9), tmp_path, allow_nonfinite=False)


def test_memory_is_bounded_by_a_chunk_and_not_by_the_tensor(tmp_path):
    # 256 MB of zeros that cost nothing until touched, transposed in blocks of 16 MB.
    shape = (8192, 8192)
    path = tmp_path / "zeros"
    with path.open("wb") as file:
        file.truncate(shape[0] * shape[1] * 4)

    def mapped() -> torch.Tensor:
        return torch.from_file(str(path), shared=True, size=shape[0] * shape[1]).view(shape)

    source = NamedTensors([TensorRef.of("m", shape, torch.float32, mapped, ("m",))])
    done = plan(source, table(permute("m", "t")), NativeTensors({"t": shape}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    anonymous_before = _anonymous_kb()
    peak = 0

    def watch(count: int) -> None:
        nonlocal peak
        peak = max(peak, _anonymous_kb())

    write_shards(lay_out(done.targets, 10**10), tmp_path, advance=watch)
    assert before
    assert (tmp_path / "model.safetensors").stat().st_size > shape[0] * shape[1] * 4
    assert peak - anonymous_before < 200_000


def _anonymous_kb() -> int:
    with open(f"/proc/{os.getpid()}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
