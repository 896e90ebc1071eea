"""LoRA on a model: which modules, and whether they may be changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from weightport.errors import RecipeError
from weightport.finetuning.family import Parts


def with_lora(model: PreTrainedModel, parts: Parts, frozen: frozenset[str], settings: Mapping[str, Any]) -> Any:
    """The model with peft's LoRA, by LoraConfig's own names; without `target_modules` the family's, in what is not
    frozen. Raises RecipeError when targets match nothing or reach into a frozen part."""
    from peft import LoraConfig, get_peft_model

    targets = settings.get("target_modules") or _default_targets(parts, frozen)
    if targets == "all-linear":
        targets = _all_linear(model)
    try:
        config = LoraConfig(**{**settings, "target_modules": targets})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"lora: {error}") from error
    reached = [name for name, module in model.named_modules() if _is_target(config, name) and _can_hold(module)]
    if not reached and not config.target_parameters:
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise RecipeError(
            f"lora.target_modules {_shown(targets)} matches no module. Linear layers here are "
            f"{', '.join(sorted(linear))}."
        )
    inside = [name for name in reached if parts.part_of(name) in frozen]
    if inside:
        raise RecipeError(
            f"lora.target_modules {_shown(targets)} reaches into what is frozen: {len(inside)} modules, such as "
            f"{inside[0]} ({parts.part_of(inside[0])}). Name modules outside, or freeze less."
        )
    try:
        with without_deprecations():
            return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"lora: {error}") from error


@contextmanager
def without_deprecations() -> Iterator[None]:
    """peft asks transformers by a name that transformers is about to drop; its users need not hear of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _default_targets(parts: Parts, frozen: frozenset[str]) -> str:
    expressions = [expression for part, expression in parts.lora.items() if part not in frozen]
    if not expressions:
        raise RecipeError(
            f"Everything that LoRA changes by default ({', '.join(parts.lora)}) is frozen: freeze less, or set "
            "lora.target_modules."
        )
    return "|".join(f"({expression})" for expression in expressions)


def _all_linear(model: PreTrainedModel) -> list[str]:
    """What peft means by `all-linear`: every linear layer but the head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def _is_target(config: Any, name: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(name) and bool(check_target_module_exists(config, name))


def _can_hold(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _shown(targets: Any) -> str:
    if isinstance(targets, str):
        return repr(targets)
    names = sorted(targets)
    return repr(names) if len(names) <= 8 else f"{names[:3]!r} and {len(names) - 3} more"
