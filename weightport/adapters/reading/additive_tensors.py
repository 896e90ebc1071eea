"""Adapters of methods other than LoRA that add a matrix to a weight: which tensors they consist of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from weightport.checkpoints import TensorRef
from weightport.errors import AdapterError


@dataclass(frozen=True)
class MethodTensors:
    """Names of a method's tensors: those beside a module, and those that all modules share."""

    parts: tuple[str, ...]
    shared: tuple[str, ...] = ()

    @cached_property
    def part(self) -> re.Pattern[str]:
        """A tensor beside a module, by its key without peft's prefix."""
        names = "|".join(map(re.escape, sorted(self.parts, key=len, reverse=True)))
        return re.compile(
            rf"(?P<module>.+?)\.(?P<part>{names})(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?(?P<rest>)"
        )

    @cached_property
    def common(self) -> re.Pattern[str]:
        """A shared tensor, which peft may write once more beside each module."""
        names = "|".join(map(re.escape, self.shared)) or "(?!)"
        return re.compile(rf"(?:.+\.)?(?P<part>{names})(?:\.[^.]+)?")


METHODS: Mapping[str, MethodTensors] = {
    "LOHA": MethodTensors(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    "LOKR": MethodTensors(
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ),
    "VERA": MethodTensors(("vera_lambda_b", "vera_lambda_d"), ("vera_A", "vera_B")),
    "MISS": MethodTensors(("miss_block",)),
    "C3A": MethodTensors(("c3a_kernel",)),
    "GRALORA": MethodTensors(("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")),
    "DELORA": MethodTensors(("delora_A", "delora_B", "delora_lambda", "delora_w_norm")),
    "VBLORA": MethodTensors(
        tuple(f"vblora_logits_{side}{kind}" for side in "AB" for kind in ("", "_topk_indices", "_topk_weights")),
        ("vblora_vector_bank",),
    ),
    "RANDLORA": MethodTensors(("randlora_lambda", "randlora_gamma"), ("randlora_A", "randlora_B")),
    "FOURIERFT": MethodTensors(("fourierft_spectrum",)),
    "WAVEFT": MethodTensors(("waveft_spectrum",)),
    "TINYLORA": MethodTensors(("tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v")),
    "UNILORA": MethodTensors(
        tuple(f"unilora_{kind}_{side}" for side in "AB" for kind in ("indices", "scales")), ("unilora_theta_d",)
    ),
}


def is_bat(settings: Mapping[str, Any]) -> bool:
    """Whether these are settings of MiSS with blocks that multiply the base's weight."""
    return settings.get("peft_type") == "MISS" and settings.get("init_weights") == "bat"


@dataclass(frozen=True)
class ModuleDelta:
    """What an adapter of a method other than LoRA has for one module; shared tensors are among `parts`."""

    module: str
    method: str
    parts: Mapping[str, TensorRef]

    @property
    def described(self) -> str:
        """The parts and their shapes, for an error message."""
        return ", ".join(f"{name} {list(ref.shape)}" for name, ref in self.parts.items())


def module_deltas(
    method: str, tensors: Mapping[str, TensorRef], path: Path
) -> tuple[tuple[ModuleDelta, ...], dict[str, TensorRef]]:
    """(what belongs to each module, the tensors that belong to none), of tensors by their keys without peft's prefix.

    Raises AdapterError for a file of several adapters, or one that lacks the shared tensors."""
    names = METHODS[method]
    shared: dict[str, TensorRef] = {}
    modules: dict[str, dict[str, TensorRef]] = {}
    rest: dict[str, TensorRef] = {}
    adapters: set[str] = set()
    for name, ref in tensors.items():
        if found := names.common.fullmatch(name):
            shared.setdefault(found["part"], ref)
        elif found := names.part.fullmatch(name):
            modules.setdefault(found["module"], {})[found["part"]] = ref
            adapters |= {found["adapter"]} - {None}
        else:
            rest[name] = ref
    if len(adapters) > 1:
        raise AdapterError(
            f"{path} holds {len(adapters)} adapters ({', '.join(sorted(adapters))}); save one a folder."
        )
    if absent := [name for name in names.shared if name not in shared]:
        raise AdapterError(
            f"{path} has no {', '.join(absent)}: the {method} adapter was saved without the matrices that all modules "
            "share (save_projection: false), which peft draws again from a seed. Save it with save_projection=True."
        )
    return tuple(ModuleDelta(module, method, {**parts, **shared}) for module, parts in modules.items()), rest


def absent_parts(delta: ModuleDelta, needed: Iterable[str]) -> list[str]:
    """Parts that the module should have and has not."""
    return [name for name in needed if name not in delta.parts]
