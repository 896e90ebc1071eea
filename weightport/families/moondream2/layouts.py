"""Where a moondream2 is in a checkpoint, and whose names its tensors have.

Files of 2024 begin with `vision_encoder.` and `text_model.`, those of 2025 with `model.vision.`, `model.text.` and
`model.region.`, or without `model.` where the project's own training scripts wrote them. torch.compile puts
`._orig_mod` into names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.checkpoints.types import NamedTensors
from weightport.errors import CheckpointError, ConfigurationError
from weightport.families.moondream2.revisions import Keys

COMPILED = "_orig_mod"
MARKS: Mapping[Keys, str] = {
    "2024": "text_model.transformer.h.0.mixer.Wqkv.weight",
    "2025": "text.blocks.0.attn.qkv.weight",
}
"""One tensor that every checkpoint of the naming has: what stands before it is the model's prefix."""
OTHERS: Mapping[str, str] = {
    r"(.+\.)?text\.blocks\.\d+\.(mlp\.router|attn\.tau)\..+": "moondream3, whose text model has experts",
    r"(.+\.)?vision_encoder\.projection\.mlp1\..+": "moondream1, whose projector has two networks",
}
"""Models of the same project with names like these."""
QUANTIZED = re.compile(r"(.+\.)?text\.blocks\.0\.(attn|mlp)\..+\.(packed|scale|zero_point)")
VISION: Mapping[Keys, str] = {"2024": "vision_encoder.", "2025": "vision."}
PROJECTOR_INPUT: Mapping[Keys, str] = {
    "2024": "vision_encoder.projection.mlp.fc1.weight",
    "2025": "vision.proj_mlp.fc1.weight",
}


@dataclass(frozen=True)
class Found:
    """The model in a file: its tensors without `prefix`, and whose names they have."""

    prefix: str
    keys: Keys
    tensors: NamedTensors


def own_name(name: str) -> str:
    """`name` without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def place_of(names: Iterable[str]) -> tuple[str, Keys] | None:
    """(what stands before the model's names, whose names they are); None where there is no moondream2.

    A language model of these names alone is none: a vision tower has to be there too.
    """
    known = {own_name(name) for name in names}
    for keys, mark in MARKS.items():
        for name in known:
            if name == mark or name.endswith(f".{mark}"):
                prefix = name.removesuffix(mark).removesuffix(".")
                start = f"{prefix}." if prefix else ""
                if any(each.startswith(start + VISION[keys]) for each in known):
                    return prefix, keys
    return None


def is_quantized(names: Iterable[str]) -> bool:
    """Whether these are a moondream2 with int4 weights."""
    return any(QUANTIZED.fullmatch(own_name(name)) for name in names)


def is_moondream2(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold a moondream2, of whatever precision."""
    known = tuple(names)
    return place_of(known) is not None or is_quantized(known)


def locate(checkpoint: Checkpoint) -> Found:
    """The moondream2 in a checkpoint that has one. Raises CheckpointError, ConfigurationError."""
    if is_quantized(checkpoint):
        raise ConfigurationError(
            f"{checkpoint.path} holds int4 weights (tensors *.packed, *.scale, *.zero_point), which cannot be "
            "converted without loss.\n  Convert the float16 or bfloat16 checkpoint of the same revision."
        )
    for pattern, said in OTHERS.items():
        other = next((name for name in checkpoint if re.fullmatch(pattern, own_name(name))), None)
        if other is not None:
            raise ConfigurationError(f"{checkpoint.path} is {said} ({other}): only moondream2 can be converted.")
    found = place_of(checkpoint)
    if found is None:
        raise CheckpointError(f"{checkpoint.path} holds no moondream2.")
    prefix, keys = found
    start = f"{prefix}." if prefix else ""
    tensors: dict[str, TensorRef] = {}
    for name, ref in checkpoint.items():
        own = own_name(name)
        short = own.removeprefix(start)
        if short in tensors:
            raise CheckpointError(f"{checkpoint.path} holds {short} twice, once as {name}.")
        tensors[short] = replace(ref, name=short)
    return Found(prefix, keys, NamedTensors(tensors.values()))
