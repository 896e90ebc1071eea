"""adapter_config.json of a LoRA adapter that is to be merged: what it says, and what of it no merge can give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightport.adapters.reading.additive_tensors import METHODS
from weightport.adapters.reading.lora_settings import LoraSettings, is_number, require_fields
from weightport.checkpoints.formats.sharded import read_json
from weightport.converters.lora_patterns import of_layer, of_saved, shown
from weightport.errors import AdapterError

CONFIG = "adapter_config.json"

# Settings of peft 0.21 under which an adapter is more than B·A beside a weight: field → what it does.
_NOT_MERGEABLE: Mapping[str, str] = {
    "layer_replication": "repeats layers of the base, so the merged model would have another architecture",
    "use_qalora": "pools its inputs in groups (QA-LoRA)",
    "arrow_config": "chooses among adapters token by token (Arrow)",
    "kasa_config": "subtracts a part of the base's singular values first (KaSA)",
    "monteclora_config": "draws its weights at random (MonteCLoRA)",
    "alora_invocation_tokens": "acts only after its invocation tokens (activated LoRA)",
    "megatron_config": "is for Megatron's parallel layers",
}

# Methods that act through tokens, activations or a choice among adapters: no weight does the same.
_NOT_WEIGHTS: Mapping[str, str] = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        "puts trained vectors before the prompt",
    ),
    "ADAPTION_PROMPT": "adds trained vectors to the attention",
    **dict.fromkeys(("XLORA", "POLY"), "chooses among adapters by the input"),
}

# Methods whose change of the weights is in no file alone: what it takes beside.
_NEEDS_MORE: Mapping[str, str] = {
    "PSOFT": "singular vectors of the base that are saved nowhere, and whose signs are each library's choice",
    **dict.fromkeys(("OFT", "BOFT", "HRA", "ROAD"), "a rotation of the base's weights"),
    **dict.fromkeys(("HIRA", "IA3"), "a scaling of the base's weights or activations"),
    **dict.fromkeys(("LN_TUNING", "TRAINABLE_TOKENS", "SHIRA"), "replaced or single values, not a matrix"),
    "ADALORA": "how many ranks the training kept",
}

# Initialisations that take a part out of the base's weights before training begins.
_CHANGES_BASE = re.compile(r"(pissa|olora|corda|loftq|lora_ga)", re.IGNORECASE)


@dataclass(frozen=True)
class MergeSettings(LoraSettings):
    """The settings of a LoRA adapter that can be merged."""

    where: str = CONFIG

    @property
    def method(self) -> str:
        """peft's name of the method: LORA, or one of additive_tensors.METHODS."""
        return str(self.data.get("peft_type"))

    @property
    def stated(self) -> tuple[int | None, float | None]:
        """(rank, alpha) as the settings have them, by whichever name the method gives the second."""
        alphas: list[Any] = [self.data.get(name) for name in ("lora_alpha", "alpha", "randlora_alpha")]
        rank = self.data.get("r", self.default_rank if self.method == "LORA" else None)
        default = self.default_alpha if self.method == "LORA" else None
        return rank, next((float(value) for value in alphas if is_number(value)), default)

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.data.get("fan_in_fan_out"))

    @property
    def use_dora(self) -> bool:
        return bool(self.data.get("use_dora"))

    @property
    def ensure_weight_tying(self) -> bool:
        return bool(self.data.get("ensure_weight_tying"))

    @property
    def target_parameters(self) -> tuple[str, ...]:
        return tuple(self.data.get("target_parameters") or ())

    @property
    def base_model(self) -> str | None:
        return self.data.get("base_model_name_or_path") or None

    def trained_tokens(self, module: str) -> list[int] | None:
        """Rows of the embedding `module` that were trained one by one (trainable_token_indices)."""
        found = self.data.get("trainable_token_indices")
        if isinstance(found, Mapping):
            return next((list(rows) for name, rows in found.items() if _ends(module, name)), None)
        return list(found) if found is not None else None

    def targets(self, module: str) -> bool:
        """Whether target_modules, exclude_modules and the layer options choose `module`, as peft decides it."""
        excluded = self.data.get("exclude_modules")
        if isinstance(excluded, str):
            if re.fullmatch(excluded, module):
                return False
        elif any(_ends(module, name) for name in excluded or ()):
            return False
        if any(re.match(of_saved(name), module) for name in self.data.get("modules_to_save") or ()):
            return False
        wanted = self.data.get("target_modules")
        if isinstance(wanted, str):
            return wanted != "all-linear" and re.fullmatch(wanted, module) is not None
        if not wanted or not any(_ends(module, name) for name in wanted):
            return False
        return module in wanted or self._in_chosen_layer(module)

    def _in_chosen_layer(self, module: str) -> bool:
        layers = self.data.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.data.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = (re.match(of_layer(pattern), module) for pattern in patterns)
        index = next((int(match["idx"]) for match in found if match), None)
        return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def read_merge_settings(adapter: Path) -> MergeSettings:
    """The settings in the adapter's folder. Raises AdapterError for another method, or what no merge can give."""
    path = adapter / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{adapter} is not an adapter: it has no {CONFIG}. Give the folder that peft's save_pretrained wrote."
        )
    return parse_merge_settings(read_json(path), str(path))


def _require_method(data: Mapping[str, Any], where: str) -> None:
    """Raises AdapterError for a method whose adapters are not merged, with the reason."""
    kind = data.get("peft_type")
    if kind == "LORA":
        return
    if isinstance(kind, str) and kind in METHODS:
        if kind == "UNILORA" and not data.get("save_indices"):
            raise AdapterError(
                f"{where}: save_indices is false, so which values of the vector a module has is drawn again from a "
                "seed, in the order in which the running model has its modules. Load the adapter in peft, set "
                "save_indices=True in its configuration, and save it again."
            )
        return
    if what := _NOT_WEIGHTS.get(str(kind)):
        raise AdapterError(
            f"{where}: the adapter's peft_type is {kind}, which {what}; no merged weight does the same."
        )
    needs = f", which takes {what}" if (what := _NEEDS_MORE.get(str(kind))) else ""
    raise AdapterError(
        f"{where}: the adapter's peft_type is {shown(kind)}{needs}; merged are LORA, {', '.join(METHODS)}. "
        "Merge this one with peft's merge_and_unload."
    )


def parse_merge_settings(data: Any, where: str) -> MergeSettings:
    """Validate the contents of an adapter_config.json. Raises AdapterError."""
    if not isinstance(data, Mapping):
        raise AdapterError(f"{where} should hold a JSON object; found {type(data).__name__}.")
    _require_method(data, where)
    for field, what in _NOT_MERGEABLE.items():
        if data.get(field):
            raise AdapterError(f"{where}: {field} is set. Such an adapter {what}; no merged weight does the same.")
    start = data.get("init_lora_weights", True)
    if isinstance(start, str) and _CHANGES_BASE.match(start):
        raise AdapterError(
            f"{where}: init_lora_weights is {shown(start)}, which took a part out of the base's weights before "
            "training, so the adapter does not belong to the base as it is. Save it with peft's "
            "path_initial_model_for_weight_conversion, which makes it an ordinary LoRA adapter, and merge that."
        )
    require_fields(data, where)
    return MergeSettings(data, where)
