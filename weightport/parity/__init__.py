"""Parity: a converted model held against what the original implementation computed, seam by seam."""

from weightport.parity.compare import Comparison, Verdict
from weightport.parity.reference import Expected, Reference, Run, read_reference, write_reference
from weightport.parity.report import NotCompared, ParityReport, render
from weightport.parity.selection import Selection

__all__ = [
    "Comparison",
    "Expected",
    "NotCompared",
    "ParityReport",
    "Reference",
    "Run",
    "Selection",
    "Verdict",
    "read_reference",
    "render",
    "write_reference",
]
