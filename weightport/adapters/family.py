"""What adapters need of families: the original's names of a base's modules, its ties, and a prompt to verify with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from weightport.checkpoints import Checkpoint
    from weightport.converters.family import ConversionStage
    from weightport.converters.options import ConversionOptions


class AdapterFamily(Protocol):
    """One family. `ties` are further names of tied tensors by the name that is written; `verification_prompt` makes
    every part of a model run (None: any text does)."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def ties(self) -> Mapping[str, str]: ...

    @property
    def verification_prompt(self) -> str | None: ...

    @property
    def conversion(self) -> ConversionStage: ...

    @property
    def bare_options(self) -> ConversionOptions:
        """Options with which a checkpoint is only looked at: no tokenizer is needed."""


class FamilyLookup(Protocol):
    """Finds the family of a base, which may be an original checkpoint or a native directory of any architecture."""

    def of_model_type(self, model_type: object) -> AdapterFamily | None: ...

    def recognised(self, checkpoint: Checkpoint) -> AdapterFamily | None: ...

    def recognise(self, checkpoint: Checkpoint) -> AdapterFamily: ...
