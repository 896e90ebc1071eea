"""From original checkpoints to native models and back: rule tables, plans, and the writers that carry them out."""

from __future__ import annotations

from weightport.converters.conversion import Conversion, Planned, convert, parse_dtype
from weightport.converters.export import Export, export
from weightport.converters.family import Family, Options, SourceModel
from weightport.converters.record import read_record
from weightport.families.recognition import looks_like, recognise

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
