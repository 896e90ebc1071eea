"""What adapters say about each tensor of a base, and which of it is one change in two tied places."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weightport.adapters.base_model import Base
from weightport.adapters.base_names import BaseNames
from weightport.adapters.changes import parameter_change
from weightport.adapters.lora_tensors import LoraAdapter, ModuleAdapter
from weightport.adapters.ties import TiedHead, is_head_module
from weightport.checkpoints import TensorRef
from weightport.checkpoints.lazy_tensors import same_bits
from weightport.errors import AdapterError

SHOWN = 10


@dataclass
class Touched:
    """What the adapters say about one tensor. Adapters are given by their place in the command."""

    pairs: list[tuple[int, ModuleAdapter]] = field(default_factory=list)
    parameters: list[tuple[int, ModuleAdapter]] = field(default_factory=list)
    biases: list[tuple[int, ModuleAdapter]] = field(default_factory=list)
    whole: list[tuple[int, TensorRef]] = field(default_factory=list)
    tokens: list[tuple[int, TensorRef, Sequence[int]]] = field(default_factory=list)

    @property
    def sources(self) -> tuple[str, ...]:
        modules = [module.module for _, module in (*self.pairs, *self.parameters)]
        rest = [module.bias.name for _, module in self.biases if module.bias is not None]
        return tuple(
            dict.fromkeys(
                [*modules, *rest, *(ref.name for _, ref in self.whole), *(t.name for _, t, _ in self.tokens)]
            )
        )


def unresolved(base: Base, adapter: LoraAdapter) -> list[str]:
    """The adapter's modules that the base has under no certain name (a tied head has none of its own)."""
    names = BaseNames(base.checkpoint.tensors)
    parameters = {name.rpartition(".")[0] for name in adapter.settings.target_parameters}
    return [
        module.module
        for module in adapter.modules
        if _weight_of(names, module) is None
        and not is_head_module(module.module)
        and not any(not owner or f".{module.module}".endswith(f".{owner}") for owner in parameters)
    ] + [
        name.rpartition(".")[0]
        for name in adapter.whole
        if names.find(name) is None and not is_head_module(name.rpartition(".")[0])
    ]


def gather(base: Base, adapters: Sequence[LoraAdapter], tied: TiedHead | None) -> dict[str, Touched]:
    """What touches each tensor of the base. Raises AdapterError listing everything that touches none."""
    names = BaseNames(base.checkpoint.tensors)
    touched: dict[str, Touched] = {}
    lost: list[str] = []
    for place, adapter in enumerate(adapters):
        for module in adapter.modules:
            name = _weight_of(names, module)
            if name is None and tied is not None and is_head_module(module.module):
                name = tied.head
            if name is not None:
                found = touched.setdefault(name, Touched())
                if any(other == place for other, _ in found.pairs):
                    lost.append(f"{module.module}: two modules of the adapter are {name} in the base")
                found.pairs.append((place, module))
            elif (parameter := _parameter_of(base, names, adapter, module)) is not None:
                touched.setdefault(parameter, Touched()).parameters.append((place, module))
            else:
                lost.append(_lost(names, f"{module.module}.weight"))
            if module.bias is not None:
                bias = names.find(f"{module.module}.bias")
                if bias is None:
                    lost.append(f"{module.bias.name}: the base's layer has no bias to add it to (lora_bias)")
                else:
                    touched.setdefault(bias, Touched()).biases.append((place, module))
        for key, ref in adapter.whole.items():
            name = names.find(key)
            if name is None and tied is not None and is_head_module(key.rpartition(".")[0]):
                name = tied.head
            if name is None and tied is not None and key in tied.places:
                name = tied.embedding
            if name is None:
                lost.append(_lost(names, key))
            else:
                touched.setdefault(name, Touched()).whole.append((place, ref))
        for key, ref in adapter.tokens.items():
            name = names.find(f"{key}.weight")
            rows = adapter.settings.trained_tokens(key)
            if name is None:
                lost.append(_lost(names, f"{key}.weight"))
            elif rows is None or len(rows) != ref.shape[0] or max(rows) >= base.checkpoint[name].shape[0]:
                lost.append(f"{key}: {ref.shape[0]} trained rows do not fit trainable_token_indices ({rows})")
            else:
                touched.setdefault(name, Touched()).tokens.append((place, ref, rows))
    if lost:
        raise AdapterError(
            listed(f"{names_of(adapters)} belongs to another base than {base.path}, which does not have:", lost)
        )
    return touched


