"""What is trained and what stands still."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from weightport.errors import RecipeError
from weightport.finetuning.family import Parts


@dataclass(frozen=True)
class Share:
    """Parameters of one part of the model, and how many of them are trained."""

    part: str
    trainable: int
    total: int


def frozen_parts(parts: Parts, targets: Sequence[str]) -> frozenset[str]:
    """The parts that the freeze targets name. Raises RecipeError for one that the family does not have."""
    for target in targets:
        if target not in parts.targets:
            raise RecipeError(
                f"There is no freeze target {target!r} in this family; it has {', '.join(parts.targets)}."
            )
    return frozenset(part for target in targets for part in parts.targets[target])


def freeze(model: nn.Module, parts: Parts, frozen: frozenset[str], *, still: bool) -> None:
    """Stop training the parameters of `frozen` parts. With `still` their modules also stay in evaluation mode, so that
    neither dropout acts nor batch statistics move, whatever calls `train()`."""
    for name, parameter in model.named_parameters():
        if parts.part_of(name) in frozen:
            parameter.requires_grad = False
    if not still:
        return
    for name, module in model.named_modules():
        if name and parts.part_of(name) in frozen and not _holds_others(module, name, parts, frozen):
            module.train = types.MethodType(_stay_still, module)
    model.train(model.training)


def _stay_still(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def _holds_others(module: nn.Module, name: str, parts: Parts, frozen: frozenset[str]) -> bool:
    """Whether a part that is trained lies inside the module, as OFA's embeddings lie inside its encoder."""
    return any(parts.part_of(f"{name}.{inner}") not in frozen for inner, _ in module.named_parameters())


def shares(model: nn.Module, parts: Parts) -> list[Share]:
    """Parameters by part, adapters included, in the order of the parts; tied ones are counted once."""
    trainable: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = parts.part_of(plain_name(name)) or "other"
        total[part] = total.get(part, 0) + parameter.numel()
        trainable[part] = trainable.get(part, 0) + parameter.numel() * parameter.requires_grad
    return [Share(part, trainable[part], total[part]) for part in (*parts.prefixes, "other") if part in total]


def plain_name(name: str) -> str:
    """A parameter's name without what peft and wrappers put around it."""
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.replace(".base_layer.", ".")


def trained(found: Sequence[Share]) -> Mapping[str, int]:
    """Trainable parameters by part, those of parts that stand still left out."""
    return {share.part: share.trainable for share in found if share.trainable}
