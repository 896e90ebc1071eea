"""The proof of a merge's weights: planted mistakes are seen, correct merges pass by every way through it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from matrix import write_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_models import write_adapter

from weightport.adapters.merging import second_computation
from weightport.adapters.merging.merge import MergeOptions, Written
from weightport.adapters.merging.weights_check import TensorProof, WeightsProof, check_weights
from weightport.api import merge_lora
from weightport.errors import ParityError
from weightport.writing.hashed_file import HashedFile

CHANGED = "model.layers.0.mlp.gate_proj.weight"
OTHER = "model.layers.0.mlp.up_proj.weight"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several blocks, which end within rows."""
    monkeypatch.setattr(second_computation, "BLOCK_ELEMENTS", 100)


def judged(
    folder: Path,
    dtype: torch.dtype,
    judge: Callable[[Written], None],
    *,
    adapter_change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    options: MergeOptions | None = None,
) -> None:
    """Merge an adapter into a tiny Llama of `dtype` and let `judge` see the finished files."""
    base = write_model("llama", folder / "base", dtype)
    adapter = write_adapter(base, folder / "adapter", LoraConfig(r=4, target_modules="all-linear"))
    if adapter_change is not None:
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        adapter_change(tensors)
        save_file(tensors, file, {"format": "pt"})
    merge_lora(base, [(adapter, 1.0)], folder / "out", options, check=judge)


def again(written: Written) -> float:
    """How far the files lie, read again."""
    found = check_weights(written.folder, written.plan, written.adapters, written.weights)
    assert found.compared == found.changed > 1
    return found.furthest


def spoil(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Written], None]:
    def judge(written: Written) -> None:
        path = written.folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        again(written)

    return judge


