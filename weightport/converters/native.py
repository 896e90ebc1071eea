"""What a native model expects to load, learned on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weightport.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class NativeTensors:
    """What a native model loads: shape by name (of tied tensors the one that is written), and which are buffers."""

    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str] = frozenset()

    def renamed(self, new_name: Callable[[str], str]) -> NativeTensors:
        """The same tensors under other names: those on disk of a class that calls them otherwise in memory."""
        return NativeTensors(
            {new_name(name): shape for name, shape in self.shapes.items()}, frozenset(map(new_name, self.buffers))
        )


def loadable_tensors(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> NativeTensors:
    """Every parameter and persistent buffer of the model; built on the meta device, so no memory is used. Raises
    ConfigurationError where the class refuses the configuration."""
    from transformers.initialization import no_init_weights

    # torch works random values out on the meta device in Python, and loads its compiler for that.
    try:
        with torch.device("meta"), no_init_weights():
            model = model_class(config)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise ConfigurationError(
            f"{model_class.__name__} cannot be built from the configuration that the checkpoint gives: "
            f"{type(error).__name__}: {error}\n"
            "  Its sizes contradict each other: the config.json, or the tensors, are of another model."
        ) from error
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return NativeTensors(shapes, frozenset(name for name, _ in model.named_buffers()) & frozenset(shapes))
