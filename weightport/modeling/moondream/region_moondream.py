"""Heads of moondream2 that turn hidden states into coordinates and sizes, and back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

# Sizes are 2 ** (bin / 1023 * 10 - 10), whatever the number of bins: the original states the number of the releases.
LAST_SIZE_BIN, SIZE_OCTAVES = 1023, 10.0


def fourier_features(values: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of `values` [..., n] times 2π `frequencies` [n, m]: [..., 2 * m]."""
    angles = 2 * math.pi * values @ frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MoondreamRegionMLP(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int):
        super().__init__()
        self.fc1 = nn.Linear(in_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, out_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states), approximate="tanh"))


class MoondreamBinRegionHead(nn.Module):
    """The head of 2025: a coordinate is the likeliest of its bins, and so are a box's width and height.

    Random Fourier frequencies are part of a checkpoint, and never trained.
    """

    def __init__(self, hidden_size: int, region: dict[str, Any]):
        super().__init__()
        self.size_scale = region.get("size_scale", "log")
        coord, size, inner = region["coord_feat_dim"], region["size_feat_dim"], region["inner_dim"]
        self.coord_features = nn.Parameter(torch.empty(1, coord // 2), requires_grad=False)
        self.size_features = nn.Parameter(torch.empty(2, size // 2), requires_grad=False)
        self.coord_encoder = nn.Linear(coord, hidden_size)
        self.coord_decoder = MoondreamRegionMLP(hidden_size, inner, region["coord_out_dim"])
        self.size_encoder = nn.Linear(size, hidden_size)
        self.size_decoder = MoondreamRegionMLP(hidden_size, inner, region["size_out_dim"])

    def encode_coordinate(self, values: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., hidden_size] of coordinates [..., 1] in 0..1."""
        return self.coord_encoder(fourier_features(values.to(self.coord_features.dtype), self.coord_features))

    def encode_size(self, values: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., hidden_size] of (width, height) [..., 2] in 0..1."""
        return self.size_encoder(fourier_features(values.to(self.size_features.dtype), self.size_features))

    def coordinate_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores of a coordinate's bins, [..., coord_out_dim], of states [..., hidden_size] before the last norm."""
        return self.coord_decoder(hidden_states)

    def size_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores [..., 2, bins] of width and height."""
        return self.size_decoder(hidden_states).unflatten(-1, (2, -1))

    def decode_coordinate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The likeliest coordinate, [...], in float32 at least: bins are more than bfloat16 can tell apart."""
        logits = self.coordinate_logits(hidden_states)
        return _number_of_bin(logits) / logits.shape[-1]

    def decode_size(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The likeliest width and height, [..., 2], in float32 at least."""
        logits = self.size_logits(hidden_states)
        bins = _number_of_bin(logits)
        if self.size_scale == "linear":
            return bins / logits.shape[-1]
        return 2.0 ** (bins / LAST_SIZE_BIN * SIZE_OCTAVES - SIZE_OCTAVES)


def _number_of_bin(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1).to(torch.promote_types(logits.dtype, torch.float32))


class MoondreamPointRegionHead(nn.Module):
    """The head of 2024-08-26, which no public method of that revision uses: carried for the way back."""

    def __init__(self, hidden_size: int, region: dict[str, Any]):
        super().__init__()
        features = region["feature_dim"]
        self.position_features = nn.Parameter(torch.empty(features // 2, 2), requires_grad=False)
        self.size_features = nn.Parameter(torch.empty(features // 2, 2), requires_grad=False)
        self.position_encoder = nn.Linear(features, hidden_size)
        self.size_encoder = nn.Linear(features, hidden_size)
        self.position_decoder = nn.Linear(hidden_size, 2)
        self.size_decoder = nn.Linear(hidden_size, 2)
        self.confidence_decoder = nn.Linear(hidden_size, 1)


def build_region_head(hidden_size: int, region: dict[str, Any]) -> nn.Module:
    """The head that `region` (a configuration's `region_config`) describes."""
    kinds = {"bins": MoondreamBinRegionHead, "points": MoondreamPointRegionHead}
    return kinds[region["kind"]](hidden_size, region)


__all__ = ["MoondreamBinRegionHead", "MoondreamPointRegionHead", "build_region_head"]
