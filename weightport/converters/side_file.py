"""Tensors of an original that the native model has no place for, in a file of their own beside it.

Named unlike a weight file: nothing that loads a model directory takes it for one. It is a safetensors file, with the
original's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from weightport.checkpoints import TensorRef, open_checkpoint
from weightport.checkpoints.lazy_tensors import blocks
from weightport.writing.outgoing import Outgoing
from weightport.writing.safetensors_shards import WrittenFile, write_safetensors

SIDE_FILE = "unconverted.sft"


def write_side_file(
    refs: Sequence[TensorRef], folder: Path, *, allow_nonfinite: bool, advance: Callable[[int], None]
) -> tuple[WrittenFile, ...]:
    """Write `refs` into `folder`; no file where there are none. Raises NonFiniteError unless that is allowed."""
    if not refs:
        return ()
    path = folder / SIDE_FILE
    return (
        write_safetensors([_outgoing(ref) for ref in refs], path, allow_nonfinite=allow_nonfinite, advance=advance),
    )


def read_side_file(folder: Path) -> Mapping[str, TensorRef]:
    """The tensors beside the model in `folder`, none where there is no such file. Raises CheckpointError."""
    path = folder / SIDE_FILE
    return open_checkpoint(path).tensors if path.is_file() else {}


def _outgoing(ref: TensorRef) -> Outgoing:
    return Outgoing(ref.name, ref.shape, ref.dtype, lambda: blocks(ref), ref.name)
