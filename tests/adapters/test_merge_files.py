"""What a merge leaves on disk: the base's layout, the base's bytes where nothing changed, a record, or nothing at
all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import applied, load, logits, write_adapter, write_base

from weightport.adapters.base.base_record import record_base
from weightport.adapters.merging.merge import MergeOptions, Written
from weightport.adapters.merging.merge_plan import MergePlan
from weightport.adapters.reading.lora_dumps import merge_dump
from weightport.api import merge_lora
from weightport.checkpoints import TensorRef
from weightport.errors import (
    AdapterError,
    CheckpointError,
    ConfigurationError,
    NonFiniteError,
    OutputError,
    UsageError,
    WeightportError,
)
from weightport.writing.hashed_file import HashedFile

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("llama", tmp_path_factory.mktemp("files") / "base", torch.float16)


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    return write_adapter(
        base, base.parent / "adapter", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )


def test_a_base_that_changes_while_it_is_merged_is_refused(base, trained, tmp_path):
    source = shutil.copytree(base, tmp_path / "base")
    weights = source / "model.safetensors"

    def shrink(_: int) -> None:
        if weights.stat().st_size > 1000:
            os.truncate(weights, 1000)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read: it has shrunk"):
        merge_lora(source, [(trained, 1.0)], tmp_path / "target" / "out", advance=shrink)
    assert not (tmp_path / "target").exists() or not os.listdir(tmp_path / "target")


@pytest.mark.parametrize("changed", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_merge_is_not_recorded_with_the_hash_of_other_bytes(base, trained, tmp_path, changed: str):
    source, lora = shutil.copytree(base, tmp_path / "base"), shutil.copytree(trained, tmp_path / "adapter")
    left = [1]

    def write_in_place(_: int) -> None:
        if left:
            left.clear()
            with open(tmp_path / changed, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"?")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        merge_lora(source, [(lora, 1.0)], tmp_path / "out", advance=write_in_place)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be spoiled."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in trained.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def raw_tensors(path: Path) -> dict[str, tuple[Any, bytes]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    start = 8 + length
    header.pop("__metadata__")
    return {
        name: (
            (entry["dtype"], entry["shape"]),
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def test_an_adapter_that_changes_before_it_is_verified_is_refused(base, trained, tmp_path):
    adapter = Path(shutil.copytree(trained, tmp_path / "adapter"))

    def change(written: Written) -> None:
        os.utime(adapter / "adapter_model.safetensors")

    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: changed while it was read"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out", check=change)
    assert os.listdir(tmp_path) == ["adapter"]


def test_untouched_tensors_keep_their_bytes_and_touched_ones_change(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge = merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    before, after = (raw_tensors(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert list(before) == list(after)
    for name in before:
        assert before[name][0] == after[name][0]
        assert (before[name][1] == after[name][1]) == (not name.endswith(("q_proj.weight", "v_proj.weight"))), name
    assert set(merge.record["changed"]) == {n for n in before if n.endswith(("q_proj.weight", "v_proj.weight"))}
    assert merge.record["unchanged"] == len(before) - 4


def test_record_says_what_was_read_written_and_changed(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = merge_lora(base, [(adapter, 0.5)], tmp_path / "out").directory
    record = json.loads((out / "merge.json").read_text())
    sha = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    assert record["base"]["files"][0]["sha256"] == sha(base / "model.safetensors")
    assert record["files"] == [
        {
            "file": "model.safetensors",
            "size": (out / "model.safetensors").stat().st_size,
            "sha256": sha(out / "model.safetensors"),
        }
    ]
    assert record["adapters"][0]["weight"] == 0.5
    assert sha(adapter / "adapter_model.safetensors") in [file["sha256"] for file in record["adapters"][0]["files"]]
    before, after = (load_file(folder / "model.safetensors")[f"{Q}.weight"].double() for folder in (base, out))
    found = record["changed"][f"{Q}.weight"]
    assert found["from"] == [Q]
    assert found["change"] == pytest.approx(float((after - before).norm()), rel=1e-2)
    assert found["share"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-2)


def test_shards_are_laid_out_as_the_bases(adapter: Path, tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base", torch.float16, max_shard_size="20KB")
    out = merge_lora(base, [(adapter, 1.0)], tmp_path / "out").directory
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((base / index).read_text())
    assert len(list(out.glob("*.safetensors"))) > 2
    for path in base.glob("*.safetensors"):
        assert list(raw_tensors(path)) == list(raw_tensors(out / path.name))
    torch.testing.assert_close(logits(load(out).double()), logits(applied(base, adapter)), rtol=0.02, atol=0.02)


def test_base_in_torch_format_becomes_safetensors(adapter: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    torch.save(load_file(base / "model.safetensors"), folder / "pytorch_model.bin")
    from_torch = merge_lora(folder, [(adapter, 1.0)], tmp_path / "a").directory
    from_safetensors = merge_lora(base, [(adapter, 1.0)], tmp_path / "b").directory
    expected = load_file(from_safetensors / "model.safetensors")
    found = load_file(from_torch / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtype_is_written_to_tensors_and_configuration(
    dtype: torch.dtype, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = merge_lora(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(dtype=dtype)).directory
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
    assert load(out).dtype == dtype


def test_companions_are_kept_and_what_would_be_wrong_is_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for path in base.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    kept = ("generation_config.json", "tokenizer.json", "LICENSE", "modeling_tiny.py", "conversion.json")
    for name in (*kept, "README.md", "pytorch_model.bin", "optimizer.pt", ".gitattributes", "parity.json"):
        (own / name).write_text("{}")
    out = merge_lora(own, [(adapter, 1.0)], tmp_path / "out").directory
    written = {*kept, "config.json", "model.safetensors", "merge.json", ".weightport.json"}
    assert {path.name for path in out.iterdir()} == written


def test_processor_and_records_of_the_training_follow_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    beside = {"processor_config.json": {"size": 256}, "training.json": {"steps": 3}, "metrics.json": {"f1": 1.0}}
    for name, content in beside.items():
        (adapter / name).write_text(json.dumps(content))
    merge_lora(base, [(adapter, 1.0)], tmp_path / "whole")
    assert {name: json.loads((tmp_path / "whole" / name).read_text()) for name in beside} == beside

    merge_lora(base, [(adapter, 0.5)], tmp_path / "half")
    assert (tmp_path / "half" / "processor_config.json").is_file()
    assert not (tmp_path / "half" / "metrics.json").exists(), "half an adapter is not what was measured"

    other = shutil.copytree(adapter, tmp_path / "other")
    (other / "processor_config.json").write_text(json.dumps({"size": 480}))
    plans: list[MergePlan] = []
    merge_lora(base, [(adapter, 1.0), (other, 1.0)], tmp_path / "both", announce=plans.append)
    assert not (tmp_path / "both" / "processor_config.json").exists()
    assert any("different image processors" in note for note in plans[0].notes)


def test_merged_directory_is_merged_into_again_with_its_history(base: Path, adapter: Path, tmp_path: Path) -> None:
    once = merge_lora(base, [(adapter, 1.0)], tmp_path / "once").directory
    twice = merge_lora(once, [(adapter, -1.0)], tmp_path / "twice")
    assert twice.record["base"]["merged"]["adapters"][0]["weight"] == 1.0
    before, after = (
        load_file(folder / "model.safetensors")[f"{Q}.weight"].float() for folder in (base, twice.directory)
    )
    torch.testing.assert_close(before, after, rtol=0.01, atol=1e-3)


def test_names_that_transformers_changes_while_loading_are_found(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A file may lack the leading `model.`, as one of the model without its head does."""
    expected = load_file(merge_lora(base, [(adapter, 1.0)], tmp_path / "plain").directory / "model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("model."): t for name, t in tensors.items()}, old / "model.safetensors", {"format": "pt"}
    )
    found = load_file(merge_lora(old, [(adapter, 1.0)], tmp_path / "out").directory / "model.safetensors")
    assert set(found) == {name.removeprefix("model.") for name in expected}
    assert all(torch.equal(tensor, found[name.removeprefix("model.")]) for name, tensor in expected.items())


