"""The first proof of a merge: every changed tensor against base + scaling · B · A, computed a second time.

Everything is read again and computed in float64 by code that shares no arithmetic with the merge: neither its scaling
nor its changes, edits and combinations. Memory is bounded by blocks of rows. What only peft computes (combinations
other than the sum) and what is rounded first (a 4-bit base) is left to the check of the model, and named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightport.adapters.merging.additive_check import ExpectedDelta
from weightport.adapters.merging.combination import SUM
from weightport.adapters.merging.lora_targets import PairChange, Touched
from weightport.adapters.merging.merge_plan import MergePlan
from weightport.adapters.merging.tensor_edit import Output
from weightport.adapters.reading.lora_tensors import LoraAdapter
from weightport.checkpoints import open_checkpoint
from weightport.errors import ParityError

_ROWS = 1 << 17
"""Elements of a block."""


@dataclass(frozen=True)
class WeightsCheck:
    """How many changed tensors were compared, the furthest element in what rounding explains, and what was not
    compared, with the reason."""

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


def check_weights(
    folder: Path, plan: MergePlan, adapters: Sequence[LoraAdapter], weights: Sequence[float]
) -> WeightsCheck:
    """Compare the finished files in `folder` with base and adapters. Raises ParityError when a tensor is wrong."""
    settings = [json.loads((adapter.folder / "adapter_config.json").read_text("utf-8")) for adapter in adapters]
    changed = unchecked_count = 0
    furthest = 0.0
    unchecked: dict[str, str] = {}
    for shard, outputs in plan.shards.items():
        # Read, not mapped: a mapping of a whole shard counts as private memory.
        file = open_checkpoint(folder / shard)
        for out in outputs:
            if out.edit is None:
                continue
            changed += 1
            reason = _why_not(out, plan)
            if reason is not None:
                unchecked[out.name] = reason
                unchecked_count += 1
                continue
            found = _furthest(file[out.name].read(), out, plan.touched.get(out.name), settings, weights)
            if not found <= 1:
                raise ParityError(
                    f"{out.name} as written lies {found:.1f} roundings from base + adapter, computed a second "
                    "time; at most one is explained. Nothing was written."
                )
            furthest = max(furthest, found)
    return WeightsCheck(changed, changed - unchecked_count, furthest, unchecked)


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


def _furthest(
    stored: torch.Tensor,
    out: Output,
    touched: Touched | None,
    settings: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
) -> float:
    """The furthest element of a tensor as written, in roundings of its dtype."""
    if not out.dtype.is_floating_point or out.edit is None:
        return 0.0
    base = (out.edit.replacement or out.base).read()
    if not out.shape:
        return float((stored.double() - base.double()).abs())
    columns = max(base[0].numel(), 1) if base.shape[0] else 1
    step = max(1, _ROWS // columns)
    touched = touched or Touched()
    deltas: list[_Delta | ExpectedDelta] = [
        _delta(change, settings[change.adapter], weights[change.adapter], out) for change in _changes(touched)
    ]
    deltas += [ExpectedDelta(c, settings[c.adapter], weights[c.adapter], out.shape) for c in touched.deltas]
    length = _dora_factor(out, touched, base, deltas, step)
    worst = 0.0
    for start in range(0, base.shape[0], step):
        stop = min(start + step, base.shape[0])
        before = base[start:stop].double().reshape(stop - start, -1)
        added = torch.zeros_like(before)
        for delta in deltas:
            added += delta.rows(start, stop).reshape(stop - start, -1)
        expected = before + added
        if length is not None:
            expected = expected * length(start, stop)
        for _, values, rows in touched.tokens:
            for place, row in enumerate(rows):
                if start <= row < stop:
                    expected[row - start] = values.read()[place].double()
        written = stored[start:stop].double().reshape(stop - start, -1)
        worst = max(worst, _in_roundings(written, expected, before.abs() + added.abs(), out.dtype))
    return worst


def _in_roundings(written: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest distance in roundings; the terms of the sum, in the wider dtype, may themselves be rounded."""
    wide = torch.finfo(torch.float32 if dtype.itemsize <= 2 else torch.float64).eps
    info = torch.finfo(dtype)
    allowed = info.eps * expected.abs() + 64 * wide * (terms + terms.mean()) + info.smallest_normal * info.eps
    return float(((written - expected).abs() / allowed).max()) if written.numel() else 0.0


