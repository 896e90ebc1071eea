"""FourierFT's and WaveFT's changes computed a second time, in float64 and coefficient by coefficient: no transform is
run, and every coefficient has the wave that it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from weightport.adapters.merging.wavelets import HAAR, synthesis_filters

Settings = Mapping[str, Any]

_WAVES = 512
_ELEMENTS = 1 << 22
"""Waves, and elements of small ones, at a time: what is held beside the matrix is as large, however many there are."""


def fourier(spectrum: torch.Tensor, settings: Settings, outputs: int, inputs: int) -> torch.Tensor:
    """FourierFT's matrix [outputs, inputs]: a cosine over the weight for each coefficient. Of more coefficients than
    the weight has rows and columns, the sums over all frequencies of one axis, then of the other."""
    down, across = _places(len(spectrum), outputs, inputs, settings)
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
    if len(spectrum) <= outputs + inputs:
        for values, rows, columns in zip(*(each.split(_WAVES) for each in (spectrum, down, across))):
            high, wide = _angles(rows, outputs), _angles(columns, inputs)
            matrix += (high.cos().T * values) @ wide.cos() - (high.sin().T * values) @ wide.sin()
    else:
        dense = torch.zeros_like(matrix).index_put_((down, across), spectrum)
        for rows in torch.arange(outputs).split(_WAVES):
            high = _angles(rows, outputs)
            even, odd = high.cos() @ dense, high.sin() @ dense
            for columns in torch.arange(inputs).split(_WAVES):
                wide = _angles(columns, inputs).T
                matrix[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = even @ wide.cos() - odd @ wide.sin()
    return matrix * (settings["scaling"] / (outputs * inputs))


def waves(spectrum: torch.Tensor, settings: Settings, outputs: int, inputs: int) -> torch.Tensor:
    """WaveFT's matrix [outputs, inputs]: for each coefficient the outer product of two filters, where it lies; without
    a synthesis, single elements."""
    down, across = _places(len(spectrum), outputs, inputs, settings)
    matrix = torch.zeros(outputs * inputs, dtype=torch.float64)
    if not settings.get("use_idwt", True):
        matrix.index_add_(0, down * inputs + across, spectrum)
        return matrix.view(outputs, inputs) * settings["scaling"]
    low, high = synthesis_filters(settings.get("wavelet_family", HAAR), "adapter_config.json")
    filters = torch.tensor([low, high], dtype=torch.float64)
    # A filter reaches over a square of elements: as many coefficients at a time as make a block of memory.
    for values, rows, columns in zip(*(each.split(_ELEMENTS // len(low) ** 2) for each in (spectrum, down, across))):
        (below, at), (beside, to) = (_starts(*each, len(low)) for each in ((rows, outputs), (columns, inputs)))
        # The band of details across is made with the filter for details down, and the other way round.
        patches = values[:, None, None] * filters[beside][:, :, None] * filters[below][:, None, :]
        at, to = torch.broadcast_tensors(at[:, :, None], to[:, None, :])
        within = (at >= 0) & (at < outputs) & (to >= 0) & (to < inputs)
        matrix.index_add_(0, (at * inputs + to)[within], patches[within])
    return matrix.view(outputs, inputs) * settings["scaling"]


def _starts(places: torch.Tensor, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of coefficients at `places` of an axis: (whether each is of the second half, of details; the elements that its
    filter reaches [count, length], counted from the first that is not cut off)."""
    half = math.ceil((size + length - 2) / 2)
    within = places + (2 * half - size) // 2
    first = 2 * within.remainder(half) - (length - 2)
    return torch.div(within, half, rounding_mode="floor"), first[:, None] + torch.arange(length)


def _places(count: int, outputs: int, inputs: int, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) of the coefficients, as the settings' seed draws them."""
    generator = torch.Generator()
    generator.manual_seed(settings["random_loc_seed"])
    drawn = torch.randperm(outputs * inputs, generator=generator).narrow(0, 0, count)
    return torch.div(drawn, inputs, rounding_mode="floor"), drawn.remainder(inputs)


def _angles(frequencies: torch.Tensor, size: int) -> torch.Tensor:
    """2 * pi * frequency * place / size of every frequency and place [count, size], without losing digits in many
    turns."""
    return torch.outer(frequencies, torch.arange(size)).remainder(size).double() * (2 * math.pi / size)
