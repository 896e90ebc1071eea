"""FSDP2 where accelerate alone does not do it: tied weights that several modules hold, and processes without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, fsdp_utils
from torch import nn

from weightport.errors import RecipeError


def is_fsdp2(accelerator: Accelerator) -> bool:
    """Whether the accelerator shards with `fully_shard`."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and plugin.fsdp_version == 2


def shard_without_gpu() -> None:
    """Let the Accelerators of this process shard on CPUs too: they would replicate there, and say nothing, though gloo
    has the collectives. Again is harmless."""
    original = AcceleratorState.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or getattr(self, "fsdp_plugin", None)
        # The state is made again wherever it is asked for.
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init


def prepare_sharding(model: Any, accelerator: Accelerator) -> None:
    """What a model needs before accelerate shards it: the names of its layers that are there, and modules that hold
    the same parameter sharded in one group each, because torch refuses it in two.

    accelerate groups input and output embeddings, and an encoder-decoder's stacks hold embeddings of their own. It
    leaves what is sharded already. Raises RecipeError where weights are loaded in one process alone.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    groups = tied_modules(model)
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        # A class names the layers of all its models, and accelerate refuses one that is not in this.
        there = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = [
            name for name in getattr(model, "_no_split_modules", None) or () if name in there
        ]
    if groups and plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "training.fsdp_config: cpu_ram_efficient_loading loses weights that modules share, as this model's "
            "embeddings are. Turn it off."
        )
    for modules in groups:
        # They begin and end a forward pass: gathered once, they stay until its backward pass.
        fully_shard(
            modules,
            reshard_after_forward=False,
            offload_policy=plugin.cpu_offload,
            mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        )


@contextmanager
def loading_incomplete_states() -> Iterator[None]:
    """Let an optimizer's state be loaded that lacks parameters: those that no step has given a gradient have none."""
    complete = fsdp_utils._prepare_sd_options

    def incomplete(plugin: Any) -> Any:
        options = complete(plugin)
        return options if options is None else replace(options, strict=False)

    with patch.object(fsdp_utils, "_prepare_sd_options", incomplete):
        yield


def without_tied(state: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Gathered weights by name, each parameter under one of its names: gathering makes copies of what is shared, which
    would be saved more than once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: each for name, each in state.items() if name not in tied}


def tied_modules(model: nn.Module) -> list[list[nn.Module]]:
    """Modules that hold one parameter, for each parameter that several hold. Those of one parameter are one group,
    and so are those of several that share a module."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    groups: list[list[nn.Module]] = []
    for modules in holders.values():
        if len(modules) > 1:
            overlapping = [group for group in groups if any(each in modules for each in group)]
            merged = list(dict.fromkeys([*(each for group in overlapping for each in group), *modules]))
            groups = [group for group in groups if group not in overlapping] + [merged]
    return groups
