"""compare_weights(): two checkpoints, tensor by tensor: equal, close, different, or only in one of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from weightport.checkpoints import TensorRef, open_checkpoint
from weightport.parity.counterparts import LeftOut, counterparts
from weightport.parity.noise import scale_of

CHUNK = 1 << 24
"""Elements compared at a time: what float64 copies of both sides cost is bounded, whatever a tensor's size."""

TOLERANCE = 1e-6
"""Relative to the root mean square of A's tensor: what a merge or a re-save in float32 may leave."""


class Sameness(StrEnum):
    """How two tensors of one name compare. Only `EQUAL` and `CLOSE` pass."""

    EQUAL = "equal"
    CLOSE = "close"
    DIFFERENT = "different"
    ONLY_A = "only in A"
    ONLY_B = "only in B"

    @property
    def passes(self) -> bool:
        return self in (Sameness.EQUAL, Sameness.CLOSE)


@dataclass(frozen=True)
class TensorDifference:
    """One name. `largest` is the largest absolute difference, at `index`, where A holds `a` and B holds `b`.

    `scale` is the root mean square of A's values. Without a common shape, or with a NaN in one of them only, there is
    no `largest`; `note` says why, and names dtypes that differ.
    """

    name: str
    sameness: Sameness
    largest: float | None = None
    index: tuple[int, ...] | None = None
    a: float | None = None
    b: float | None = None
    scale: float | None = None
    note: str = ""

    @property
    def module(self) -> str:
        """The name without its last part."""
        return self.name.rpartition(".")[0] or "(top)"

    @property
    def relative(self) -> float:
        """Largest difference in units of the scale: what a tolerance is compared with."""
        if self.largest is None:
            return float("inf")
        if not self.largest:
            return 0.0
        return self.largest / self.scale if self.scale else float("inf")


@dataclass(frozen=True)
class WeightsReport:
    """What `compare_weights` found: every name, in A's order, then what only B has.

    `left_out` are sections of one side that are a trainer's state and no model; `prefixes` is what stands before the
    model's names in A and in B, and was taken off to compare them.
    """

    a: Path
    b: Path
    tolerance: float
    tensors: tuple[TensorDifference, ...]
    left_out: tuple[LeftOut, ...] = ()
    prefixes: tuple[str, str] = ("", "")

    @property
    def passed(self) -> bool:
        return all(each.sameness.passes for each in self.tensors)

    @property
    def worst(self) -> TensorDifference | None:
        """The tensor whose values lie furthest apart, relative to its scale; None when all are equal."""
        unequal = [each for each in self.tensors if each.largest]
        return max(unequal, key=lambda each: each.relative, default=None)

    def count(self, sameness: Sameness) -> int:
        return sum(each.sameness is sameness for each in self.tensors)

    def by_module(self) -> dict[str, list[TensorDifference]]:
        """Differences by module, in order of first appearance."""
        modules: dict[str, list[TensorDifference]] = {}
        for each in self.tensors:
            modules.setdefault(each.module, []).append(each)
        return modules

    @property
    def verdict(self) -> str:
        """One sentence."""
        counts = [f"{self.count(kind)} {kind.value}" for kind in Sameness if self.count(kind)]
        return f"{'same weights' if self.passed else 'different weights'}: {', '.join(counts)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: everything that the table is made of, and every tensor that is not equal."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "a": str(self.a),
            "b": str(self.b),
            "tolerance": self.tolerance,
            "left_out": [asdict(each) for each in self.left_out],
            "prefixes": {"a": self.prefixes[0], "b": self.prefixes[1]},
            "counts": {kind.value: self.count(kind) for kind in Sameness},
            "modules": {
                module: {kind.value: sum(each.sameness is kind for each in rows) for kind in Sameness}
                for module, rows in self.by_module().items()
            },
            "tensors": [
                {**asdict(each), "sameness": each.sameness.value}
                for each in self.tensors
                if each.sameness is not Sameness.EQUAL
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def compare_weights(a: Path, b: Path, *, tolerance: float = TOLERANCE) -> WeightsReport:
    """Compare two model directories or checkpoint files of any format that `open_checkpoint` reads.

    The model in a training checkpoint is compared; its optimizer's state is left out, unless both hold one. Tensors
    are read one after another: memory holds one of each side. `tolerance` is relative to the root mean square
    of A's tensor. Raises CheckpointError when one of them cannot be read.
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    found = counterparts(first, second)
    differences = tuple(_differences(found.a, found.b, tolerance))
    return WeightsReport(Path(a), Path(b), tolerance, differences, found.left_out, found.prefixes)


def _differences(
    a: Mapping[str, TensorRef], b: Mapping[str, TensorRef], tolerance: float
) -> Iterator[TensorDifference]:
    for name, ref in a.items():
        if name in b:
            yield compare_tensors(name, ref, b[name], tolerance)
        else:
            yield TensorDifference(name, Sameness.ONLY_A, note=_layout(ref))
    for name, ref in b.items():
        if name not in a:
            yield TensorDifference(name, Sameness.ONLY_B, note=_layout(ref))


def compare_tensors(name: str, a: TensorRef, b: TensorRef, tolerance: float) -> TensorDifference:
    """One tensor of each side. Values are compared in float64, whole numbers exactly; a NaN equals a NaN at its place.

    Equal values of another dtype are close.
    """
    dtypes = "" if a.dtype == b.dtype else f"{_name(a.dtype)} in A, {_name(b.dtype)} in B"
    if a.shape != b.shape:
        return TensorDifference(name, Sameness.DIFFERENT, note=f"{_layout(a)} in A, {_layout(b)} in B")
    left, right = a.read().reshape(-1), b.read().reshape(-1)
    place, largest = 0, 0.0
    for start in range(0, len(left), CHUNK):
        one, other = (_comparable(side[start : start + CHUNK]) for side in (left, right))
        alone = one.isnan() != other.isnan()
        if bool(alone.any()):
            at = start + int(alone.nonzero()[0])
            note = f"NaN in {'A' if bool(left[at].isnan()) else 'B'} only, first at {list(_index(at, a.shape))}"
            return TensorDifference(name, Sameness.DIFFERENT, index=_index(at, a.shape), note=note)
        apart = (one - other).abs().masked_fill_((one == other) | one.isnan(), 0.0)
        if float(apart.max()) > largest:
            place, largest = start + int(apart.argmax()), float(apart.max())
    if not largest:
        return TensorDifference(name, Sameness.CLOSE if dtypes else Sameness.EQUAL, 0.0, note=dtypes)
    if largest == float("inf"):
        note = f"infinite in one of them only, at {list(_index(place, a.shape))}"
        return TensorDifference(name, Sameness.DIFFERENT, index=_index(place, a.shape), note=note)
    scale = _scale(left)
    sameness = Sameness.CLOSE if largest <= tolerance * scale else Sameness.DIFFERENT
    return TensorDifference(
        name, sameness, largest, _index(place, a.shape), float(left[place]), float(right[place]), scale, dtypes
    )


def _comparable(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128).abs() if values.is_complex() else values.double()


def _scale(values: torch.Tensor) -> float:
    """Root mean square of the finite values, chunk by chunk."""
    parts: Iterable[torch.Tensor] = (_comparable(part) for part in values.split(CHUNK))
    squares = sum(scale_of(part) ** 2 * len(part) for part in parts)
    return float((squares / max(len(values), 1)) ** 0.5)


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        index.append(rest)
    return tuple(reversed(index))


def _layout(ref: TensorRef) -> str:
    return f"{_name(ref.dtype)} {list(ref.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
