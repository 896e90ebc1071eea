"""The first proof of a merge: every changed tensor against base + scaling · B·A, computed a second time.

It looks at the bytes of a file as they are hashed and written, and finds the tensors by the header among them, so that
what is proven is what merge.json has the SHA-256 of. An element counts as right when it is what a computation of known
error rounds to; each other one is computed in float64. What only peft computes (combinations other than the sum) and
what is rounded first (a 4-bit base) is left to the check of the model, and named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from weightport.adapters.merging.combination import SUM
from weightport.adapters.merging.lora_targets import Touched
from weightport.adapters.merging.merge_plan import MergePlan
from weightport.adapters.merging.second_computation import (
    BLOCK_ELEMENTS,
    Rectangle,
    SecondComputation,
    UnknownOrderError,
    rectangles,
)
from weightport.adapters.merging.tensor_edit import Output
from weightport.adapters.reading.lora_tensors import LoraAdapter
from weightport.errors import ParityError
from weightport.writing.safetensors_shards import SAFETENSORS_DTYPES

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_READ_BYTES = 8 << 20
_HALF = 0.5001
"""Half a rounding, and what converting float64 by way of float32 adds to it."""

_SHAPES = 64
"""Shapes of blocks that are kept: nearly all blocks of a tensor have one."""

_SLACK = 64
"""Roundings of the arithmetic's dtype, of the terms of a sum, that a correct merge may be off by before its last
rounding."""


@dataclass(frozen=True)
class WeightsCheck:
    """How many changed tensors were compared, how far an element lies at most in what rounding explains, and what was
    not compared, with the reason."""

    changed: int
    compared: int
    furthest: float
    unchecked: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """As plain data, for merge.json."""
        return {
            "changed": self.changed,
            "compared": self.compared,
            "furthest": self.furthest,
            "unchecked": dict(self.unchecked),
        }


class WeightsProof:
    """The proof of one merge: `shard` watches a file's bytes, `result` says what was found."""

    def __init__(self, plan: MergePlan, adapters: Sequence[LoraAdapter], weights: Sequence[float]) -> None:
        self.plan = plan
        self.weights = tuple(weights)
        self.settings = [
            json.loads((adapter.folder / "adapter_config.json").read_text("utf-8")) for adapter in adapters
        ]
        self.furthest: dict[str, float] = {}
        self.unchecked: dict[str, str] = {}
        self._memory = _Memory()

    def shard(self, file: str) -> ShardWatch:
        """What takes the bytes of the plan's file `file` from its first to its last."""
        return ShardWatch(self, {out.name: out for out in self.plan.shards[file]})

    def tensor(self, out: Output) -> TensorProof | None:
        """The proof of one tensor; None for one that did not change or cannot be compared."""
        if out.edit is None:
            return None
        reason = _why_not(out, self.plan)
        if reason is None:
            try:
                again = SecondComputation(
                    out, self.plan.touched.get(out.name) or Touched(), self.settings, self.weights
                )
                return TensorProof(out, again, self._memory)
            except UnknownOrderError:
                reason = "the files hold its values in an order that the check cannot follow"
        self.unchecked[out.name] = reason
        return None

    def settle(self, out: Output, found: float) -> None:
        """Note how far a tensor lies. Raises ParityError when that is too far."""
        if not found <= 1:
            raise ParityError(
                f"{out.name} as written lies {found:.1f} roundings from base + adapter, computed a second "
                "time; at most one is explained. Nothing was written."
            )
        self.furthest[out.name] = found

    def result(self) -> WeightsCheck:
        """Raises ParityError when a changed tensor was never seen whole."""
        changed = [out.name for out in self.plan.outputs if out.edit is not None]
        missing = [name for name in changed if name not in self.furthest and name not in self.unchecked]
        if missing:
            raise ParityError(f"{missing[0]} is not in the files as written. Nothing was written.")
        return WeightsCheck(len(changed), len(self.furthest), max(self.furthest.values(), default=0.0), self.unchecked)


