"""Positions of OFA: which row of which table says where two text tokens, or two image patches, stand to each other."""

from __future__ import annotations

import math

import torch

# The original fixes its bucket table to this many positions, whatever the length of its position embeddings.
MAX_TEXT_POSITIONS = 1024
# An image code stands for this many pixels along a side; codes behind the generated window all share one position.
CODE_STRIDE = 8
BEYOND_CODE_WINDOW = 1024


def text_relative_buckets(bucket_size: int) -> torch.Tensor:
    """Bucket of every relative text distance: int64 [2 * MAX_TEXT_POSITIONS - 1], entry `query - key + 1023`.

    Distances up to `bucket_size // 2` have a bucket each, longer ones share buckets logarithmically; buckets are rows
    of tables of `2 * bucket_size - 1`. Always computed in float32 on the CPU: the original's ceil of a float32
    logarithm decides the boundaries, and another precision moves some of them.
    """
    distance = torch.arange(1 - MAX_TEXT_POSITIONS, MAX_TEXT_POSITIONS, device="cpu")
    exact = bucket_size // 2
    magnitude = distance.abs().clamp(min=1).to(torch.float32)
    spread = torch.log(magnitude / exact) / math.log((MAX_TEXT_POSITIONS - 1) / exact) * (exact - 1)
    logarithmic = distance.sign() * (torch.ceil(spread).to(torch.int64) + exact)
    return torch.where(distance.abs() <= exact, distance, logarithmic) + bucket_size - 1


def image_relative_buckets(query_ids: torch.Tensor, key_ids: torch.Tensor, bucket_size: int) -> torch.Tensor:
    """Bucket of every (query, key) pair of image positions: int64 [queries, keys].

    Ids are `row * bucket_size + column + 1`, int64 [queries] and [keys]; id 0 is the start of a code sequence, which
    has three rows of its own at the end of the table of `(2 * bucket_size - 1) ** 2 + 3`: as query, as key, as both.
    """
    side = 2 * bucket_size - 1
    query_rows, query_columns = (query_ids - 1).div(bucket_size, rounding_mode="floor"), (query_ids - 1) % bucket_size
    key_rows, key_columns = (key_ids - 1).div(bucket_size, rounding_mode="floor"), (key_ids - 1) % bucket_size
    row_difference = query_rows[:, None] - key_rows[None, :] + bucket_size - 1
    column_difference = query_columns[:, None] - key_columns[None, :] + bucket_size - 1
    buckets = row_difference * side + column_difference
    start_query, start_key = (query_ids == 0)[:, None], (key_ids == 0)[None, :]
    buckets = torch.where(start_query, side**2, buckets)
    buckets = torch.where(start_key, side**2 + 1, buckets)
    return torch.where(start_query & start_key, side**2 + 2, buckets)


def patch_position_ids(rows: int, columns: int, bucket_size: int, device: torch.device | None = None) -> torch.Tensor:
    """Position ids of a grid of patches, row-major: int64 [rows * columns], `row * bucket_size + column + 1`."""
    row_starts = torch.arange(rows, device=device) * bucket_size
    return (row_starts[:, None] + torch.arange(columns, device=device)[None, :] + 1).flatten()


def code_position_ids(positions: torch.Tensor, code_image_size: int, bucket_size: int) -> torch.Tensor:
    """Image position ids of target positions (int64, any shape) that hold image codes.

    Position 0 is the start token (id 0), then come the codes of a `code_image_size` image, row-major; whatever
    follows has the id `BEYOND_CODE_WINDOW`, which only tables of more rows hold: ids are limited to the last row.
    """
    window = code_image_size // CODE_STRIDE
    code = (positions - 1).clamp(min=0)
    ids = code.div(window, rounding_mode="floor") * bucket_size + code % window + 1
    ids = torch.where(positions > window**2, BEYOND_CODE_WINDOW, ids)
    return torch.where(positions == 0, 0, ids).clamp(max=bucket_size**2)
