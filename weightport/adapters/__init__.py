"""LoRA adapters: ported from the original's module names, merged into model directories, extracted from
fine-tunings."""

from __future__ import annotations

from .base_record import record_base
from .combination import Combination
from .extraction import extract_lora
from .heads import untie_head
from .merging import MergeOptions, merge_lora
from .porting import PortedAdapter, port_adapter

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
