"""State dicts of models with a LoRA adapter still in them: each pair is merged into its base layer as it is read.

`torch.save(peft_model.state_dict())` writes `….base_layer.weight` beside `….lora_A.default.weight`; stripping the
names would lose the adapter. Its scaling stands in no tensor, so adapter_config.json must stand beside the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from weightport.adapters.arithmetic import with_low_rank
from weightport.adapters.reading.lora_settings import parse_settings
from weightport.checkpoints import TensorRef
from weightport.errors import AdapterError

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(\.(?P<adapter>[^.]+))?\.weight")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
_ORIGINAL = re.compile(r"(?P<module>.+)\.original_module\.(?P<rest>.+)")
_BASE = re.compile(r"(?P<module>.+)\.base_layer\.(?P<rest>.+)")
_OTHER = re.compile(r".+\.(lora_(?!A|B)\w+|hada_\w+|lokr_\w+|ia3_l|oft_\w+|vera_\w+)(\..+)?")


def has_adapter(names: Mapping[str, Any]) -> bool:
    """Whether a state dict holds parts of a peft adapter."""
    return any(pattern.fullmatch(name) for name in names for pattern in (_LORA, _SAVED, _BASE, _OTHER))


def merge_dump(
    tensors: Mapping[str, TensorRef], settings: Any, where: str
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """(the tensors of the merged model under the base's names, notes). A pair is merged when its weight is read.

    `settings` is the parsed adapter_config.json, None when there is none: then pairs of A and B are refused (without
    pairs, base layers are the model). Raises AdapterError.
    """
    if other := [name for name in tensors if _OTHER.fullmatch(name)]:
        raise AdapterError(
            f"{where} holds an adapter of an unknown kind: {', '.join(other[:4])}. Merge it with peft first."
        )
    pairs: dict[str, dict[str, TensorRef]] = {}
    saved: dict[str, TensorRef] = {}
    plain: dict[str, TensorRef] = {}
    adapters = set()
    for name, ref in tensors.items():
        if found := _LORA.fullmatch(name):
            pairs.setdefault(found["module"], {})[found["side"]] = ref
            adapters.add(found["adapter"])
        elif found := _SAVED.fullmatch(name):
            saved[f"{found['module']}.{found['rest']}"] = ref
            adapters.add(found["adapter"])
        elif found := _BASE.fullmatch(name) or _ORIGINAL.fullmatch(name):
            plain[f"{found['module']}.{found['rest']}"] = ref
        else:
            plain[name] = ref
    if len(adapters) > 1:
        raise AdapterError(
            f"{where} holds {len(adapters)} adapters ({', '.join(map(str, adapters))}); save it with one."
        )
    merged = {name: replace(ref, name=name) for name, ref in {**plain, **saved}.items()}
    if not pairs:
        return merged, ()
    if settings is None:
        raise AdapterError(
            f"{where} is the state dict of a model with a LoRA adapter in it ({len(pairs)} pairs of lora_A and "
            "lora_B), and no adapter_config.json stands beside it: the adapter's strength (lora_alpha, r) is in no "
            "tensor.\n  Put the training's adapter_config.json beside the file to merge the adapter, or pass --drop "
            "'**.lora_{A,B}.**' to convert the base alone (right where peft had already merged it in place)."
        )
    lora = parse_settings(settings, f"adapter_config.json beside {where}")
    lora.require_bounded(pairs, f"adapter_config.json beside {where}")
    for module, pair in pairs.items():
        merged[f"{module}.weight"] = _merged(module, pair, merged.get(f"{module}.weight"), lora.scaling(module), where)
    note = (
        f"Merged the adapter in the file: {len(pairs)} pairs of lora_A and lora_B, scaled as adapter_config.json says "
        f"({lora.scaling(next(iter(pairs))):g})."
    )
    return merged, (note,)


def _merged(
    module: str, pair: Mapping[str, TensorRef], base: TensorRef | None, scaling: float, where: str
) -> TensorRef:
    """The base weight with its pair in it; computed when it is read."""
    if set(pair) != {"A", "B"} or base is None:
        absent = "base_layer.weight" if base is None else f"lora_{({'A', 'B'} - set(pair)).pop()}"
        raise AdapterError(f"{where}: {module} lacks its {absent}.")
    a, b = pair["A"], pair["B"]
    shape = (b.shape[0], *a.shape[1:])
    if a.shape[0] != b.shape[1] or shape != base.shape:
        raise AdapterError(
            f"{where}: lora_B {list(b.shape)} · lora_A {list(a.shape)} of {module} do not give its weight "
            f"{list(base.shape)}."
        )

    def load() -> torch.Tensor:
        return with_low_rank(base.read(), a.read(), b.read(), scaling)

    return TensorRef(f"{module}.weight", base.shape, base.element, load)
