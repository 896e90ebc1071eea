"""What a release needs of a model's family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from weightport.converters.family import ConversionStage
    from weightport.converters.portable import AutoMap


class PublishedFamily(Protocol):
    """One family: how the Hub calls its task and licence, and the code that its models need beside the weights."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def hub_task(self) -> str: ...

    @property
    def licence(self) -> str | None: ...

    @property
    def licence_note(self) -> str: ...

    @property
    def card_prompt(self) -> str | None:
        """The prompt of a card's example, as Python."""

    @property
    def portable(self) -> tuple[AutoMap, ...]: ...

    @property
    def portable_code(self) -> str | None: ...

    @property
    def conversion(self) -> ConversionStage: ...
