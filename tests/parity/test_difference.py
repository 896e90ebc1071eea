"""`weightport compare`: what two checkpoints share, and the largest difference with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from weightport import cli
from weightport.parity import difference
from weightport.parity.difference import Sameness, compare_weights

WEIGHTS = {
    "encoder.layers.0.fc1.weight": torch.arange(12.0).reshape(3, 4) + 1,
    "encoder.layers.0.fc1.bias": torch.ones(3),
    "decoder.norm.weight": torch.full((4,), 2.0),
    "decoder.version": torch.tensor([3]),
}


@pytest.fixture
def saved(tmp_path: Path):
    def save(name: str, **changes: torch.Tensor | None) -> Path:
        tensors = {**WEIGHTS, **{key.replace("__", "."): value for key, value in changes.items()}}
        save_file({key: value for key, value in tensors.items() if value is not None}, tmp_path / name)
        return tmp_path / name

    return save


def by_name(a: Path, b: Path, **settings) -> dict[str, difference.TensorDifference]:
    return {each.name: each for each in compare_weights(a, b, **settings).tensors}


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["compare", *map(str, arguments)])


def test_equal_weights_of_another_format_are_equal(saved, tmp_path) -> None:
    torch.save(dict(WEIGHTS), tmp_path / "b.pt")
    report = compare_weights(saved("a.safetensors"), tmp_path / "b.pt")
    assert report.passed and {each.sameness for each in report.tensors} == {Sameness.EQUAL}
    assert report.verdict == "same weights: 4 equal"


@pytest.mark.parametrize("chunk", [difference.CHUNK, 5])
def test_largest_difference_is_found_at_its_index(saved, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(difference, "CHUNK", chunk)
    changed = WEIGHTS["encoder.layers.0.fc1.weight"].clone()
    changed[0, 1] += 0.25
    changed[2, 1] -= 0.5
    found = by_name(saved("a.safetensors"), saved("b.safetensors", encoder__layers__0__fc1__weight=changed))
    each = found["encoder.layers.0.fc1.weight"]
    assert (each.sameness, each.largest, each.index, each.a, each.b) == (Sameness.DIFFERENT, 0.5, (2, 1), 10.0, 9.5)
    assert each.module == "encoder.layers.0.fc1"
    assert each.scale == pytest.approx(float(WEIGHTS["encoder.layers.0.fc1.weight"].square().mean().sqrt()))


def test_close_is_relative_to_the_tensor_and_passes(saved) -> None:
    a, b = saved("a.safetensors"), saved("b.safetensors", decoder__norm__weight=torch.full((4,), 2.0 + 2e-5))
    assert by_name(a, b)["decoder.norm.weight"].sameness is Sameness.DIFFERENT
    assert by_name(a, b, tolerance=1e-4)["decoder.norm.weight"].sameness is Sameness.CLOSE
    assert command(a, b).exit_code == 1 and command(a, b, "--tolerance", "1e-4").exit_code == 0


def test_tensor_of_one_side_fails_and_is_named(saved) -> None:
    a, b = saved("a.safetensors", extra=torch.ones(2)), saved("b.safetensors", decoder__norm__weight=None)
    found = by_name(a, b)
    assert found["extra"].sameness is found["decoder.norm.weight"].sameness is Sameness.ONLY_A
    assert by_name(b, a)["extra"].sameness is Sameness.ONLY_B
    result = command(a, b)
    assert result.exit_code == 1 and "2 only in A" in result.output and "decoder.norm" in result.output


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.full((2, 2), 2.0), "[4] in A, float32 [2, 2] in B"),
        (torch.tensor([2.0, torch.nan, 2.0, 2.0]), "NaN in B only, first at [1]"),
        (torch.tensor([2.0, 2.0, torch.inf, 2.0]), "infinite in one of them only, at [2]"),
    ],
)
def test_what_no_tolerance_forgives(saved, value: torch.Tensor, says: str) -> None:
    a, b = saved("a.safetensors"), saved("b.safetensors", decoder__norm__weight=value)
    each = by_name(a, b, tolerance=1e9)["decoder.norm.weight"]
    assert each.sameness is Sameness.DIFFERENT and says in each.note
    json.loads(command(a, b, "--json").output)


def test_same_not_a_number_on_both_sides_is_equal(saved) -> None:
    broken = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0])
    a = saved("a.safetensors", decoder__norm__weight=broken)
    assert compare_weights(a, saved("b.safetensors", decoder__norm__weight=broken.clone())).passed


def test_equal_values_of_another_dtype_are_close_and_both_are_named(saved) -> None:
    half = WEIGHTS["decoder.norm.weight"].to(torch.bfloat16)
    each = by_name(saved("a.safetensors"), saved("b.safetensors", decoder__norm__weight=half))["decoder.norm.weight"]
    assert each.sameness is Sameness.CLOSE and each.note == "float32 in A, bfloat16 in B"


def test_whole_numbers_and_empty_tensors_are_compared(saved) -> None:
    a = saved("a.safetensors", empty=torch.zeros(0, 4))
    b = saved("b.safetensors", empty=torch.zeros(0, 4), decoder__version=torch.tensor([4]))
    found = by_name(a, b)
    assert found["empty"].sameness is Sameness.EQUAL
    assert found["decoder.version"].sameness is Sameness.DIFFERENT and found["decoder.version"].b == 4.0


def test_each_tensor_is_read_once_and_alone(saved, monkeypatch) -> None:
    read: list[str] = []
    original = difference.TensorRef.read
    monkeypatch.setattr(difference.TensorRef, "read", lambda self: read.append(self.name) or original(self))
    compare_weights(saved("a.safetensors"), saved("b.safetensors"))
    assert sorted(read) == sorted([*WEIGHTS, *WEIGHTS])
    assert all(read[i] == read[i + 1] for i in range(0, len(read), 2))


def test_json_names_what_differs_by_module(saved) -> None:
    a, b = saved("a.safetensors"), saved("b.safetensors", decoder__norm__weight=torch.zeros(4))
    result = command(a, b, "--json")
    data = json.loads(result.output)
    assert result.exit_code == 1 and data["passed"] is False
    assert data["modules"]["decoder.norm"]["different"] == 1
    assert [each["name"] for each in data["tensors"]] == ["decoder.norm.weight"]


def test_missing_checkpoint_is_one_error(saved, tmp_path) -> None:
    result = command(saved("a.safetensors"), tmp_path / "absent")
    assert result.exit_code != 0 and "absent" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("swapped", [False, True])
def test_a_trainers_state_beside_the_model_is_named_and_left_out(tmp_path, swapped: bool) -> None:
    sections = {"model": dict(WEIGHTS), "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    torch.save(sections, tmp_path / "original.pt")
    torch.save({"model": dict(WEIGHTS), "last_optimizer_state": None}, tmp_path / "back.pt")
    files = (tmp_path / "original.pt", tmp_path / "back.pt")
    result = command(*(reversed(files) if swapped else files))
    assert result.exit_code == 0, result.output
    side = "B" if swapped else "A"
    assert f"left out of {side}: last_optimizer_state (1 tensors), a trainer's state and no model" in result.output
    assert "same weights: 4 equal" in result.output
    # Where both hold it, it is compared.
    sections["last_optimizer_state"] = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    torch.save(sections, tmp_path / "other.pt")
    result = command(tmp_path / "original.pt", tmp_path / "other.pt")
    assert result.exit_code == 1 and "different weights: 4 equal, 1 different" in result.output, result.output


def test_a_section_that_may_be_a_model_is_never_left_out(tmp_path) -> None:
    torch.save({"model": dict(WEIGHTS), "ema_model": dict(WEIGHTS)}, tmp_path / "a.pt")
    torch.save({"model": dict(WEIGHTS)}, tmp_path / "b.pt")
    report = compare_weights(tmp_path / "a.pt", tmp_path / "b.pt")
    assert report.count(Sameness.ONLY_A) == 4 and not report.left_out


def test_a_model_below_a_key_is_compared_with_one_at_the_top(saved, tmp_path) -> None:
    nested = {f"module._orig_mod.{name}": tensor for name, tensor in WEIGHTS.items()}
    torch.save({"model_state_dict": nested, "optimizer_state_dict": {"m": torch.ones(2)}}, tmp_path / "dump.pt")
    result = command(tmp_path / "dump.pt", saved("b.safetensors"))
    assert result.exit_code == 0, result.output
    assert "the model of A stands below model_state_dict.module._orig_mod." in result.output
    assert "left out of A: optimizer_state_dict (1 tensors)" in result.output
    assert compare_weights(
        tmp_path / "dump.pt", saved("b.safetensors", decoder__version=torch.tensor([4]))
    ).passed is (False)


def test_the_table_is_as_wide_as_columns_says(saved, monkeypatch) -> None:
    name = "encoder." + "deep." * 60 + "weight"
    files = saved("a.safetensors", **{name: torch.ones(2)}), saved("b.safetensors", **{name: torch.zeros(2)})
    for columns, most in (("60", 60), ("150", 150), (None, 200)):
        monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
        widths = [len(line.rstrip()) for line in command(*files).output.splitlines()]
        assert most - 20 < max(widths) <= most, columns
