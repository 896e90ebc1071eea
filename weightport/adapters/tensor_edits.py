"""From what adapters say about a tensor to what is done to it: changes, replacements, roundings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from weightport.adapters.base_model import Base
from weightport.adapters.changes import Change, Vector, is_conv1d, is_flipped, misfit, parameter_change, read_pair
from weightport.adapters.combination import Combination, Weighted, combine
from weightport.adapters.edits import Dora, Edit
from weightport.adapters.lora_tensors import LoraAdapter, ModuleAdapter
from weightport.adapters.quantized import is_quantized_layer
from weightport.adapters.ties import TiedHead
from weightport.adapters.touched import Touched
from weightport.checkpoints import TensorRef
from weightport.checkpoints.lazy_tensors import same_bits
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
            own_head = untied is not None and name == untied.head
            ref = tensors[untied.embedding] if own_head and untied is not None else tensors[name]
            try:
                edits[name] = self._edit(found, ref, edits.get(name))
            except AdapterError as error:
                problems.append(str(error))
        return edits, problems

    def _edit(self, found: Touched, ref: TensorRef, quantized: Edit | None) -> Edit:
        replacement = _single(found.whole)
        shape = replacement.shape if replacement is not None else ref.shape
        if replacement is not None and shape != ref.shape and (len(shape) != 2 or shape[1:] != ref.shape[1:]):
            raise AdapterError(f"{replacement.name} is {list(shape)}, the base's is {list(ref.shape)}: another base")
        problem = next((text for _, module in found.pairs if (text := misfit(module, shape))), None)
        if problem:
            raise AdapterError(problem)
        dora = None
        flips = [self._flipped(place, module, shape) for place, module in found.pairs]
        for (_, module), flipped in zip(found.pairs, flips):
            if module.magnitude is not None:
                length = shape[1] if flipped else shape[0]
                if module.magnitude.numel != length:
                    raise AdapterError(
                        f"{module.magnitude.name} has {module.magnitude.numel} values, expected {length}"
                    )
                dora = Dora(module.magnitude, by_column=flipped)
        return Edit(
            (*found.sources, *(quantized.sources if quantized else ())),
            self._changes(found, shape, flips),
            replacement,
            dora,
            tuple((rows, tokens) for _, tokens, rows in found.tokens),
            quantized.quantized if quantized and replacement is None else None,
            quantized.flipped if quantized else False,
            stacked=bool(found.parameters) and len(shape) == 3,
        )

    def _flipped(self, place: int, module: ModuleAdapter, shape: tuple[int, ...]) -> bool:
        settings = self.adapters[place].settings
        return is_flipped(module, shape, fan_in_fan_out=settings.fan_in_fan_out, model_type=self.base.model_type)

    def _changes(
        self, found: Touched, shape: tuple[int, ...], flips: Sequence[bool]
    ) -> Callable[[torch.dtype], Sequence[Change]]:
        def build(dtype: torch.dtype) -> Sequence[Change]:
            changes: list[Change] = []
            if found.pairs:
                parts = [
                    Weighted(
                        read_pair(module, dtype, flipped=flipped),
                        self.adapters[place].settings.scaling(module.module),
                        self.weights[place],
                        module.a.shape[0],
                    )
                    for (place, module), flipped in zip(found.pairs, flips)
                ]
                changes += combine(self.combination, parts)
            for place, module in found.parameters:
                settings = self.adapters[place].settings
                scale = settings.scaling(module.module) * self.weights[place]
                rank = settings.rank(module.module)
                change = parameter_change(module, shape, rank, scale, dtype, self.base.model_type)
                if change is not None:
                    changes.append(change)
            for place, module in found.biases:
                if module.bias is not None:
                    scale = self.adapters[place].settings.scaling(module.module) * self.weights[place]
                    changes.append(Vector(module.bias.read().to(dtype) * scale))
            return changes

        return build


def _single(whole: Sequence[tuple[int, TensorRef]]) -> TensorRef | None:
    """The one tensor that takes the base's place. Raises AdapterError when adapters bring different ones."""
    if not whole:
        return None
    first = whole[0][1]
    for _, other in whole[1:]:
        if not same_bits(first.read(), other.read()):
            raise AdapterError(f"{first.name}: two adapters bring different whole tensors for it, which have no sum")
    return first
