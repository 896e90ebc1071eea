"""From what adapters say about a tensor to what is done to it: changes, replacements, roundings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from weightport.adapters.base.base_model import Base
from weightport.adapters.merging.additive_delta import additive_change, additive_misfit, additive_part, is_turned
from weightport.adapters.merging.combination import SUM, Combination, Weighted, combine, combines_matrices
from weightport.adapters.merging.lora_targets import DeltaChange, PairChange, Part, Touched
from weightport.adapters.merging.low_rank_delta import (
    Change,
    Vector,
    is_conv1d,
    is_flipped,
    misfit,
    parameter_change,
    parameter_misfit,
    read_pair,
    stored_part,
)
from weightport.adapters.merging.quantized import is_quantized_layer
from weightport.adapters.merging.tensor_edit import Dora, Edit
from weightport.adapters.merging.ties import TiedHead
from weightport.adapters.reading.additive_tensors import is_bat
from weightport.adapters.reading.lora_tensors import LoraAdapter
from weightport.checkpoints import TensorRef
from weightport.checkpoints.lazy_tensors import same_bits
from weightport.converters.stored_pieces import Piece
from weightport.errors import AdapterError


@dataclass(frozen=True)
class EditBuilder:
    """Builds the edits of one merge: the adapters, their weights, and how they are combined."""

    base: Base
    adapters: Sequence[LoraAdapter]
    weights: Sequence[float]
    combination: Combination
    quantized: str | None
    quantized_layers: frozenset[str] | None

    @property
    def largest_rank(self) -> int:
        """Of any adapter in any module, as their settings say."""
        return max(largest_rank(adapter) for adapter in self.adapters)

    def edits(self, touched: Mapping[str, Touched], untied: TiedHead | None) -> tuple[dict[str, Edit], list[str]]:
        """(edit by tensor, what cannot be done)."""
        edits: dict[str, Edit] = {}
        problems: list[str] = []
        tensors = self.base.checkpoint.tensors
        if self.quantized:
            for name, ref in tensors.items():
                if is_quantized_layer(name, ref.shape, self.quantized_layers):
                    module = name.removesuffix(".weight")
                    edits[name] = Edit(
                        (self.quantized,), quantized=self.quantized, flipped=is_conv1d(module, self.base.model_type)
                    )
        for name, found in touched.items():
            ref = tensors[name] if untied is None or name in tensors else tensors[untied.apart[name]]
            try:
                edits[name] = self._edit(found, ref, edits.get(name))
            except AdapterError as error:
                problems.append(str(error))
        return edits, problems

    def _edit(self, found: Touched, ref: TensorRef, quantized: Edit | None) -> Edit:
        replacement = _single([(_stored_block(ref_, part, ref.shape)) for _, ref_, part in found.whole])
        shape = replacement.shape if replacement is not None else ref.shape
        if replacement is not None and shape != ref.shape and (len(shape) > 2 or shape[1:] != ref.shape[1:]):
            raise AdapterError(f"{replacement.name} is {list(shape)}, the base's is {list(ref.shape)}: another base")
        for change in found.pairs:
            _refuse(misfit(change.module, _model_shape(change, shape)))
            if change.module.magnitude is not None and not change.part.plain:
                _refuse(
                    f"{change.key}: DoRA sets lengths of rows, and the files hold this weight in other rows "
                    f"({change.part.piece.stored})"
                )
        if self.combination.kind != SUM:
            _refuse(_beside_pairs(found, ref, replacement, self.combination.kind))
        ranks = {change.module.a.shape[0] for change in found.pairs}
        if combines_matrices(self.combination) and len(ranks) > 1:
            _refuse(
                f"{found.pairs[0].key}: {self.combination.kind} adds matrices of one rank; the adapters have the "
                f"ranks {', '.join(map(str, sorted(ranks)))} there"
            )
        for change in found.parameters:
            rank = self.adapters[change.adapter].settings.rank(change.key)
            _refuse(parameter_misfit(change.module, change.key, _model_shape(change, shape), rank))
        for other in found.deltas:
            settings, of = self.adapters[other.adapter].settings, _model_shape(other, shape)
            _refuse(additive_misfit(other.delta, of, settings, turned=self._turned(other)))
            if is_bat(settings.data):
                _refuse(_not_of_the_base(other, ref, quantized is not None))
        for _, _, rows in found.tokens:
            if rows and not 0 <= max(rows) < shape[0]:
                _refuse(f"trainable_token_indices name row {max(rows)}; {ref.name} has {shape[0]}")
        flips = [self._flipped(change, _model_shape(change, shape)) for change in found.pairs]
        return Edit(
            (*found.sources, *(quantized.sources if quantized else ())),
            self._changes(found, replacement or ref, shape, flips),
            replacement,
            _dora(found, shape, flips),
            tuple((rows, tokens) for _, tokens, rows in found.tokens),
            quantized.quantized if quantized and replacement is None else None,
            quantized.flipped if quantized else False,
            stacked=bool(found.parameters) and len(shape) == 3,
        )

    def _flipped(self, change: PairChange, shape: tuple[int, ...]) -> bool:
        settings = self.adapters[change.adapter].settings
        return is_flipped(
            change.module,
            shape,
            fan_in_fan_out=settings.fan_in_fan_out,
            model_type=self.base.model_type,
            turned=change.part.place.turned,
        )

    def _changes(
        self, found: Touched, base: TensorRef, shape: tuple[int, ...], flips: Sequence[bool]
    ) -> Callable[[torch.dtype], Sequence[Change]]:
        def build(dtype: torch.dtype) -> Sequence[Change]:
            changes: list[Change] = []
            pairs: dict[Piece, list[tuple[PairChange, bool]]] = {}
            for change, flipped in zip(found.pairs, flips):
                pairs.setdefault(change.part.piece, []).append((change, flipped))
            for together in pairs.values():
                parts = [
                    Weighted(
                        read_pair(change.module, dtype, flipped=flipped),
                        self.adapters[change.adapter].settings.scaling(change.key),
                        self.weights[change.adapter] * change.times,
                    )
                    for change, flipped in together
                ]
                part = together[0][0].part
                combined = combine(self.combination, parts, self.largest_rank)
                changes += combined if part.plain else [stored_part(c, part.piece, shape) for c in combined]
            for change in (*found.parameters, *found.biases):
                changes.append(self._alone(change, shape, dtype))
            changes += [self._of_delta(change, base, shape, dtype) for change in found.deltas]
            return changes

        return build

    def _turned(self, change: DeltaChange) -> bool:
        settings = self.adapters[change.adapter].settings
        return is_turned(change.delta, change.part.place.turned, settings, self.base.model_type)

    def _of_delta(self, change: DeltaChange, base: TensorRef, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        settings, weight = self.adapters[change.adapter].settings, self.weights[change.adapter]
        of, turned = _model_shape(change, shape), self._turned(change)
        whole = additive_change(change.delta, of, settings, dtype, weight, base.read, turned=turned)
        return whole if change.part.plain else additive_part(whole, change.part.piece, shape)

    def _alone(self, change: PairChange, shape: tuple[int, ...], dtype: torch.dtype) -> Change:
        """What a pair beside a parameter, or the bias of a pair, adds."""
        settings, module = self.adapters[change.adapter].settings, change.module
        scale = settings.scaling(change.key) * self.weights[change.adapter]
        whole: Change
        if module.bias is not None and change.key == module.module:
            whole = Vector(module.bias.read().to(dtype) * scale)
        else:
            rank = settings.rank(change.key)
            of = _model_shape(change, shape)
            whole = parameter_change(module, of, rank, scale, dtype, turned=bool(change.part.place.turned))
        return whole if change.part.plain else stored_part(whole, change.part.piece, shape)


def largest_rank(adapter: LoraAdapter) -> int:
    """The largest rank that the adapter's settings give a module."""
    patterns = adapter.settings.data.get("rank_pattern") or {}
    return max(adapter.settings.default_rank, *patterns.values(), 0)


