"""adapter_config.json as data: which modules a LoRA adapter touches, and how strongly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from weightport.errors import AdapterError


@dataclass(frozen=True)
class LoraSettings:
    """The settings of a peft LoRA adapter, as its adapter_config.json states them."""

    data: Mapping[str, Any]

    @property
    def use_rslora(self) -> bool:
        return bool(self.data.get("use_rslora"))

    @property
    def default_rank(self) -> int:
        return int(self.data.get("r", 8))

    @property
    def default_alpha(self) -> float:
        alpha: float = self.data.get("lora_alpha", 8)
        return alpha

    def rank(self, module: str) -> int:
        """The rank of a module's pair: rank_pattern's first match, else r."""
        return int(self._patterned("rank_pattern", module, self.default_rank))

    def alpha(self, module: str) -> float:
        """The alpha of a module's pair: alpha_pattern's first match, else lora_alpha."""
        alpha: float = self._patterned("alpha_pattern", module, self.default_alpha)
        return alpha

    def scaling(self, module: str) -> float:
        """What B·A is multiplied with: alpha / rank, with rank-stabilised LoRA alpha / √rank."""
        rank = self.rank(module)
        alpha = float(self.alpha(module))
        return alpha / rank**0.5 if self.use_rslora else alpha / rank

    def _patterned(self, field: str, module: str, default: Any) -> Any:
        patterns = self.data.get(field) or {}
        # As peft matches: a key is the end of a module's name, from a dot on, and may be a regular expression.
        found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        return default if found is None else patterns[found]


def parse_settings(data: Any, where: str) -> LoraSettings:
    """Validate the adapter_config.json of pairs that are all there is to the adapter. Raises AdapterError for another
    method than LoRA, and for DoRA and trained biases."""
    settings = parse_lora_settings(data, where)
    if data.get("use_dora"):
        raise AdapterError(
            f"{where} asks for DoRA (use_dora), which depends on the norms of the base's weights; not supported."
        )
    if data.get("bias", "none") != "none":
        raise AdapterError(
            f"{where} trains biases (bias: {data['bias']!r}); only adapters with bias: 'none' are known."
        )
    return settings


def parse_lora_settings(data: Any, where: str) -> LoraSettings:
    """Validate an adapter_config.json. Raises AdapterError for another method than LoRA, or another model."""
    if not isinstance(data, Mapping):
        raise AdapterError(f"{where} should hold a JSON object; found {type(data).__name__}.")
    kind = data.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{where} is of the kind {kind!r}; LORA adapters are known.")
    if data.get("layer_replication"):
        raise AdapterError(
            f"{where} replicates layers (layer_replication); the native model has the original's layers."
        )
    if data.get("bias") not in (None, "none", "all", "lora_only"):
        raise AdapterError(f"{where}: bias is {data['bias']!r}; expected none, all or lora_only.")
    for field in ("rank_pattern", "alpha_pattern"):
        if data.get(field) is not None and not isinstance(data[field], Mapping):
            raise AdapterError(f"{where}: {field} should be an object of module names; found {data[field]!r}.")
    rank = data.get("r", 8)
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"{where}: r is {rank!r}; expected a rank of at least 1.")
    return LoraSettings(data)


def low_rank_product(a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """scaling · B·A in the shape of the weight it belongs to, computed in at least float32.

    Linear: A [r, in], B [out, r]. Convolution: A [r, in, height, width], B [out, r, 1, 1].
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    product = b.to(wide).flatten(1) @ a.to(wide).flatten(1)
    return (product * scaling).reshape(b.shape[0], *a.shape[1:])
