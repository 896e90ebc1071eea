"""Whether the head is the token embedding: told from the tensors, never from the configuration.

The remote code ties the encoder's and decoder's embeddings to `shared`, but after `from_pretrained` never the head: a
fine-tuned fork has an independent head, a released file one matrix under several names, and the releases since August
2025 none, because theirs is the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weightport.checkpoints import TensorRef
from weightport.checkpoints.lazy_tensors import same_bits
from weightport.errors import ConfigurationError, CoverageError
from weightport.families.florence2.rules import EMBEDDINGS, HEAD, LOGITS_BIAS, SHARED


@dataclass(frozen=True)
class Embedding:
    """Rows and width of the token embedding, whether the head is the same matrix, and how that was told."""

    rows: int
    width: int
    tied: bool
    because: str


def read_embedding(tensors: Mapping[str, TensorRef]) -> Embedding:
    """The embedding, its values compared with the head's. Raises CoverageError for what the model cannot hold."""
    present = [tensors[name] for name in (*EMBEDDINGS, HEAD) if name in tensors]
    if not present:
        raise CoverageError(f"The checkpoint holds no token embedding: neither {SHARED} nor any other name of it.")
    first, head = present[0], tensors.get(HEAD)
    for ref in present:
        if len(ref.shape) != 2 or ref.shape != first.shape:
            raise CoverageError(
                f"{ref.name} is {list(ref.shape)}, but {first.name} is {list(first.shape)}: the embedding and the "
                "head have one row for every token, and the same width."
            )
    for ref in present[1:]:
        if ref.name != HEAD and not same_values(first, ref):
            raise CoverageError(
                f"{ref.name} and {first.name} are one matrix in the model, but the checkpoint holds different values "
                "for them. Converting would lose one of the two."
            )
    rows, width = first.shape
    if head is None:
        return Embedding(rows, width, True, "The file holds no head: the token embedding is the head (tied).")
    if head is first:
        return Embedding(
            rows, width, True, "The file holds the head alone of the tied matrices: it is the embedding too."
        )
    if same_values(first, head):
        return Embedding(rows, width, True, "The head equals the token embedding: they are one matrix (tied).")
    return Embedding(
        rows,
        width,
        False,
        "The head differs from the token embedding (fine-tuning trained it on its own): both are kept (untied).",
    )


def same_values(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors are equal bit for bit; stored once, they are without being read."""
    if a.storage and a.storage == b.storage and a.dtype == b.dtype:
        return True
    return same_bits(a.read(), b.read())


def check_logits_bias(tensors: Mapping[str, TensorRef], rows: int) -> None:
    """Raise ConfigurationError unless final_logits_bias, which the native model has no place for, changes nothing."""
    ref = tensors.get(LOGITS_BIAS)
    if ref is None:
        return
    if ref.shape != (1, rows):
        raise ConfigurationError(
            f"{LOGITS_BIAS} is {list(ref.shape)}; the embedding's {rows} rows ask for {[1, rows]}."
        )
    value = ref.read()
    changed = int(torch.count_nonzero(value))
    if changed:
        raise ConfigurationError(
            f"{LOGITS_BIAS} is not zero ({changed} of {rows} values): it shifts the logits, and the native model has "
            "no place for it. Such a checkpoint cannot be converted without changing its results."
        )
