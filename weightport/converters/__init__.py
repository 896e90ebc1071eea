"""From original checkpoints to native models and back: rule tables, plans, and the writers that carry them out."""

from __future__ import annotations

from .conversion import Conversion, Planned, convert, parse_dtype
from .export import Export, export
from .family import Family, Options, SourceModel
from .recognition import looks_like, recognise
from .record import read_record

__all__ = [
    "Conversion",
    "Export",
    "Family",
    "Options",
    "Planned",
    "SourceModel",
    "convert",
    "export",
    "looks_like",
    "parse_dtype",
    "read_record",
    "recognise",
]