def one_element(place: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """Two roundings more, of one element; of float64, which no wider arithmetic rounds, more than its sums'."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[CHANGED].view(-1)
        roundings = 1000 if flat.dtype == torch.float64 else 2.5
        largest = int(flat.abs()[place:].argmax()) + place if place >= 0 else place
        flat[largest] *= 1 + roundings * torch.finfo(flat.dtype).eps

    return change


def exchanged(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CHANGED], tensors[OTHER] = tensors[OTHER], tensors[CHANGED]


def scaled(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CHANGED] *= 1.01


def turned(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CHANGED] = tensors[CHANGED].roll(1, 0)


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CHANGED].view(-1)[7] = float("nan")


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CHANGED].view(-1)[7] = float("inf")


MISTAKES = {
    "first-block": one_element(0),
    "last-element": one_element(-1),
    "exchanged": exchanged,
    "scaled": scaled,
    "turned": turned,
    "nan": not_a_number,
    "infinity": infinite,
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_planted_mistake_is_seen(mistake: str, dtype: torch.dtype, tmp_path: Path, small_blocks: None) -> None:
    with pytest.raises(ParityError, match="computed a second time"):
        judged(tmp_path, dtype, spoil(MISTAKES[mistake]))
    assert not (tmp_path / "out").exists()


def test_mistake_of_the_merge_is_seen_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightport.adapters.merging import low_rank_delta

    def wrong(self: low_rank_delta.LowRank, start: int, stop: int, out: torch.Tensor) -> None:
        torch.mm(self.left[start:stop], self.right * 1.02, out=out)

    monkeypatch.setattr(low_rank_delta.LowRank, "rows", wrong)
    with pytest.raises(ParityError, match="computed a second time"):
        judged(tmp_path, torch.float16, lambda written: None)
    assert not (tmp_path / "out").exists()


def test_what_is_proven_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that turns on its way to the file, after the merge's own arithmetic."""
    write = HashedFile.write

    def turning(self: HashedFile, data: memoryview | bytes) -> None:
        spoiled = bytearray(data)
        spoiled[len(spoiled) // 2 | 1] ^= 0x10
        write(self, memoryview(spoiled) if len(spoiled) > 2000 and spoiled[8:9] != b"{" else data)

    monkeypatch.setattr(HashedFile, "write", turning)
    with pytest.raises(ParityError, match="computed a second time"):
        judged(tmp_path, torch.float16, lambda written: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_correct_merge_passes_screened_and_computed_exactly(
    dtype: torch.dtype, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(written: Written) -> None:
        screened = again(written)
        monkeypatch.setattr(TensorProof, "_screened", lambda *arguments: False)
        exact = again(written)
        # What a screened block is said to be off by is a bound of what it is.
        assert exact <= screened <= 1

    judged(tmp_path, dtype, judge)


def test_differing_bits_are_computed_exactly(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbouring float16 where the sum lies between two: no mistake, and no equal bits either."""

    def judge(written: Written) -> None:
        def add_to(
            self: second_computation.SecondComputation, place: second_computation.Rectangle, sums: torch.Tensor
        ) -> None:
            sums += self.added(place, torch.empty_like(sums)).mul_(1 + 2e-3)

        monkeypatch.setattr(second_computation.SecondComputation, "add_to", add_to)
        assert again(written) <= 1

    judged(tmp_path, torch.float16, judge)


def test_infinity_in_both_computations_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_to = second_computation.SecondComputation.add_to

    def overflowing(
        self: second_computation.SecondComputation, place: second_computation.Rectangle, sums: torch.Tensor
    ) -> None:
        add_to(self, place, sums)
        if place.rows[0] == 0:
            sums.view(-1)[7] = float("inf")

    monkeypatch.setattr(second_computation.SecondComputation, "add_to", overflowing)
    with pytest.raises(ParityError, match="computed a second time"):
        judged(tmp_path, torch.float16, spoil(infinite))


def test_not_a_number_is_not_forgotten_for_a_later_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every block is computed exactly: a distance of NaN is the furthest."""
    monkeypatch.setattr(second_computation, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(TensorProof, "_screened", lambda *arguments: False)
    with pytest.raises(ParityError, match="computed a second time"):
        judged(tmp_path, torch.float16, spoil(not_a_number))


def test_change_that_cancels_the_base_is_computed_exactly(tmp_path: Path) -> None:
    """Pairs whose products are far larger than the base's values: float32's own error is no proof there."""
    seen: list[bool] = []
    screened = TensorProof._screened

    def watched(self: TensorProof, *arguments: object) -> bool:
        seen.append(screened(self, *arguments))  # type: ignore[arg-type]
        return seen[-1]

    def larger(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name] *= 3000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorProof, "_screened", watched)
        judged(tmp_path, torch.bfloat16, lambda written: None, adapter_change=larger)
    assert False in seen


@pytest.mark.parametrize("run", [1, 7, 100, 4099])
def test_runs_of_any_length_give_one_result(run: int, tmp_path: Path, small_blocks: None) -> None:
    def judge(written: Written) -> None:
        proof = WeightsProof(written.plan, written.adapters, written.weights)
        watch = proof.shard("model.safetensors")
        content = bytearray((written.folder / "model.safetensors").read_bytes())
        for start in range(0, len(content), run):
            watch(memoryview(content)[start : start + run])
        assert proof.result().compared == proof.result().changed > 1

    judged(tmp_path, torch.bfloat16, judge)


def test_file_that_ends_early_is_no_proof(tmp_path: Path) -> None:
    def judge(written: Written) -> None:
        proof = WeightsProof(written.plan, written.adapters, written.weights)
        content = bytearray((written.folder / "model.safetensors").read_bytes())
        proof.shard("model.safetensors")(memoryview(content)[: len(content) // 2])
        with pytest.raises(ParityError, match="is not in the files as written"):
            proof.result()

    judged(tmp_path, torch.float32, judge)


def test_tensor_under_another_shape_is_no_proof(tmp_path: Path) -> None:
    def judge(written: Written) -> None:
        path = written.folder / "model.safetensors"
        tensors = load_file(path)
        tensors[CHANGED] = tensors[CHANGED].T.contiguous()
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ParityError, match="the file as written has"):
            again(written)

    judged(tmp_path, torch.float32, judge)


def test_other_dtype_of_the_output_is_proven(tmp_path: Path, small_blocks: None) -> None:
    for number, dtype in enumerate((torch.float16, torch.float32)):
        judged(
            tmp_path / str(number),
            torch.bfloat16 if dtype == torch.float32 else torch.float32,
            lambda written: None,
            options=MergeOptions(dtype=dtype),
        )
