"""Recording a model's values at seams while it runs: forward hooks that keep exactly what the reference kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightport.errors import ReferenceFileError
from weightport.parity.family import Seam
from weightport.parity.reference import Expected


@dataclass(frozen=True)
class Observed:
    """The native model's value at a seam, cut as the reference is.

    `shortfall` goes with ids chosen by a largest value: how far, at each position, the reference's choice lies below
    the model's own. Within noise it is a tie.
    """

    value: torch.Tensor
    shortfall: torch.Tensor | None = None


@dataclass(frozen=True)
class Missed:
    """Why a seam has no value."""

    reason: str


Observations = dict[str, Observed | Missed]
"""By the name of the reference's tensor."""


def _log_sum_exp(value: torch.Tensor, expected: Expected) -> Observed:
    return Observed(expected.selection.apply(value.logsumexp(-1)))


def _argmax(value: torch.Tensor, expected: Expected) -> Observed:
    place = expected.selection.apply(value.argmax(-1))
    chosen = expected.tensor.read().to(value.device).long()
    if chosen.shape != place.shape or not bool(((chosen >= 0) & (chosen < value.shape[-1])).all()):
        return Observed(place)
    rows = expected.selection.apply(torch.arange(value[..., 0].numel(), device=value.device).view(value.shape[:-1]))
    at_rows = value.reshape(-1, value.shape[-1])[rows]
    shortfall = at_rows.amax(-1) - at_rows.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return Observed(place, shortfall)


DERIVED: Mapping[str, Callable[[torch.Tensor, Expected], Observed]] = {"lse": _log_sum_exp, "argmax": _argmax}
"""Seams computed from another one: `<seam>.lse`, `<seam>.argmax` over its last axis."""


def base_seam(name: str) -> tuple[str, str]:
    """(`logits`, `lse`) of `logits.lse`; the second is "" for a seam that is no derived one."""
    base, _, suffix = name.rpartition(".")
    return (base, suffix) if suffix in DERIVED else (name, "")


def observe(value: torch.Tensor, expected: Expected) -> Observed:
    """`value`, the whole of a seam, cut (and derived) as `expected` is. Raises ReferenceFileError where it does not
    reach."""
    _, derivation = base_seam(expected.seam)
    try:
        if derivation:
            return DERIVED[derivation](value, expected)
        return Observed(expected.selection.apply(value).clone())
    except ReferenceFileError as error:
        raise ReferenceFileError(f"{expected.tensor.name} does not fit the model: {error}.") from error


@contextmanager
def recording(model: nn.Module, seams: Sequence[Seam], wanted: Iterable[Expected]) -> Iterator[Observations]:
    """While the block runs, the model's values at the wanted seams, each taken at the first call of its module."""
    observations: Observations = {}
    with ExitStack() as hooks:
        for (seam, layer), expected in _by_place(seams, wanted, observations).items():
            path = seam.module.replace("*", layer)
            module = _submodule(model, path)
            if module is None and seam.also:
                module = _submodule(model, seam.also.replace("*", layer))
            if module is None:
                observations.update({each.tensor.name: Missed(f"the model has no module {path}") for each in expected})
                continue
            hooks.callback(_attach(module, seam, expected, observations, getattr(model, "config", None)).remove)
        yield observations


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """As `get_submodule`, None where there is none; a negative number counts a list's modules from its end."""
    try:
        for part in filter(None, path.split(".")):
            model = list(model.children())[int(part)] if part.startswith("-") else model.get_submodule(part)
    except (AttributeError, IndexError):
        return None
    return model


def _by_place(
    seams: Sequence[Seam], wanted: Iterable[Expected], observations: Observations
) -> dict[tuple[Seam, str], list[Expected]]:
    places: dict[tuple[Seam, str], list[Expected]] = {}
    for expected in wanted:
        name, _ = base_seam(expected.seam)
        found = next(((seam, layer) for seam in seams if (layer := seam.layer_of(name)) is not None), None)
        if found is None:
            observations[expected.tensor.name] = Missed("the family has no such seam")
            continue
        seam, layer = found
        places.setdefault((seam, layer), []).append(expected)
    return places


def _attach(module: nn.Module, seam: Seam, expected: list[Expected], observations: Observations, config: Any) -> Any:
    def keep(value: Any) -> None:
        if expected[0].tensor.name in observations:
            return
        picked = seam.pick(value)
        if picked is not None and seam.within is not None:
            picked = seam.within(picked, config)
        for each in expected:
            if picked is None:
                observations[each.tensor.name] = Missed("the model gave no such value")
            else:
                observations[each.tensor.name] = observe(picked.detach(), each)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        keep(output)

    if seam.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)
