"""Tensors of a batch that several families make alike: padded rows of tokens, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weightport.errors import DataError
from weightport.finetuning.family import Images


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> torch.Tensor:
    """int64 [rows, longest]: shorter rows have `fill` before them (`left`) or behind."""
    longest = max(map(len, rows))
    gaps = [[fill] * (longest - len(row)) for row in rows]
    return torch.tensor([[*gap, *row] if left else [*row, *gap] for gap, row in zip(gaps, rows)])


def padded_with_mask(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, int64 [rows, longest]; padding is masked."""
    return {
        "input_ids": padded(rows, fill, left=left),
        "attention_mask": padded([[1] * len(row) for row in rows], 0, left=left),
    }


def image_inputs(processor: Any, images: Images, title: str) -> dict[str, torch.Tensor]:
    """What the image processor makes of a batch's pictures; nothing where features stand for them. Raises DataError
    where a sample of a model called `title`, which needs one, has none."""
    if images is None:
        return {}
    if any(image is None for image in images):
        raise DataError(f"{title} answers about pictures, and a sample has none.")
    return dict(processor.image_processor(list(images), return_tensors="pt"))