def _model_shape(change: PairChange | DeltaChange, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the model's tensor: the stored one's, which may have grown, or its own where the two differ."""
    return shape if change.part.plain else change.part.place.shape


def _beside_pairs(found: Touched, ref: TensorRef, replacement: TensorRef | None, kind: str) -> str | None:
    """What peft's combinations of pairs leave out; None where the tensor has none of it."""
    saved = replacement is not None and (
        replacement.shape != ref.shape or not same_bits(replacement.read(), ref.read())
    )
    what = {
        "pairs beside parameters (target_parameters)": found.parameters,
        "biases of pairs (lora_bias)": found.biases,
        "single rows (trainable_token_indices)": found.tokens,
        "tensors saved as a whole": saved,
    }
    beside = next((name for name, there in what.items() if there), None)
    return f"{ref.name}: {kind} combines pairs and leaves out {beside}; use {SUM}, the exact sum" if beside else None


def _not_of_the_base(change: DeltaChange, ref: TensorRef, quantized: bool) -> str | None:
    """Why the change, which multiplies the base's weight, cannot be had of what the files hold."""
    if not change.part.plain:
        return f"{change.delta.module}: MiSS's bat multiplies a weight that the files hold in other parts ({ref.name})"
    if quantized:
        return f"{change.delta.module}: MiSS's bat multiplies the base's weight, which is rounded to 4 bits"
    return None


def _refuse(problem: str | None) -> None:
    if problem:
        raise AdapterError(problem)


def _dora(found: Touched, shape: tuple[int, ...], flips: Sequence[bool]) -> Dora | None:
    dora = None
    for change, flipped in zip(found.pairs, flips):
        magnitude = change.module.magnitude
        if magnitude is not None:
            length = shape[1] if flipped else shape[0]
            if magnitude.numel != length:
                raise AdapterError(f"{magnitude.name} has {magnitude.numel} values, expected {length}")
            dora = Dora(magnitude, by_column=flipped)
    return dora


def _stored_block(ref: TensorRef, part: Part, shape: tuple[int, ...]) -> TensorRef:
    """Of a whole tensor of the model, the block that is the stored one."""
    piece = part.piece
    if part.plain:
        return ref
    if ref.shape != part.place.shape:
        raise AdapterError(f"{ref.name} is {list(ref.shape)}, the base's is {list(part.place.shape)}: another base")
    if any(span != (0, size) for span, size in zip(piece.source, shape)):
        raise AdapterError(f"{ref.name} is a part of the stored {piece.stored}, which is not replaced in parts")
    spans = tuple(slice(start, start + piece.extent(axis)) for axis, start in enumerate(piece.start))
    kept = [axis for axis, of in enumerate(piece.axes) if of is not None]
    order = sorted(range(len(kept)), key=lambda place: piece.axes[kept[place]] or 0)

    def load() -> torch.Tensor:
        block = ref.read()[spans]
        block = block.reshape([block.shape[axis] for axis in kept])
        return block.permute(order).contiguous()

    return replace(ref, name=f"{ref.name} ({piece.stored})", shape=shape, storage=(), load=load)


def _single(whole: Sequence[TensorRef]) -> TensorRef | None:
    """The one tensor that takes the base's place. Raises AdapterError when adapters bring different ones."""
    if not whole:
        return None
    first = whole[0]
    for other in whole[1:]:
        if not same_bits(first.read(), other.read()):
            raise AdapterError(f"{first.name}: two adapters bring different whole tensors for it, which have no sum")
    return first
