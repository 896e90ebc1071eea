"""Reading checkpoints: any format to names, shapes and bytes on demand, executing nothing."""

from __future__ import annotations

from weightport.checkpoints.display import Section, plain, sections
from weightport.checkpoints.opening import open_checkpoint
from weightport.checkpoints.pickle.records import Record, Symbol
from weightport.checkpoints.types import Checkpoint, TensorRef

__all__ = [
    "Checkpoint",
    "Record",
    "Section",
    "Symbol",
    "TensorRef",
    "open_checkpoint",
    "plain",
    "sections",
]