def _weight_of(names: BaseNames, module: ModuleAdapter) -> str | None:
    """The base's name of the weight that a module's pair is added to (of MultiheadAttention: in_proj_weight)."""
    return names.find(f"{module.module}.weight") or names.find(f"{module.module}.in_proj_weight")


def _parameter_of(base: Base, names: BaseNames, adapter: LoraAdapter, module: ModuleAdapter) -> str | None:
    """The base's name of the parameter (target_parameters) that the module's pair fits; None unless it is only one."""
    fitting = []
    for entry in adapter.settings.target_parameters:
        owner, _, leaf = entry.rpartition(".")
        name = names.find(f"{module.module}.{leaf}")
        if name is None or (owner and not f".{module.module}".endswith(f".{owner}")):
            continue
        rank = adapter.settings.rank(module.module)
        if (
            parameter_change(module, base.checkpoint[name].shape, rank, 0.0, torch.float32, base.model_type)
            is not None
        ):
            fitting.append(name)
    return fitting[0] if len(set(fitting)) == 1 else None


def _lost(names: BaseNames, name: str) -> str:
    near = names.near(name)
    return name.removesuffix(".weight") + (f" (it has {' and '.join(near)})" if near else "")


def require_all_layers(base: Base, adapter: LoraAdapter) -> None:
    """An adapter that has a module in some layers has it in every layer that its settings choose."""
    present = {module.module for module in adapter.modules}
    if not present <= {name.removesuffix(".weight") for name in base.checkpoint.tensors}:
        return
    patterns = {re.sub(r"\.\d+(?=\.|$)", ".*", module) for module in present}
    adapter.settings.require_bounded(
        (name.removesuffix(".weight") for name in base.checkpoint.tensors), adapter.settings.where
    )
    missing = [
        module
        for module in (name.removesuffix(".weight") for name in base.checkpoint.tensors if name.endswith(".weight"))
        if module not in present
        and re.sub(r"\.\d+(?=\.|$)", ".*", module) in patterns
        and adapter.settings.targets(module)
    ]
    if missing:
        raise AdapterError(
            listed(f"{adapter.path} is incomplete: its settings name modules that it has no tensors for:", missing)
        )


def settle_ties(
    tied: TiedHead | None,
    touched: dict[str, Touched],
    tensors: Mapping[str, TensorRef],
    adapters: Sequence[LoraAdapter],
    untie: bool,
) -> TiedHead | None:
    """The head to write apart, or None. Changes that are one for both places are kept once."""
    if tied is None:
        return None
    head, embedding = touched.get(tied.head), touched.get(tied.embedding)
    if head is None and (embedding is None or not (embedding.pairs or embedding.whole)):
        return None
    if head is not None and embedding is not None and _one_change(head, embedding):
        del touched[tied.head]
        return None
    if head is None and embedding is not None:
        places = {place for place, _ in (*embedding.pairs, *embedding.whole)}
        grown = any(ref.shape != tensors[tied.embedding].shape for _, ref in embedding.whole)
        if grown or all(adapters[place].settings.ensure_weight_tying for place in places):
            return None
    if not untie:
        where = "head" if embedding is None else "token embedding" if head is None else "head and the token embedding"
        raise AdapterError(
            f"The adapter changes the {where} of a base that keeps both in one matrix ({tied.embedding}); merged into "
            "it, the change would act in both places, which is not the model that was trained.\n"
            f"  Pass --untie to write the head as a matrix of its own ({tied.head}, "
            f"{tensors[tied.embedding].nbytes:,} bytes more)."
        )
    if embedding is not None and embedding.tokens:
        # peft trains single rows of tied places together.
        touched.setdefault(tied.head, Touched()).tokens.extend(embedding.tokens)
    touched.setdefault(tied.head, Touched())
    return tied


def _one_change(head: Touched, embedding: Touched) -> bool:
    """Whether the head is changed exactly as the embedding is."""
    if bool(head.whole) != bool(embedding.whole) or len(head.pairs) != len(embedding.pairs):
        return False
    whole = [ref for _, ref in (*head.whole, *embedding.whole)]
    same_whole = all(same_bits(whole[0].read(), ref.read()) for ref in whole[1:])
    return same_whole and all(
        torch.equal(a.a.read(), b.b.read().T) and torch.equal(a.b.read(), b.a.read().T)
        for (_, a), (_, b) in zip(head.pairs, embedding.pairs)
        if b.embedding and not a.embedding
    )


def names_of(adapters: Sequence[LoraAdapter]) -> str:
    return ", ".join(str(adapter.path) for adapter in adapters)


def listed(title: str, items: Sequence[str]) -> str:
    rest = f"\n      … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{title}\n      " + "\n      ".join(items[:SHOWN]) + rest
