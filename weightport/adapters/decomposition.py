"""The best approximation of a matrix by a product of two thin ones, and the rank that a share of it takes.

Small matrices are decomposed exactly. Of large ones the leading part is found at random (arXiv:0909.4061), always with
the same numbers, so that the rank that was chosen and the factors that are written belong to one decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FULL_SVD = 1 << 22
"""Matrices with more elements than this get a randomised decomposition."""
_BESIDE = 16
"""Columns of the random part beyond the rank, which its last singular values need."""


@dataclass(frozen=True)
class Rank:
    """The rank to keep, and how many columns the randomised decomposition has."""

    kept: int
    columns: int

    @classmethod
    def fixed(cls, rank: int, rows: int, columns: int) -> Rank:
        """`rank`, or as much as a matrix of this shape has."""
        largest = min(rows, columns)
        return cls(min(rank, largest), min(rank + _BESIDE, largest))


@dataclass(frozen=True)
class Factors:
    """a [rank, columns], b [rows, rank]: b·a approximates the matrix. `total`: its squared norm; `lost`: the part of
    it that the rank leaves out."""

    a: torch.Tensor
    b: torch.Tensor
    total: float
    lost: float


def factors(matrix: torch.Tensor, rank: Rank) -> Factors:
    """The factors of a float32 matrix."""
    u, s, v = _decomposed(matrix, rank.columns)
    kept = rank.kept
    root = s[:kept].sqrt()
    total = _square(matrix)
    held = float(s[:kept].double().square().sum())
    a, b = (root.unsqueeze(1) * v[:kept]).contiguous(), (u[:, :kept] * root).contiguous()
    return Factors(a, b, total, max(total - held, 0.0))


def rank_that_keeps(matrix: torch.Tensor, share: float) -> Rank:
    """The least rank whose factors hold `share` (more than 0, at most 1) of the squared norm of a float32 matrix."""
    wanted, largest = share * _square(matrix), min(matrix.shape)
    columns = largest if matrix.numel() <= FULL_SVD else min(4 * _BESIDE, largest)
    while True:
        held = _decomposed(matrix, columns)[1].double().square().cumsum(0)
        # The last values of a random part are too small: not among those that are counted on.
        sure = columns if columns == largest else columns - _BESIDE
        enough = int((held < wanted).sum()) + 1
        if enough <= sure or columns == largest:
            return Rank(min(enough, largest), columns)
        columns = min(2 * columns, largest)


def _square(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _decomposed(matrix: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if matrix.numel() <= FULL_SVD or columns == min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, v
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(matrix, q=columns, niter=4)
    return u, s, v.T