def check_weights(
    folder: Path, plan: MergePlan, adapters: Sequence[LoraAdapter], weights: Sequence[float]
) -> WeightsCheck:
    """Compare the finished files in `folder` with base and adapters. Raises ParityError when a tensor is wrong."""
    proof = WeightsProof(plan, adapters, weights)
    for file in plan.shards:
        watch = proof.shard(file)
        with (folder / file).open("rb", buffering=0) as stream:
            while block := stream.read(_READ_BYTES):
                watch(memoryview(bytearray(block)))
    return proof.result()


def _why_not(out: Output, plan: MergePlan) -> str | None:
    edit = out.edit
    if edit is not None and edit.quantized:
        return "its base is rounded to 4 bits first"
    touched = plan.touched.get(out.name)
    if touched is not None and len(touched.pairs) > 1 and plan.combination != SUM:
        return f"{plan.combination} is peft's own computation"
    if touched is not None and touched.pairs and plan.combination not in (SUM, "linear"):
        return f"{plan.combination} is peft's own computation"
    return None


@dataclass(frozen=True)
class _Place:
    """A changed tensor in a file: its first and last byte (excluded), counted from the file's first."""

    out: Output
    begin: int
    end: int


class ShardWatch:
    """Called with the bytes of one safetensors file, run after run; reads its header, and compares what it says."""

    def __init__(self, proof: WeightsProof, outputs: Mapping[str, Output]) -> None:
        self._proof, self._outputs = proof, outputs
        self._position = 0
        self._header = b""
        self._places: list[_Place] | None = None
        self._tensor: TensorProof | None = None
        self._split = b""

    def __call__(self, data: memoryview) -> None:
        """Raises ParityError when the bytes are not what they should be."""
        start = 0
        if self._places is None:
            start = self._take_header(data)
        while self._places and start < len(data):
            place = self._places[0]
            at = self._position + start
            if at == place.begin:
                self._tensor = self._proof.tensor(place.out)
            begin, end = max(place.begin - self._position, start), min(place.end - self._position, len(data))
            if begin >= len(data):
                break
            if begin > start:
                start = begin
                continue
            if self._tensor is not None:
                self._compare(self._tensor, data[begin:end])
            start = end
            if self._position + end == place.end:
                if self._tensor is not None:
                    self._proof.settle(place.out, self._tensor.finish())
                self._places.pop(0)
                self._tensor = None
        self._position += len(data)

    def _take_header(self, data: memoryview) -> int:
        """Collect the header; returns how many bytes of `data` belong to it."""
        before = len(self._header)
        self._header += bytes(data)
        length = 8 + int.from_bytes(self._header[:8], "little")
        if len(self._header) < max(length, 8):
            return len(data)
        stated = json.loads(self._header[8:length])
        self._header = b""
        places = []
        for name, out in self._outputs.items():
            found = stated.get(name, {})
            if (found.get("dtype"), found.get("shape")) != (SAFETENSORS_DTYPES[out.dtype], list(out.shape)):
                raise ParityError(f"{name} should be {out.dtype} {list(out.shape)}; the file as written has {found}.")
            first, last = found["data_offsets"]
            if last - first != prod(out.shape) * out.dtype.itemsize:
                raise ParityError(f"{name} should have {out.nbytes} bytes; the file as written has {last - first}.")
            if out.edit is not None and last > first:
                places.append(_Place(out, length + first, length + last))
            elif out.edit is not None:
                self._proof.settle(out, 0.0)
        self._places = sorted(places, key=lambda place: place.begin)
        return length - before

    def _compare(self, tensor: TensorProof, data: memoryview) -> None:
        """Hand whole elements on; the bytes of one that two runs share wait for the rest of it."""
        width = tensor.out.dtype.itemsize
        if self._split:
            missing = width - len(self._split)
            self._split += bytes(data[:missing])
            data = data[missing:]
            if len(self._split) < width:
                return
            tensor.compare(torch.frombuffer(bytearray(self._split), dtype=tensor.out.dtype))
            self._split = b""
        count, rest = divmod(len(data), width)
        if rest:
            self._split = bytes(data[len(data) - rest :])
        if count:
            tensor.compare(torch.frombuffer(data, dtype=tensor.out.dtype, count=count))


