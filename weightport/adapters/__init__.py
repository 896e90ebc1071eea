"""LoRA adapters: ported from the original's module names, merged into model directories, extracted from
fine-tunings."""

from __future__ import annotations

from weightport.adapters.base_record import record_base
from weightport.adapters.combination import Combination
from weightport.adapters.extraction import extract_lora
from weightport.adapters.heads import untie_head
from weightport.adapters.merging import MergeOptions, merge_lora
from weightport.adapters.porting import PortedAdapter, port_adapter

__all__ = [
    "Combination",
    "MergeOptions",
    "PortedAdapter",
    "extract_lora",
    "merge_lora",
    "port_adapter",
    "record_base",
    "untie_head",
]
