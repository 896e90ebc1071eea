"""LoRA adapters: brought from the original's module names to the native model's."""

from __future__ import annotations

from .heads import untie_head
from .porting import PortedAdapter, port_adapter

__all__ = ["PortedAdapter", "port_adapter", "untie_head"]
