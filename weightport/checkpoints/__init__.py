"""Reading checkpoints: any format to names, shapes and bytes on demand, executing nothing."""

from __future__ import annotations

from weightport.checkpoints.display import Section, plain, sections
from weightport.checkpoints.opening import open_checkpoint
from weightport.checkpoints.pickle.records import Record, Symbol
from weightport.checkpoints.types import Checkpoint, TensorRef
from weightport.families.ofa.fairseq_options import FairseqOptions, fairseq_options, is_fairseq

__all__ = [
    "Checkpoint",
    "FairseqOptions",
    "Record",
    "Section",
    "Symbol",
    "TensorRef",
    "fairseq_options",
    "is_fairseq",
    "open_checkpoint",
    "plain",
    "sections",
]
