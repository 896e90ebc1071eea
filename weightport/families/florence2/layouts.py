"""Where the model is inside a checkpoint: below any stack of prefixes, under the original's own names.

Trainers nest the state dict (`model_state_dict`), wrappers put names in front (`module.`, `base_model.model.`) and
between (`_orig_mod`, `_fsdp_wrapped_module`). Whatever stands before the model's own first names is a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.checkpoints.types import NamedTensors
from weightport.errors import CheckpointError

# The parts of the original's outer module; a tensor's own name begins at one of them.
_PARTS = frozenset(
    {
        "vision_tower",
        "language_model",
        "image_projection",
        "image_proj_norm",
        "image_pos_embed",
        "visual_temporal_embed",
    }
)
# Components that wrappers put between a module and its parts; no module of the original has such a name.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# One tensor that every checkpoint of the family has: what stands before it is the model's prefix.
_MARK = "image_pos_embed.row_embeddings.weight"
_OPTIMIZERS = ("optim", "scheduler", "scaler")


@dataclass(frozen=True)
class Found:
    """The model's tensors under the original's names, what stood before them, and the bytes of the other sections."""

    prefix: str
    tensors: NamedTensors
    unread: Mapping[str, int]
    has_ema: bool


def is_florence2(names: Mapping[str, Any]) -> bool:
    """Whether these tensor names are those of the original implementation, below whatever prefix."""
    return any(own_name(name)[1] == _MARK for name in names)


def locate(checkpoint: Checkpoint, *, ema: bool) -> Found:
    """The model inside the checkpoint. Raises CheckpointError when it holds several, or no averaged one on request."""
    prefixes = [prefix for prefix, own in map(own_name, checkpoint) if own == _MARK]
    averaged = [prefix for prefix in prefixes if "ema" in prefix.lower()]
    if ema and not averaged:
        raise CheckpointError(
            f"{checkpoint.path} holds no averaged weights (no section with ema in its name). Leave --ema out to "
            "convert the model's own."
        )
    candidates = averaged if ema else [prefix for prefix in prefixes if prefix not in averaged] or prefixes
    if len(candidates) != 1:
        shown = ", ".join(prefix or "(top level)" for prefix in candidates)
        raise CheckpointError(
            f"{checkpoint.path} holds {len(candidates)} Florence-2 models: {shown}. Save the one you mean on its own."
        )
    tensors: dict[str, TensorRef] = {}
    unread: dict[str, int] = {}
    for name, ref in checkpoint.items():
        own = _belongs(name, candidates[0])
        if own is None:
            section = name.partition(".")[0]
            unread[section] = unread.get(section, 0) + ref.nbytes
        elif own in tensors:
            raise CheckpointError(f"{checkpoint.path} holds {own} twice, under different wrappers ({name}).")
        else:
            tensors[own] = replace(ref, name=own)
    return Found(candidates[0], NamedTensors(tensors.values()), unread, bool(averaged) and not ema)


def own_name(name: str) -> tuple[str, str | None]:
    """(prefix, the original's name) of a tensor; the second is None when no part of the model is in its name.

    module._orig_mod.vision_tower.convs.0.norm.bias → ("", vision_tower.convs.0.norm.bias): wrappers are no prefix.
    """
    components = [part for part in name.split(".") if part not in _WRAPPERS]
    start = next((place for place, part in enumerate(components) if part in _PARTS), None)
    if start is None:
        return ".".join(components), None
    return ".".join(components[:start]), ".".join(components[start:])


def _belongs(name: str, prefix: str) -> str | None:
    """The original's name of a tensor of the model below `prefix`, None for a tensor of another section.

    What stands in the model's section without being a part of the model keeps its name, for the plan to refuse it.
    """
    found, own = own_name(name)
    if own is not None:
        return own if found == prefix else None
    if prefix:
        return found.removeprefix(prefix + ".") if found.startswith(prefix + ".") else None
    return None if found.startswith(_OPTIMIZERS) else found
