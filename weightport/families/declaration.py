"""What a family of models says of itself: one immutable value, its stages imported when they are asked for.

This is the interface that families of other packages implement too (docs/adding-a-family.md). Importing a declaration
imports neither torch nor transformers: command lines are generated from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from weightport.converters.options import ConversionOptions
from weightport.converters.portable import AutoMap
from weightport.errors import FamilyError
from weightport.families.signature import Signature

if TYPE_CHECKING:
    from weightport.checkpoints import Checkpoint, TensorRef
    from weightport.converters.family import ConversionStage
    from weightport.finetuning.evaluation.retrieval import RetrievalStage
    from weightport.finetuning.family import Family as TrainingStage
    from weightport.parity.family import Family as ParityTable

INTERFACE = 1
"""Version of this interface. It grows when a declaration of an earlier version would no longer work."""


@dataclass(frozen=True)
class Source:
    """A source beside the main checkpoint: what it is called in `convert({...})`, and its option on the command line.

    `required`: a conversion cannot do without. `hub`: a Hub id is taken too.
    """

    name: str
    flag: str
    help: str
    metavar: str = "PATH"
    required: bool = False
    hub: bool = False


@dataclass(frozen=True)
class Family:
    """One family.

    Who it is: `name` (of commands, recipes, references), `title`, `original` (what its checkpoints are, for help
    texts), `model_types` (config.json's of the native models), `signatures` (tensor names by which a checkpoint is
    told), `hub_task`, `licence` (a Hub licence id of the released checkpoints, None where they differ) and
    `licence_note` and
    `card_prompt` (the prompt of the example, as Python) for cards.

    What it takes: `options` (its own type), `sources` beside the main checkpoint.

    Its stages, as `module:attribute`: `conversion`, `parity`, `training`; None where it has none. `retrieval_stage` is
    a function (config.json) → the stage of models for image-text retrieval, None for others. `about_stage` is a
    function (checkpoint) → sentences on which of the family's releases it is, for `weightport inspect`.
    `recognition` is a function (tensors by name) → whether they are a checkpoint of the family: what the conversion's
    `recognises` answers, without importing the conversion; None asks the conversion.

    What engines need of it as data: `bare` (options with which a checkpoint is only looked at), `portable` (auto_map
    entries of the modelling code in the package `portable_code`, which is written beside weights), `ties` (further
    names of tied tensors, by the name that is written), `verification_prompt` (a prompt that runs every part), `tasks`
    (prompts by task for `weightport generate`, where the processor has none of its own).

    What judges it: `cases`, as `package:folder`, the cases that are installed with it (weightport.conformance).
    """

    name: str
    title: str
    original: str
    model_types: tuple[str, ...]
    conversion_stage: str
    parity_stage: str | None = None
    training_stage: str | None = None
    retrieval_stage: str | None = None
    about_stage: str | None = None
    recognition: str | None = None
    signatures: tuple[Signature, ...] = ()
    options: type[ConversionOptions] = ConversionOptions
    sources: tuple[Source, ...] = ()
    hub_task: str = "image-text-to-text"
    licence: str | None = None
    licence_note: str = ""
    card_prompt: str | None = None
    bare: Mapping[str, Any] = field(default_factory=dict)
    portable: tuple[AutoMap, ...] = ()
    portable_code: str | None = None
    ties: Mapping[str, str] = field(default_factory=dict)
    verification_prompt: str | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    cases: str | None = None
    interface: int = INTERFACE

    @property
    def command(self) -> str:
        """The command that converts its checkpoints."""
        return f"port-{self.name}"

    @property
    def bare_options(self) -> ConversionOptions:
        """Options with which a checkpoint is only looked at: no tokenizer is needed."""
        return self.options(**self.bare)

    @property
    def conversion(self) -> ConversionStage:
        return cast("ConversionStage", self._stage("conversion", self.conversion_stage))

    @property
    def parity(self) -> ParityTable:
        """Raises FamilyError where the family has none."""
        return cast("ParityTable", self._stage("parity", self.parity_stage))

    @property
    def training(self) -> TrainingStage:
        """Raises FamilyError where the family has none."""
        return cast("TrainingStage", self._stage("fine-tuning", self.training_stage))

    def training_of(self, config: Mapping[str, Any]) -> TrainingStage:
        """The training stage for a native model of this config.json: a stage that differs between models of its family
        has a method `of` that gives the one. Raises FamilyError where the family has none."""
        stage: Any = self.training
        return cast("TrainingStage", stage.of(config) if hasattr(stage, "of") else stage)

    def retrieval_of(self, config: Mapping[str, Any]) -> RetrievalStage | None:
        """The stage of a native model of this config.json that finds texts by pictures; None for other models."""
        if self.retrieval_stage is None:
            return None
        return cast("RetrievalStage | None", self._stage("retrieval", self.retrieval_stage)(config))

    def about(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """What the family says of a checkpoint that it recognises."""
        if self.about_stage is None:
            return ()
        return tuple(self._stage("description", self.about_stage)(checkpoint))

    def recognises(self, names: Mapping[str, TensorRef]) -> bool:
        """Whether tensors of these names are a checkpoint of this family."""
        if self.recognition is None:
            return self.conversion.recognises(names)
        return bool(self._stage("recognition", self.recognition)(names))

    def looks_like(self, names: Iterable[str]) -> str | None:
        """The kind of checkpoint that tensors with these names are, by this family's signatures."""
        known = tuple(names)
        return next((signature.kind for signature in self.signatures if signature.fits(known)), None)

    def _stage(self, what: str, reference: str | None) -> Any:
        if reference is None:
            raise FamilyError(f"The family {self.name!r} has no {what}.")
        module, _, attribute = reference.partition(":")
        return getattr(import_module(module), attribute)
