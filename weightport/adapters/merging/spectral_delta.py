"""Changes of weights that are given by a few coefficients of a transform: FourierFT and WaveFT.

Which coefficients they are is drawn from a seed in the settings, by the generator that peft draws them with; a release
of torch that drew otherwise would change what peft loads, and so what is merged here.
"""

from __future__ import annotations

import torch

from weightport.adapters.merging.wavelets import HAAR, synthesis_filters
from weightport.adapters.merging.weight_delta import ByRows, Parts, Weight


def fourierft(parts: Parts, weight: Weight) -> ByRows:
    """FourierFT (arXiv:2405.03003): the real part of the inverse Fourier transform of a sparse spectrum."""
    spectrum, scale = parts["fourierft_spectrum"], weight.number("scaling")
    if spectrum.is_meta:
        return _unknown(spectrum, weight)
    dense = _dense(spectrum, weight, weight.outputs, weight.inputs)
    return _known(torch.fft.ifft2(dense).real * scale)


def waveft(parts: Parts, weight: Weight) -> ByRows:
    """WaveFT (arXiv:2505.12532): one step of a wavelet synthesis from sparse coefficients, or these themselves."""
    spectrum, scale = parts["waveft_spectrum"], weight.number("scaling")
    if not weight.settings.data.get("use_idwt", True):
        if spectrum.is_meta:
            return _unknown(spectrum, weight)
        return _known(_dense(spectrum, weight, weight.outputs, weight.inputs) * scale)
    low, high = synthesis_filters(weight.settings.data.get("wavelet_family", HAAR), weight.settings.where)
    if spectrum.is_meta:
        return _unknown(spectrum, weight)
    margin = len(low) - 2
    height, width = (size + margin + (size + margin) % 2 for size in (weight.outputs, weight.inputs))
    dense = _dense(spectrum, weight, height, width)
    halves = dense.view(2, height // 2, 2, width // 2).transpose(1, 2).flatten(0, 1)
    filters = torch.tensor([low, high], dtype=dense.dtype)
    # Of the four bands the second has details by rows, the third by columns.
    kernels = torch.stack([torch.outer(filters[k % 2], filters[k // 2]) for k in range(4)]).unsqueeze(1)
    whole = torch.nn.functional.conv_transpose2d(halves.unsqueeze(0), kernels, stride=2)[0, 0]
    edge = (2 * len(low) - 3) // 2
    whole = whole[edge : whole.shape[0] - edge, edge : whole.shape[1] - edge]
    above, left = (whole.shape[0] - weight.outputs) // 2, (whole.shape[1] - weight.inputs) // 2
    return _known(whole[above : above + weight.outputs, left : left + weight.inputs] * scale)


def _dense(spectrum: torch.Tensor, weight: Weight, height: int, width: int) -> torch.Tensor:
    """The coefficients at their places of [height, width], in whose middle [outputs, inputs] lies."""
    drawn = torch.randperm(
        weight.outputs * weight.inputs,
        generator=torch.Generator().manual_seed(weight.count("random_loc_seed", least=0)),
    )[: len(spectrum)]
    dense = torch.zeros(height, width, dtype=spectrum.dtype)
    above, left = (height - weight.outputs) // 2, (width - weight.inputs) // 2
    dense[drawn // weight.inputs + above, drawn % weight.inputs + left] = spectrum
    return dense


def _known(whole: torch.Tensor) -> ByRows:
    return ByRows(whole.shape[0], lambda start, stop: whole[start:stop])


def _unknown(spectrum: torch.Tensor, weight: Weight) -> ByRows:
    """The shape alone. Raises ValueError for more coefficients than there are places."""
    weight.count("random_loc_seed", least=0)
    if spectrum.ndim != 1 or len(spectrum) > weight.outputs * weight.inputs:
        raise ValueError("a spectrum that the weight has no places for")
    return _known(torch.empty(weight.outputs, weight.inputs, device="meta"))
