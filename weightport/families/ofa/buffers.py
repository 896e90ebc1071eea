"""The index buffers that OFA stores in its checkpoints, recomputed from the configuration.

They cost up to 60 MB a file and hold nothing that the configuration does not; comparing them proves that the
configuration was read right, and exporting restores them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from weightport.modeling.ofa.configuration_ofa import OFAConfig

MAX_DISTANCE = 1024  # fixed in the original, whatever max_source_positions is
TRAILING_TEXT_POSITIONS = 769  # entries after the code window, all 1024


def version(config: OFAConfig, name: str) -> torch.Tensor:
    """fairseq's transformer format version: float32 [1]."""
    return torch.tensor([3.0])


def token_bucket(config: OFAConfig, name: str) -> torch.Tensor:
    """Bucket index of every (query, key) pair of text positions: int64 [1024, 1024].

    Exact up to token_bucket_size // 2 positions apart, logarithmic beyond (OFA's unify_transformer.py).
    Computed in float32: the original's ceil of a float32 logarithm decides the boundaries.
    """
    size = config.token_bucket_size
    # Of every distance once, then of every pair: a file holds two such tables, of a million entries each.
    relative = torch.arange(1 - MAX_DISTANCE, MAX_DISTANCE, dtype=torch.long)
    middle = size // 2
    distance = torch.where(relative.abs() < middle, middle - 1, relative.abs())
    nearness = distance.to(torch.float32) / middle
    growth = torch.log(nearness) / math.log((MAX_DISTANCE - 1) / middle) * (middle - 1)
    logarithmic = torch.sign(relative) * (torch.ceil(growth).int() + middle)
    buckets = torch.where(distance.le(middle), relative, logarithmic) + size - 1
    position = torch.arange(MAX_DISTANCE)
    return buckets[position[:, None] - position[None, :] + MAX_DISTANCE - 1]


def image_bucket(config: OFAConfig, name: str) -> torch.Tensor:
    """Bucket index of every (query, key) pair of image positions: int64 [B² + 1, B² + 1], position 0 apart."""
    size = config.image_bucket_size
    count = (2 * size - 1) ** 2 + 3
    axis = torch.arange(size)
    row, column = (grid.reshape(-1) for grid in torch.meshgrid(axis, axis, indexing="ij"))
    down = row[:, None] - row[None, :] + size - 1
    across = column[:, None] - column[None, :] + size - 1
    bucket = torch.zeros(size * size + 1, size * size + 1, dtype=torch.long)
    bucket[1:, 1:] = down * (2 * size - 1) + across
    bucket[0, :] = count - 3
    bucket[:, 0] = count - 2
    bucket[0, 0] = count - 1
    return bucket


def image_position_index(config: OFAConfig, name: str) -> torch.Tensor:
    """Image position of every decoder position of an image-code target: int64 [1 + (code_image_size / 8)² + 769]."""
    window = config.code_image_size // 8
    axis = torch.arange(window)
    inside = (axis[:, None] * config.image_bucket_size + axis[None, :] + 1).reshape(-1)
    return torch.cat([torch.zeros(1, dtype=torch.long), inside, torch.full((TRAILING_TEXT_POSITIONS,), 1024)])