@dataclass(frozen=True)
class _Block:
    """Memory for one block, as a matrix and as the bits of its elements, 1-D."""

    values: torch.Tensor
    bits: NDArray[np.signedinteger[Any]]


class _Memory:
    """Memory for one block, used again for every block: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._blocks: dict[tuple[str, torch.dtype, tuple[int, int]], _Block] = {}

    def block(self, use: str, dtype: torch.dtype, shape: tuple[int, int]) -> _Block:
        """Memory of `shape`, at most BLOCK_ELEMENTS, valid until it is asked for again for the same `use`."""
        found = self._blocks.get((use, dtype, shape))
        if found is None:
            if (use, dtype) not in self._held:
                self._held[use, dtype] = torch.empty(BLOCK_ELEMENTS, dtype=dtype)
            flat = self._held[use, dtype][: prod(shape)]
            found = _Block(flat.view(shape), _bits(flat))
            if len(self._blocks) > _SHAPES:
                self._blocks.clear()
            self._blocks[use, dtype, shape] = found
        return found


def _bits(values: torch.Tensor) -> NDArray[np.signedinteger[Any]]:
    """The bits of `values`, as signed integers in the same memory."""
    found: NDArray[np.signedinteger[Any]] = values.view(_INTEGERS[values.dtype.itemsize]).numpy()
    return found


class TensorProof:
    """The comparison of one tensor: `compare` takes its elements in order, `finish` says how far the furthest lies, in
    roundings of its dtype."""

    def __init__(self, out: Output, again: SecondComputation, memory: _Memory) -> None:
        self.out, self.again, self._memory = out, again, memory
        self._next = 0
        self._worst = 0.0
        self._doubtful: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._screens = (torch.float32, torch.float64) if out.dtype.itemsize <= 2 else (torch.float64,)
        if out.dtype.is_floating_point:
            self._infinity = int(_bits(torch.tensor([torch.inf]).to(out.dtype))[0])

    def compare(self, written: torch.Tensor) -> None:
        """The next elements as they stand in the file, 1-D."""
        first, last = self._next, self._next + written.numel()
        for place, start, stop in rectangles(self.again.columns, first, last):
            part = place.covering(self.again.columns, start, stop)
            self._block(place, part, start, written[start - first : stop - first])
        self._next = last

    def finish(self) -> float:
        """The largest distance, once all elements were compared."""
        self._settle()
        return self._worst if self._next == prod(self.out.shape) else float("inf")

    def _block(self, place: Rectangle, part: slice, start: int, written: torch.Tensor) -> None:
        base = self.again.base_values(place)
        if not self.out.dtype.is_floating_point:
            same = torch.equal(base.reshape(-1)[part].to(self.out.dtype), written)
            self._note(0.0 if same else float("inf"))
            return
        if self.again.only_adds(place):
            for dtype in self._screens:
                if self._screened(place, part, start, base, written, dtype):
                    return
        expected, terms = self._exactly(place, base, part)
        self._note(_in_roundings(written.double(), expected, terms, self.out.dtype))

    def _screened(
        self,
        place: Rectangle,
        part: slice,
        start: int,
        base: torch.Tensor,
        written: torch.Tensor,
        dtype: torch.dtype,
    ) -> bool:
        """Compare bits with what a computation in `dtype` rounds to; False where its own error could be more than half
        of what is allowed.

        That error is at most (depth + 4) · eps / 2 · (|base| + reach) an element. Elements that differ wait for a
        computation in float64.
        """
        bits = _bits(written)
        # Infinities and NaN are no sums that a bound holds for; negative ones are the largest numbers without a sign.
        unsigned = bits.view(f"u{bits.itemsize}")
        if bits.max() >= self._infinity or unsigned.max() >= self._infinity + (1 << (8 * bits.itemsize - 1)):
            return False
        sums = self._memory.block("sums", dtype, place.shape).values.copy_(base)
        error = (self.again.depth + 4) * torch.finfo(dtype).eps / 2 * self.again.reach(place)
        mean = self._mean(sums, 2 * error / (_SLACK * _arithmetic_eps(self.out.dtype)))
        if mean is None:
            return False
        if self.again.depth + 4 <= _SLACK:
            self.again.add_to(place, sums)
        else:
            # A product added as a whole, so that the base is rounded once.
            sums += self.again.added(place, self._memory.block("added", dtype, place.shape).values)
        return self._same_bits(sums, part, start, base, bits, written, mean)

    def _mean(self, sums: torch.Tensor, enough: float) -> float | None:
        """A mean absolute value of at least `enough` that the block's is not below; None where it is less. Half
        of the block, with nothing beside it, is as a rule enough to know."""
        flat = sums.reshape(-1)
        for count in (flat.numel() // 2, flat.numel()):
            absolute = self._memory.block("added", sums.dtype, (1, count)).values
            # A sum of so many float32 is right to one in a hundred.
            mean = 0.98 * float(torch.abs(flat[:count], out=absolute[0]).sum()) / flat.numel()
            if enough <= mean < torch.inf:
                return mean
        return None

    def _same_bits(
        self,
        sums: torch.Tensor,
        part: slice,
        start: int,
        base: torch.Tensor,
        bits: NDArray[np.signedinteger[Any]],
        written: torch.Tensor,
        mean: float,
    ) -> bool:
        rounded = self._memory.block("rounded", self.out.dtype, (sums.shape[0], sums.shape[1]))
        rounded.values.copy_(sums)
        unequal = rounded.bits[part] != bits
        # Counting is the quicker of the two, and there is seldom one.
        count = np.count_nonzero(unequal)
        if count > written.numel() // 8 + 8:
            return False
        if count:
            where = torch.from_numpy(np.flatnonzero(unequal))
            self._doubtful.append(
                (
                    where + start,
                    base.reshape(-1)[part][where].double(),
                    written[where].double(),
                    torch.full(where.shape, mean, dtype=torch.float64),
                )
            )
            if sum(len(found) for found, *_ in self._doubtful) > BLOCK_ELEMENTS:
                self._settle()
        self._note(_HALF)
        return True

    def _exactly(self, place: Rectangle, base: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(expected values, what is allowed beside their rounding is a multiple of) in float64."""
        before = self.again.with_trained_rows(
            place, self._memory.block("base", torch.float64, place.shape).values.copy_(base)
        )
        added = self.again.added(place, self._memory.block("added", torch.float64, place.shape).values)
        expected = self.again.finish(place, before + added)
        terms = before.abs_().add_(added.abs_())
        terms += terms.mean()
        return expected.reshape(-1)[part], terms.reshape(-1)[part]

    def _settle(self) -> None:
        """Compute the doubtful elements in float64."""
        if not self._doubtful:
            return
        places, base, written, mean = (torch.cat(found) for found in zip(*self._doubtful))
        self._doubtful.clear()
        added = self.again.at(places)
        self._note(_in_roundings(written, base + added, base.abs() + added.abs() + mean, self.out.dtype))

    def _note(self, found: float) -> None:
        # NaN is no distance: it stays the furthest, whatever comes after it.
        self._worst = max(self._worst, found) if found == found else float("inf")


def _arithmetic_eps(dtype: torch.dtype) -> float:
    """The rounding of what sums are computed in before they become `dtype`."""
    return torch.finfo(torch.float32 if dtype.itemsize <= 2 else torch.float64).eps


def _in_roundings(written: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest distance in roundings; the `terms` of the sum, in the wider dtype, may themselves be rounded."""
    info = torch.finfo(dtype)
    allowed = info.eps * expected.abs() + _SLACK * _arithmetic_eps(dtype) * terms + info.smallest_normal * info.eps
    return float(((written - expected).abs() / allowed).max()) if written.numel() else 0.0
