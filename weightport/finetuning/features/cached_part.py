"""Beginnings of a model whose output need not be computed twice: what has to stand still, and how it is fed back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Features:
    """What a part makes of a batch.

    states: float [batch, rows, …]; of each sample the first `lengths` rows (int64 [batch]) count, the rest is padding.
    shared: float [rows, …], the same for every sample and shorter samples' first rows of it, where the model has any.
    """

    states: torch.Tensor
    lengths: torch.Tensor
    shared: torch.Tensor | None = None

    def mask(self) -> torch.Tensor:
        """bool [batch, rows]: True where a row counts."""
        rows = torch.arange(self.states.shape[1], device=self.states.device)
        return rows[None] < self.lengths[:, None]


def whole(states: torch.Tensor) -> Features:
    """Features all of whose rows count."""
    return Features(states, torch.full((len(states),), states.shape[1], device=states.device))


@dataclass(frozen=True)
class CachedPart:
    """One beginning of the model.

    frozen: the parts that have to stand still. per_prompt: the output depends on the prompt too, not on the picture
    alone. compute: (model, the model's inputs) → features. feed: (inputs without pictures, features) → what the model
    takes instead. bypassed: modules that hand on what they would return when they are given it.
    read_by_linear: only linear layers read the features, so that under mixed precision they may be kept in its dtype:
    these layers would round them to it anyway, to the same bits.
    projections: a regular expression of the linear layers whose outputs, of features alone, are all that is read of
    them: samples that share features can share these too.
    """

    name: str
    frozen: tuple[str, ...]
    per_prompt: bool
    compute: Callable[[Any, Mapping[str, torch.Tensor]], Features]
    feed: Callable[[Inputs, Features], Inputs]
    bypassed: tuple[str, ...] = ()
    read_by_linear: bool = False
    projections: str | None = None


class SharedStates:
    """Features of a batch's pictures, and which of them each sample has. Layers that `attach` was called for compute
    on the pictures, and hand on their results by sample."""

    def __init__(self) -> None:
        self._batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def by_sample(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The features [batch, …] of the batch to come, whose pictures have `states` [pictures, …]; rows int64
        [batch]."""
        self._batch = states, rows, states[rows]
        return self._batch[2]

    def attach(self, model: nn.Module, projections: str) -> None:
        """Let the layers that the regular expression matches compute once a picture."""
        for name, module in model.named_modules():
            if re.fullmatch(projections, name):
                module.forward = self._shared(module.forward)

    def _shared(self, computed: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(states: torch.Tensor) -> torch.Tensor:
            if self._batch is not None:
                pictures, rows, given = self._batch
                # Gradient checkpointing gives another tensor of the same memory; a generation gives other states.
                if states.data_ptr() == given.data_ptr() and states.shape == given.shape:
                    return computed(pictures).index_select(0, rows)
            return computed(states)

        return forward


def as_pixels(inputs: Inputs, features: Features) -> Inputs:
    """Features in the place of pictures, for modules that are bypassed."""
    return {**inputs, "pixel_values": features.states}


def bypass(model: nn.Module, part: CachedPart, shape: tuple[int, ...]) -> None:
    """Let the part's modules hand on tensors of `shape` [batch, *shape]; anything else they compute as before.

    Pictures have three channels and features many more, so that shapes tell them apart.
    """
    for name in part.bypassed:
        module = model.get_submodule(name)
        module.forward = _handing_on(module.forward, shape, first=name == part.bypassed[0])


def _handing_on(computed: Callable[..., Any], shape: tuple[int, ...], *, first: bool) -> Callable[..., Any]:
    """`first`: the module is a vision tower, which returns a ModelOutput; the others return the tensor itself."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given: torch.Tensor = args[0] if args else kwargs["pixel_values"]
        if tuple(given.shape[1:]) != shape:
            return computed(*args, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=given) if first else given

    return forward
