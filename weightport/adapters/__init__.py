"""LoRA adapters: ported from the original's module names, merged into model directories, extracted from
fine-tunings."""

from __future__ import annotations

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