def test_names_that_transformers_would_not_load_are_not_guessed(base: Path, adapter: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file(
        {f"language_model.{name}": t for name, t in tensors.items()}, twin / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(AdapterError, match=r"the files of .* do not hold it"):
        merge_lora(twin, [(adapter, 1.0)], tmp_path / "out")


def test_merging_imports_neither_transformers_nor_peft(base: Path, adapter: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from weightport.api import merge_lora;"
        f"merge_lora({str(base)!r}, [({str(adapter)!r}, 1.0)], {str(tmp_path / 'out')!r});"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'transformers', 'peft', 'accelerate'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return spoil


def key(part: str, module: str = Q) -> str:
    return f"base_model.model.{module}.{part}.weight"


SPOILED: dict[str, tuple[Callable[[Path], Any], type[WeightportError], str]] = {
    "half a pair": (change_tensors(lambda t: t.pop(key("lora_B"))), AdapterError, "no lora_B"),
    "no layer of one": (
        change_tensors(lambda t: [t.pop(key("lora_A")), t.pop(key("lora_B"))]),
        AdapterError,
        "incomplete",
    ),
    "NaN": (change_tensors(lambda t: t[key("lora_A")].fill_(float("nan"))), NonFiniteError, "NaN"),
    "infinity": (change_tensors(lambda t: t[key("lora_B")][0].fill_(float("inf"))), NonFiniteError, "infinity"),
    "another size": (
        change_tensors(lambda t: t.update({key("lora_A"): torch.zeros(4, 40)})),
        AdapterError,
        r"weight \[32, 40\], the base's is \[32, 32\]",
    ),
    "another rank": (change_config(r=8), AdapterError, "rank 4, but .* says 8"),
    "another module": (
        change_tensors(
            lambda t: t.update(
                {key(p, "model.layers.9.self_attn.q_proj"): t[key(p)].clone() for p in ("lora_A", "lora_B")}
            )
        ),
        AdapterError,
        "another base",
    ),
    "IA3": (change_config(peft_type="IA3"), AdapterError, "IA3"),
    "AdaLoRA": (change_config(peft_type="ADALORA"), AdapterError, "ADALORA"),
    "PiSSA": (change_config(init_lora_weights="pissa"), AdapterError, "pissa"),
    "layer replication": (change_config(layer_replication=[[0, 2], [1, 2]]), AdapterError, "layer_replication"),
    "activated LoRA": (change_config(alora_invocation_tokens=[1]), AdapterError, "alora"),
    "DoRA without magnitudes": (change_config(use_dora=True), AdapterError, "lora_magnitude_vector"),
    "bad pattern": (change_config(rank_pattern={"(": 2}), AdapterError, "regular expression"),
    "rank of text": (change_config(r="many"), AdapterError, "r is 'many'"),
    "settings that are a list": (lambda a: (a / "adapter_config.json").write_text("[]"), AdapterError, "JSON object"),
    "settings that are no JSON": (lambda a: (a / "adapter_config.json").write_text("{"), CheckpointError, "JSON"),
    "no settings": (lambda a: (a / "adapter_config.json").unlink(), AdapterError, "adapter_config.json"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), CheckpointError, "adapter_model"),
    "truncated": (
        lambda a: (a / "adapter_model.safetensors").write_bytes((a / "adapter_model.safetensors").read_bytes()[:-9]),
        CheckpointError,
        "truncated",
    ),
    "two adapters in one file": (
        change_tensors(
            lambda t: t.update(
                {key("lora_A.other"): t[key("lora_A")].clone(), key("lora_A.default"): t.pop(key("lora_A"))}
            )
        ),
        AdapterError,
        "twice|adapters",
    ),
    "tensor of nothing known": (
        change_tensors(lambda t: t.update({"base_model.model.x.y": torch.ones(2)})),
        AdapterError,
        "x",
    ),
    "integers": (
        change_tensors(lambda t: t.update({key("lora_A"): torch.ones(4, 32, dtype=torch.int8)})),
        AdapterError,
        "torch.int8 .*expected floating-point",
    ),
    "a vector for a pair": (
        change_tensors(lambda t: t.update({key("lora_A"): torch.ones(4)})),
        AdapterError,
        "no pair",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_adapter_is_refused_and_nothing_written(what: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    spoil, error, message = SPOILED[what]
    spoil(adapter)
    with pytest.raises(error, match=message):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "target" / "out")
    assert not (tmp_path / "target").exists()


def test_adapter_of_another_method_is_named(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(base), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(AdapterError, match="IA3"):
        merge_lora(base, [(tmp_path / "ia3", 1.0)], tmp_path / "out")


def test_adapter_that_knows_its_base_meets_no_other(base: Path, adapter: Path, tmp_path: Path) -> None:
    record_base(adapter, base)
    merge_lora(base, [(adapter, 1.0)], tmp_path / "right")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="SHA-256"):
        merge_lora(other, [(adapter, 1.0)], tmp_path / "wrong")


def test_base_that_cannot_be_merged_into_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a model directory"):
        merge_lora(tmp_path / "nothing", [(adapter, 1.0)], tmp_path / "out")
    with pytest.raises(CheckpointError, match="model directory"):
        merge_lora(adapter, [(adapter, 1.0)], tmp_path / "out")
    with pytest.raises(AdapterError, match="not an adapter"):
        merge_lora(base, [(base, 1.0)], tmp_path / "out")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    content = {**json.loads((base / "config.json").read_text()), "quantization_config": {"load_in_4bit": True}}
    (quantised / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="--quantized-base"):
        merge_lora(quantised, [(adapter, 1.0)], tmp_path / "out")


def test_weight_that_is_no_number_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    for adapters, said in (([], "at least one adapter"), ([(adapter, float("nan"))], "has the weight nan; expected")):
        with pytest.raises(UsageError, match=said):
            merge_lora(base, adapters, tmp_path / "out")


def test_change_beyond_float16_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="--dtype"):
        merge_lora(base, [(adapter, 1e6)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_nothing(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: HashedFile, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(OutputError, match="disk is full"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "target" / "out")
    assert not list((tmp_path / "target").iterdir())


def test_interrupted_merge_and_refused_check_leave_what_was_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "target" / "out"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        merge_lora(base, [(adapter, 1.0)], out)

    with pytest.raises(OutputError, match="not written by weightport"):
        merge_lora(base, [(adapter, 1.0)], out, MergeOptions(overwrite=True))
    (out / "mine.txt").unlink()
    merge_lora(base, [(adapter, 1.0)], out)
    before = sorted(path.name for path in (tmp_path / "target").rglob("*"))

    def interrupt(written: Written) -> None:
        assert (written.folder / "merge.json").is_file()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_lora(base, [(adapter, 1.0)], out, MergeOptions(overwrite=True), check=interrupt)
    assert sorted(path.name for path in (tmp_path / "target").rglob("*")) == before


def test_keys_with_the_adapters_own_name_are_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    expected = merge_lora(base, [(adapter, 1.0)], tmp_path / "a").directory / "model.safetensors"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    named = {}
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in names:
        named[name.replace(".lora_A.", ".lora_A.mine.").replace(".lora_B.", ".lora_B.mine.")] = tensors[name]
    save_file(named, adapter / "adapter_model.safetensors")
    found = merge_lora(base, [(adapter, 1.0)], tmp_path / "b").directory / "model.safetensors"
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dump_with_an_adapter_in_it_is_rounded_as_a_merge_is(dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base", dtype)
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj"]))
    stored, prefix = load_file(base / "model.safetensors"), "base_model.model."
    pairs = {k.removeprefix(prefix): v for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    wrapped = {k.removesuffix(".lora_A.weight") for k in pairs if "lora_A" in k}
    dump = {
        (
            f"{name.removesuffix('.weight')}.base_layer.weight" if name.removesuffix(".weight") in wrapped else name
        ): value
        for name, value in stored.items()
    }
    refs = {n: TensorRef.of(n, tuple(v.shape), v.dtype, lambda v=v: v) for n, v in {**dump, **pairs}.items()}
    found, _ = merge_dump(refs, json.loads((adapter / "adapter_config.json").read_text()), "dump")
    expected = load_file(merge_lora(base, [(adapter, 1.0)], tmp_path / "out").directory / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name].read(), value) for name, value in expected.items())


def test_a_merge_verifies_and_a_base_with_a_flipped_bit_is_not_merged_into(base, trained, tmp_path) -> None:
    from weightport.api import verify
    from weightport.writing.ownership import record_folder

    copy = shutil.copytree(base, tmp_path / "base")
    record_folder(copy)
    merge_lora(copy, [(trained, 1.0)], tmp_path / "merged")
    found = verify(tmp_path / "merged")
    assert found.passed and not {path.name for path in (tmp_path / "merged").iterdir()} - {
        *found.hashed, ".weightport.json"
    }  # fmt: skip
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not what .weightport.json recorded"):
        merge_lora(copy, [(trained, 1.0)], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_merge_says_what_is_known_of_the_version_that_wrote_its_base(base) -> None:
    from weightport.adapters.base.base_model import open_base
    from weightport.adapters.merging.merge import _known_of

    source = open_base(base)
    config = {"model_type": "florence2", "transformers_version": "5.0.0"}
    (note,) = _known_of(dataclasses.replace(source, config=config))
    assert "the base's config.json: written by transformers 5.0.0" in note and not _known_of(source)
