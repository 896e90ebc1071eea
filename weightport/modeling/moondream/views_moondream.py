"""Features of a picture's several views, merged into one view's grid."""

from __future__ import annotations

import torch
from torch import nn


def stitch(features: torch.Tensor, rows: int, columns: int, margin: int) -> torch.Tensor:
    """Crop features [rows * columns, grid, grid, width], row by row → one map [height, width in patches, width].

    `margin` patches are left out on the sides where two crops overlap.
    """
    grid = features.shape[1]
    lines = []
    for row in range(rows):
        top, bottom = _kept(row, rows, grid, margin)
        line = [
            features[row * columns + column, top:bottom, slice(*_kept(column, columns, grid, margin))]
            for column in range(columns)
        ]
        lines.append(torch.cat(line, dim=1))
    return torch.cat(lines, dim=0)


def _kept(place: int, count: int, grid: int, margin: int) -> tuple[int, int]:
    return (margin if place else 0), (grid - margin if place < count - 1 else grid)


def merge_views(features: torch.Tensor, grids: torch.Tensor, margin: int) -> torch.Tensor:
    """Each picture's whole view beside its crops' features, averaged to the same grid: [pictures, patches, 2 * width].

    Args:
        features: [pictures, views, patches, width]; view 0 is the whole picture, then crops row by row, then padding.
        grids: int64 [pictures, 2], (rows, columns) of crops; zeros where a picture has none: the whole view stands
            for them.
        margin: patches that neighbouring crops overlap by, on either side.
    """
    grid = round(features.shape[2] ** 0.5)
    whole, merged = features[:, 0], []
    for views, (rows, columns) in zip(features, grids.tolist()):
        if not rows * columns:
            merged.append(views[0])
            continue
        crops = views[1 : 1 + rows * columns].unflatten(1, (grid, grid))
        stitched = stitch(crops, rows, columns, margin).permute(2, 0, 1)[None]
        merged.append(nn.functional.adaptive_avg_pool2d(stitched, (grid, grid))[0].flatten(1).transpose(0, 1))
    return torch.cat([whole, torch.stack(merged)], dim=-1)


__all__ = ["merge_views", "stitch"]
