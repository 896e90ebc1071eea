"""FourierFT's and WaveFT's changes computed a second time, in float64 and coefficient by coefficient: no transform is
run, and every coefficient has the wave that it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from weightport.adapters.merging.wavelets import HAAR, synthesis_filters

Settings = Mapping[str, Any]
Parts = Mapping[str, torch.Tensor]


def fourier(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    """What FourierFT adds to the outputs [n, outputs] of inputs x [n, in]: a cosine over the weight for each
    coefficient, taken apart into what the inputs see of it and what the outputs do."""
    spectrum, inputs = parts["fourierft_spectrum"], x.shape[1]
    down, across = _places(len(spectrum), outputs, inputs, settings)
    out_angles, in_angles = _angles(down, outputs), _angles(across, inputs)
    seen = (x @ in_angles.cos().T * spectrum) @ out_angles.cos() - (
        x @ in_angles.sin().T * spectrum
    ) @ out_angles.sin()
    return seen * (settings["scaling"] / (outputs * inputs))


def coefficients(x: torch.Tensor, parts: Parts, settings: Settings, outputs: int) -> torch.Tensor:
    """The same of WaveFT without a synthesis: single elements of the weight."""
    spectrum = parts["waveft_spectrum"]
    down, across = _places(len(spectrum), outputs, x.shape[1], settings)
    added = torch.zeros(len(x), outputs, dtype=torch.float64)
    return added.index_add_(1, down, x[:, across] * spectrum * settings["scaling"])


def waves(spectrum: torch.Tensor, settings: Settings, outputs: int, inputs: int) -> torch.Tensor:
    """WaveFT's matrix [outputs, inputs]: for each coefficient the outer product of two filters, where it lies."""
    low, high = synthesis_filters(settings.get("wavelet_family", HAAR), "adapter_config.json")
    length = len(low)
    filters = torch.tensor([low, high], dtype=torch.float64)
    down, across = _places(len(spectrum), outputs, inputs, settings)
    halves, starts = [], []
    for places, size in ((down, outputs), (across, inputs)):
        half = math.ceil((size + length - 2) / 2)
        within = places + (2 * half - size) // 2
        halves.append(torch.div(within, half, rounding_mode="floor"))
        # Where its filter begins, counted from the first element that is not cut off.
        starts.append(2 * within.remainder(half) - (length - 2))
    # The band of details across is made with the filter for details down, and the other way round.
    rows, columns = filters[halves[1]], filters[halves[0]]
    patches = spectrum[:, None, None] * rows[:, :, None] * columns[:, None, :]
    at = starts[0][:, None, None] + torch.arange(length)[:, None]
    to = starts[1][:, None, None] + torch.arange(length)
    at, to = torch.broadcast_tensors(at, to)
    within = (at >= 0) & (at < outputs) & (to >= 0) & (to < inputs)
    matrix = torch.zeros(outputs * inputs, dtype=torch.float64)
    matrix.index_add_(0, (at * inputs + to)[within], patches[within])
    return matrix.view(outputs, inputs) * settings["scaling"]


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