class _Delta:
    """What one pair adds to a stored tensor [rows, …]: by rows, in float64."""

    def __init__(
        self, matrices: Sequence[tuple[torch.Tensor, torch.Tensor]], change: PairChange, shape: Sequence[int]
    ):
        self.matrices, self.piece, self.shape = matrices, change.part.piece, tuple(shape)
        self.plain = change.part.plain

    def rows(self, start: int, stop: int) -> torch.Tensor:
        if self.plain:
            if len(self.matrices) > 1:
                return torch.stack([left @ right for left, right in self.matrices[start:stop]])
            left, right = self.matrices[0]
            return left[start:stop] @ right
        piece = self.piece
        out = torch.zeros(stop - start, *self.shape[1:], dtype=torch.float64)
        first, last = max(start, piece.source[0][0]), min(stop, piece.source[0][1])
        if first < last:
            target = (slice(first - start, last - start), *(slice(*span) for span in piece.source[1:]))
            offset = piece.source[0][0]
            out[target] = self._block()[first - offset : last - offset]
        return out

    def _block(self) -> torch.Tensor:
        """The piece's values, in the axes of the stored tensor."""
        spans = [slice(start, start + self.piece.extent(axis)) for axis, start in enumerate(self.piece.start)]
        if len(spans) == 3:
            block = torch.stack([(left @ right)[spans[1], spans[2]] for left, right in self.matrices[spans[0]]])
        else:
            left, right = self.matrices[0]
            block = (left[spans[0]] @ right)[:, spans[1]] if len(spans) == 2 else left[spans[0]] @ right
        kept = [axis for axis, of in enumerate(self.piece.axes) if of is not None]
        block = block.reshape([block.shape[axis] for axis in kept]) if len(spans) == block.ndim else block
        order = sorted(range(len(kept)), key=lambda place: self.piece.axes[kept[place]] or 0)
        return block.permute(order) if block.ndim == len(order) else block


def _changes(touched: Touched) -> Iterator[PairChange]:
    yield from touched.pairs
    yield from touched.parameters
    yield from touched.biases


def _delta(change: PairChange, settings: Mapping[str, Any], weight: float, out: Output) -> _Delta:
    module = change.module
    scale = _strength(settings, change.key) * weight * change.times
    shape = out.shape if change.part.plain else change.part.place.shape
    if len(out.shape) == 1 and module.bias is not None:
        bias = module.bias.read().double().reshape(-1, 1) * scale
        return _Delta([(bias, torch.ones(1, 1, dtype=torch.float64))], change, out.shape)
    a, b = module.a.read().double().flatten(1), module.b.read().double().flatten(1) * scale
    if change.key != module.module and len(shape) == 3:
        experts = shape[0]
        rank = a.shape[0] // experts
        pairs = [(b[:, index::experts], a[index * rank : (index + 1) * rank]) for index in range(experts)]
    else:
        pairs = [(b, a)]
    rows, columns = (shape[1], shape[2]) if len(pairs) > 1 else (shape[0], a.shape[1])
    turned = module.embedding or (b.shape[0], a.shape[1]) != (rows, columns)
    if not turned and rows == columns:
        known = change.part.place.turned
        turned = bool(settings.get("fan_in_fan_out")) if known is None else known
        turned = turned and len(shape) == (3 if len(pairs) > 1 else 2)
    if not module.embedding and len(shape) > 2 and len(pairs) == 1:
        turned = False
    return _Delta([(right.T, left.T) if turned else (left, right) for left, right in pairs], change, out.shape)


def _strength(settings: Mapping[str, Any], name: str) -> float:
    """alpha / r of the module or parameter `name`, as peft's documentation states it."""

    def of(field: str, otherwise: Any) -> float:
        patterns = settings.get(field) or {}
        return float(next((v for key, v in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", name)), otherwise))

    rank = of("rank_pattern", settings.get("r", 8))
    return of("alpha_pattern", settings.get("lora_alpha", 8)) / (rank**0.5 if settings.get("use_rslora") else rank)


def _dora_factor(
    out: Output, touched: Touched, base: torch.Tensor, deltas: Sequence[_Delta | ExpectedDelta], step: int
) -> Any:
    """By rows, what DoRA multiplies the sum with; None without DoRA."""
    magnitude = next((change.module.magnitude for change in touched.pairs if change.module.magnitude), None)
    if magnitude is None:
        return None
    values = magnitude.read().double().reshape(-1)
    by_row = torch.empty(base.shape[0], dtype=torch.float64)
    by_column = torch.zeros(base[0].numel(), dtype=torch.float64)
    for start in range(0, base.shape[0], step):
        stop = min(start + step, base.shape[0])
        total = base[start:stop].double().reshape(stop - start, -1)
        for delta in deltas:
            total = total + delta.rows(start, stop).reshape(stop - start, -1)
        by_row[start:stop] = total.norm(dim=1)
        by_column += total.square().sum(0)
    if out.edit is not None and out.edit.dora is not None and out.edit.dora.by_column:
        factor = values / by_column.sqrt()
        return lambda start, stop: factor
    return lambda start, stop: (values[start:stop] / by_row[start:stop]).unsqueeze(1)
