"""What the conversion engine needs of a family of models; everything else is shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from weightport.checkpoints import TensorRef
from weightport.checkpoints.sources import MAIN, Sources
from weightport.checkpoints.types import NamedTensors
from weightport.converters.options import ConversionOptions
from weightport.converters.rules import RuleTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from weightport.converters.native import NativeTensors
    from weightport.converters.plan import Plan
    from weightport.converters.processor import ImageUse, Processor
    from weightport.writing.outgoing import Outgoing

OriginalForm = Literal["torch", "folder", "npz"]
"""What an export writes: one file of torch.save, a folder as the Hub has it, or an .npz."""


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint as a family reads it: which tensors are the model, what they mean, and its native configuration.

    `tensors` have the names that `rules` speak of. `origins` names the source of a tensor where it is not the main
    one. `sections` are what stands before the names in a source's file, "model" of `model.encoder.layer_norm.bias`.
    `unused` are tensors that a source has beside them, which another one gives or the original does not use
    (name → reason). `options` are the original's own settings,
    as far as the family understands them (plain data, kept in conversion.json for the way back). `unread` are the
    bytes of the file's other sections. `notes` are for the user.
    """

    family: str
    layout: str
    title: str
    tensors: NamedTensors
    rules: RuleTable
    config: PreTrainedConfig
    origins: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def origin(self, name: str) -> str:
        """The source that gives the tensor `name`."""
        return self.origins.get(name, MAIN)

    def tensors_of(self, source: str) -> NamedTensors:
        """The tensors that `source` gives."""
        return NamedTensors(ref for name, ref in self.tensors.items() if self.origin(name) == source)


class ConversionStage(Protocol):
    """One family's knowledge of its checkpoints. Implementations hold no state.

    `original_form` is what exports are. A stage may also have `frozen`: beginnings of original names that the
    original's trainer never trains nor saves, with where the original takes these tensors from. An export of a
    directory without a record leaves them out.
    """

    name: str
    title: str
    original_form: OriginalForm

    def recognises(self, names: Mapping[str, TensorRef]) -> bool:
        """Whether tensors with these names (as the file has them) are a model of this family."""

    def read(self, sources: Sources, options: ConversionOptions) -> SourceModel:
        """The model in the sources. `options` are of the family's own type. Raises WeightportError naming what does
        not fit."""

    def targets(self, config: PreTrainedConfig) -> NativeTensors:
        """What the native model of this configuration stores on disk; no memory is used."""

    def build_processor(self, model: SourceModel, sources: Sources, options: ConversionOptions) -> Processor | None:
        """The processor of the model, None where it is to be written without one. Raises WeightportError."""

    def image_use(self, config: PreTrainedConfig, height: int, width: int) -> ImageUse:
        """What the native model makes of a picture of height × width pixels."""

    def write_companions(self, model: SourceModel, plan: Plan, folder: Path, options: ConversionOptions) -> None:
        """Write config.json, generation_config.json and the like into `folder`, where the processor is saved."""

    def rules_of(self, config: PreTrainedConfig, layout: str) -> RuleTable:
        """The rule table of a converted model, for the way back."""

    def original_document(
        self, config: PreTrainedConfig, options: Mapping[str, Any], model: Mapping[str, Outgoing]
    ) -> Mapping[str, Any]:
        """What the original's file holds, with `model` in the place of its state dict (form "torch")."""

    def write_original_companions(
        self, directory: Path, config: PreTrainedConfig, options: Mapping[str, Any], folder: Path
    ) -> None:
        """Write what stands beside the original's weights (config.json, tokenizer) into `folder` (form "folder");
        `directory` is the converted one, `options` are its record's."""
