"""Exponential moving average of the trained weights: what is measured and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from weightport.errors import TrainingError

FILE = "ema.safetensors"
"""In every checkpoint: the averages by parameter name, float32."""


class AveragedWeights:
    """The average of every trained parameter, float32, on the parameter's device.

    After step t an average is decay × itself + (1 - decay) × the parameter, with a decay of (1 + t) / (10 + t) where
    that is less: the first steps' weights are forgotten sooner. Frozen parameters are their own average. With LoRA the
    adapter's parameters are averaged.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._averages: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}

    def begin(self, model: Any) -> None:
        """Average the trained parameters of `model` from their values now on."""
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._averages = {name: each.detach().float().clone() for name, each in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after `step` optimizer steps."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            self._averages[name].lerp_(parameter.detach().float(), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with its averages, and as it was when the block ends."""
        kept = {name: each.detach().clone() for name, each in self._parameters.items()}
        self.adopt()
        try:
            yield
        finally:
            self._put(kept)

    def adopt(self) -> None:
        """Give the model its averages, in the parameters' dtype."""
        self._put(self._averages)

    def save(self, checkpoint: Path) -> None:
        """Write the averages into a checkpoint's folder."""
        save_file({name: each.contiguous().cpu() for name, each in self._averages.items()}, checkpoint / FILE)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's averages. Raises TrainingError when they are not those of this model."""
        try:
            found: dict[str, Any] = load_file(checkpoint / FILE)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{checkpoint} has no whole {FILE}, the average of the weights: {error}.") from error
        if found.keys() != self._averages.keys():
            other = min(found.keys() ^ self._averages.keys())
            raise TrainingError(f"{checkpoint / FILE} averages other parameters than are trained, such as {other}.")
        for name, average in self._averages.items():
            average.copy_(found[name])

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
