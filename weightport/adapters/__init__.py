"""LoRA adapters: ported from the original's module names, merged into model directories, extracted from
fine-tunings."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightport.adapters.base.base_record import record_base
    from weightport.adapters.heads import untie_head
    from weightport.adapters.merging.combination import Combination
    from weightport.adapters.merging.merge import MergeOptions
    from weightport.adapters.porting import PortedAdapter

__all__ = [
    "Combination",
    "MergeOptions",
    "PortedAdapter",
    "record_base",
    "untie_head",
]

_PLACES = {
    "Combination": "merging.combination",
    "MergeOptions": "merging.merge",
    "PortedAdapter": "porting",
    "record_base": "base.base_record",
    "untie_head": "heads",
}


def __getattr__(name: str) -> Any:
    """What the names above say, imported when it is asked for: merging needs no porting."""
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
