"""Parity: a converted model held against what the original implementation computed, seam by seam."""

from .check import check_parity
from .compare import Comparison, Verdict
from .loading import load_native
from .reference import Expected, Reference, Run, read_reference, write_reference
from .report import NotCompared, ParityReport, render
from .selection import Selection

__all__ = [
    "Comparison",
    "Expected",
    "NotCompared",
    "ParityReport",
    "Reference",
    "Run",
    "Selection",
    "Verdict",
    "check_parity",
    "load_native",
    "read_reference",
    "render",
    "write_reference",
]
