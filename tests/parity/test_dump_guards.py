"""What every reference script refuses, and what all of them repeat word for word."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from original_stand_ins import SCRIPTS, script
from torch import nn

from weightport.parity import read_reference

NAMES = sorted(path.stem for path in SCRIPTS.glob("dump_*.py"))
TORCH_NAMES = [name for name in NAMES if name != "dump_paligemma2"]
TRAIN = {"train": {"kind": "train"}}


def true_tensors() -> dict[str, np.ndarray]:
    return {
        "train/in/labels": np.zeros(3, dtype=np.int64),
        "train/out/loss": np.float32([0.5]),
        "train/out/loss@float64": np.float64([1 / 3]),
        "train/out/grad_norm.w": np.float64([0.25]),
        "train/out/grad.w": np.float32([0.0, 0.25]),
    }


@pytest.fixture(params=NAMES)
def dump(request):
    return script(request.param)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("train/out/loss", np.float32([np.nan]), "train/out/loss holds NaN"),
        ("train/out/loss", np.float32([np.inf]), "train/out/loss holds NaN or infinity"),
        ("train/in/pixels", np.float32([np.nan]), "train/in/pixels holds NaN"),
        ("train/out/grad.w", np.zeros(2, dtype=np.float32), "train/out/grad.w is all zeros"),
        ("train/out/grad_norm.w", np.float64([0.0]), "train/out/grad_norm.w is all zeros"),
        ("train/out/grad_norm.w", None, "run train has no gradient"),
        ("train/out/loss@float64", np.float64(np.float32([1 / 3])), "went through float32"),
        ("train/out/nll@float64", np.float32([1 / 3]), "went through float32"),
    ],
)
def test_wrong_reference_is_refused_and_leaves_no_file(dump, name, value, said, tmp_path: Path) -> None:
    tensors = true_tensors()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    out = tmp_path / "reference.safetensors"
    with pytest.raises(dump.DumpError, match=said):
        dump.write(str(out), "ofa", {}, TRAIN, tensors)
    assert list(tmp_path.iterdir()) == []


def test_run_without_outputs_is_refused(dump, tmp_path: Path) -> None:
    runs = {"forward": {"kind": "forward"}}
    with pytest.raises(dump.DumpError, match="run forward has no output"):
        dump.write(str(tmp_path / "r"), "ofa", {}, runs, {"forward/in/ids": np.zeros(1)})


def test_a_failed_write_leaves_the_earlier_reference_and_nothing_else(dump, tmp_path: Path, monkeypatch) -> None:
    import safetensors.numpy

    out = tmp_path / "reference.safetensors"
    dump.write(str(out), "ofa", {}, dict(TRAIN), true_tensors())
    before = out.read_bytes()

    def half(arrays, path, metadata=None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        dump.write(str(out), "ofa", {}, dict(TRAIN), true_tensors())
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def test_gradient_that_may_be_zero_is_written(dump, tmp_path: Path) -> None:
    tensors = true_tensors() | {"train/out/grad_norm.unused.bias": np.float64([0.0])}
    dump.write(str(tmp_path / "r"), "ofa", {}, dict(TRAIN), tensors, may_be_zero=["unused.*"])
    assert (tmp_path / "r").is_file()


def test_file_says_which_seams_it_holds_in_both_precisions(dump, tmp_path: Path) -> None:
    runs = {"train": {"kind": "train"}}
    dump.write(str(tmp_path / "r"), "ofa", {}, runs, true_tensors())
    assert runs["train"]["both_precisions"] == ["loss"]
    assert [run.name for run in read_reference(tmp_path / "r").runs] == ["train"]


@pytest.mark.parametrize(
    ("wanted", "free", "kinds", "said"),
    [
        (None, 400, ("forward", "train"), ""),
        (None, 399, ("forward",), "train"),
        (None, 100, (), "forward .* train"),
        (None, None, ("forward", "train"), ""),
        (True, 1, ("forward", "train"), ""),
        (False, 10**9, (), "--no-float64"),
    ],
)
def test_float64_runs_are_made_where_the_memory_is_there(dump, wanted, free, kinds, said, monkeypatch) -> None:
    monkeypatch.setattr(dump, "free_memory", lambda: free)
    found, why = dump.float64_runs(100, wanted)
    assert found == kinds
    assert bool(why) == bool(said)
    if said:
        import re

        assert re.search(said, why)


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_the_default_and_can_be_left_out(name: str) -> None:
    import argparse

    dump, parser = script(name), argparse.ArgumentParser()
    dump.shared_options(parser)
    assert [parser.parse_args(given).float64 for given in ([], ["--float64"], ["--no-float64"])] == [None, True, False]


class Casts(nn.Module):
    """Every cast that an original has been seen to make."""

    def forward(self, x: torch.Tensor, half: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "softmax": nn.functional.softmax(x, dim=-1, dtype=torch.float32),
            "log_softmax": torch.log_softmax(x, -1, dtype=torch.float32),
            "gelu": nn.functional.gelu(x.float()).type_as(x),
            "logits.float()": (x * 3).float(),
            "x.to(float32)": x.to(torch.float32) / 3,
            "x.to(dtype=)": x.to(dtype=torch.float32) / 3,
            "x.to(other)": x.to(half) / 3,
            "x.type(float32)": x.type(torch.float32) / 3,
            "x.type(name)": x.type("torch.FloatTensor") / 3,
            "x.type_as(other)": x.type_as(half) / 3,
            "x.half()": x.half() / 3,
        }


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_nothing_that_is_float64_becomes_narrower(name: str) -> None:
    dump = script(name)
    x, half = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4).exp(), torch.ones(1, dtype=torch.float16)
    before = dict(vars(torch.Tensor))
    with dump.keeping_float64():
        found = Casts()(x, half)
        assert half.float().dtype == torch.float32
        assert (
            x.to(torch.int64).dtype == torch.int64 and x.type_as(torch.ones(1, dtype=torch.int64)).dtype == torch.int64
        )
    exact = {"softmax": x.softmax(-1), "log_softmax": x.log_softmax(-1), "gelu": nn.functional.gelu(x),
             "logits.float()": x * 3}  # fmt: skip
    for key, value in found.items():
        assert value.dtype == torch.float64, key
        torch.testing.assert_close(value, exact.get(key, x / 3), rtol=0, atol=1e-15)
    assert dict(vars(torch.Tensor)) == before
    assert Casts()(x, half)["softmax"].dtype == torch.float32


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_what_is_kept_does_not_change_with_the_tensor(name: str) -> None:
    dump = script(name)
    for tensor in (torch.ones(2), torch.ones(2, dtype=torch.bfloat16)):
        kept = dump.array_of(tensor)
        tensor.zero_()
        assert kept.tolist() == [1.0, 1.0]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)


@pytest.mark.parametrize("name", TORCH_NAMES)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda stored: stored.pop("fc.bias"), "the checkpoint has no fc.bias"),
        (lambda stored: stored["fc.bias"].add_(1), "other values than the checkpoint holds: fc.bias"),
        (lambda stored: stored.update({"fc.bias": torch.ones(3)}), "other values than the checkpoint holds: fc.bias"),
    ],
)
def test_model_that_does_not_compute_with_the_files_weights_is_refused(name: str, change, said: str) -> None:
    dump, model = script(name), Layer()
    stored = {key: tensor.clone() for key, tensor in model.state_dict().items() if "num_batches" not in key}
    dump.refuse_other_weights(model, stored, ("*num_batches_tracked",))
    change(stored)
    with pytest.raises(dump.DumpError, match=said):
        dump.refuse_other_weights(model, stored, ("*num_batches_tracked",))


def test_what_the_scripts_repeat_is_the_same_in_all_of_them() -> None:
    trees = {name: ast.parse((SCRIPTS / f"{name}.py").read_text(encoding="utf-8")) for name in NAMES}
    repeated: dict[str, dict[str, set[str]]] = {}
    shared = [
        "DumpError", "array_of", "keeping_float64", "refuse_other_weights", "float64_runs", "load_pickle", "matches",
        "listed", "free_memory", "refuse_wrong", "rounded", "write", "commit_of", "shared_options",
        "StandIns", "AbsentModule", "AbsentClass", "absent", "standing_in", "computing", "without_flash_attention",
    ]  # fmt: skip
    for name, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in shared:
                if name == "dump_paligemma2" and node.name == "array_of":
                    continue
                repeated.setdefault(node.name, {}).setdefault(ast.dump(node), set()).add(name)
    assert set(repeated) == set(shared)
    assert {name: list(versions.values()) for name, versions in repeated.items() if len(versions) > 1} == {}
