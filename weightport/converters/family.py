"""What a family of models has to say about itself; everything else is shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.converters.rules import RuleTable
from weightport.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from weightport.converters.native import NativeTensors
    from weightport.converters.plan import Plan
    from weightport.converters.processor import ImageUse, Processor


@dataclass(frozen=True)
class Options:
    """What the user asked of a conversion.

    `dtype` is the floating-point dtype of the output (None: each tensor keeps its own). `vocabulary` is a folder or a
    Hub id. `drop` are patterns of source tensors to leave out. `portable` writes the model's code beside the weights.
    `ema` takes the averaged weights of a training checkpoint. `parse_symbols` lets the tokenizer read symbols such as
    <bin_3> in plain text. `image_token` is how a family that needs a placeholder for images gets one: "reuse" an id
    that the original never uses, "append" a row, or "none" where the model is only looked at. `max_shard_bytes`
    bounds a weight file.
    """

    dtype: torch.dtype | None = None
    vocabulary: str | None = None
    drop: tuple[str, ...] = ()
    portable: bool = False
    ema: bool = False
    parse_symbols: bool = False
    image_token: str = "reuse"
    allow_nonfinite: bool = False
    overwrite: bool = False
    max_shard_bytes: int = 5 * 10**9


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint as a family reads it: which tensors are the model, what they mean, and its native configuration.

    `tensors` have the names that `rules` speak of. `options` are the original's own settings, as far as the family
    understands them (plain data, kept in conversion.json for the way back). `unread` are the bytes of the file's other
    sections. `notes` are for the user.
    """

    family: str
    layout: str
    title: str
    tensors: Mapping[str, TensorRef]
    rules: RuleTable
    config: PreTrainedConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


FAMILY_OPTIONS = {
    "vocabulary": "--vocab",
    "portable": "--portable",
    "ema": "--ema",
    "parse_symbols": "--parse-symbols",
    "image_token": "--image-token",
}
"""Options that not every family has, by their field of `Options`."""


class Family(Protocol):
    """One family's knowledge. Implementations hold no state. `accepts` are the `FAMILY_OPTIONS` that it has."""

    name: str
    title: str
    accepts: frozenset[str]

    def recognises(self, names: Mapping[str, TensorRef]) -> bool:
        """Whether tensors with these names (as the file has them) are a model of this family."""

    def read(self, checkpoint: Checkpoint, options: Options) -> SourceModel:
        """The model in the checkpoint. Raises WeightportError naming what does not fit."""

    def targets(self, config: PreTrainedConfig) -> NativeTensors:
        """What the native model of this configuration loads; no memory is used."""

    def build_processor(self, model: SourceModel, checkpoint: Checkpoint, options: Options) -> Processor | None:
        """The processor of the model, None where it is to be written without one. Raises WeightportError."""

    def image_use(self, config: PreTrainedConfig, height: int, width: int) -> ImageUse:
        """What the native model makes of a picture of height × width pixels."""

    def write_companions(self, model: SourceModel, plan: Plan, folder: Path, options: Options) -> None:
        """Write config.json, generation_config.json and the like into `folder`, where the processor is saved."""

    def rules_of(self, config: PreTrainedConfig, layout: str) -> RuleTable:
        """The rule table of a converted model, for the way back."""

    def original_document(self, config: PreTrainedConfig, options: Mapping[str, Any], model: Any) -> Any:
        """What the original's file holds, with `model` in the place of its state dict."""


@runtime_checkable
class HubFamily(Protocol):
    """A family whose original form is a folder of the Hub: exports are such folders, not single files."""

    def write_original_companions(
        self, directory: Path, config: PreTrainedConfig, options: Mapping[str, Any], folder: Path
    ) -> None:
        """Write what stands beside the original's weights (config.json, tokenizer) into `folder`; `directory` is the
        converted one, `options` are its record's."""


def check_accepted(family: Family, options: Options) -> None:
    """Raise UsageError for an option that the family would ignore."""
    default = Options()
    for field_name, flag in FAMILY_OPTIONS.items():
        if field_name not in family.accepts and getattr(options, field_name) != getattr(default, field_name):
            known = ", ".join(flag for name, flag in FAMILY_OPTIONS.items() if name in family.accepts) or "none"
            raise UsageError(
                f"{flag} means nothing for a checkpoint of {family.title}, whose own options are {known}."
            )
