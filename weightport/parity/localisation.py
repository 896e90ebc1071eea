"""Where a difference starts: the modules that run between the last seam that agrees and the first that departs.

A reference holds only the places its script recorded. Between two of them the native model is traced, and every module
that starts and ends there is named: `model.encoder.layers.3`, and what ran inside it. A reference with finer seams
(`encoder.layers.3.self_attn`) narrows it down by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from weightport.parity.compare import Comparison
from weightport.parity.family import Family, Seam
from weightport.parity.seams import base_seam

NAMED = 16


@dataclass(frozen=True)
class Localisation:
    """The first departing seam of a run, what agrees before it, and the native modules between the two.

    `input_error` and `output_error` are the largest errors in units of their seam's scale, None where there is none
    (no seam before it; another shape, NaN, ids). `modules` are those that ran between, the outermost only; `inside`
    what ran within them, innermost, in order.
    """

    run: str
    seam: str
    dtype: str
    input_seam: str | None
    input_error: float | None
    output_error: float | None
    modules: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    note: str = ""

    @property
    def sentence(self) -> str:
        """`encoder.layers.3.self_attn: input equal to 2e-07, output departs by 3e-02; between them: …`."""
        before = "nothing is compared before it"
        if self.input_seam is not None:
            equal = "equal" if not self.input_error else f"equal to {self.input_error:.0e}"
            before = f"input ({self.input_seam}) {equal}"
        after = f"output departs by {self.output_error:.0e}" if self.output_error is not None else self.note
        where = f"; between them: {_listed(self.modules)}" if self.modules else ""
        within = f" ({_listed(self.inside)})" if self.inside else ""
        return f"{self.seam}: {before}, {after or 'output departs'}{where}{within}"


def last_agreeing(first: Comparison, comparisons: Sequence[Comparison], order: Sequence[str]) -> Comparison | None:
    """The last seam, in forward order, that agrees before `first` does not: same run, dtype, and reference dtype."""
    place = {seam: i for i, seam in enumerate(order)}
    same = [
        each
        for each in comparisons
        if (each.run, each.dtype, each.against, each.attention)
        == (first.run, first.dtype, first.against, first.attention)
        and place.get(each.seam, len(place)) < place.get(first.seam, len(place))
        and each.verdict.passes
    ]
    return max(same, key=lambda each: place.get(each.seam, len(place)), default=None)


class Trace:
    """The modules of a model in the order they start and end, while the block runs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks = ExitStack()
        self.starts: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        self._clock = 0

    def __enter__(self) -> Trace:
        for path, module in self._model.named_modules():
            self._hooks.callback(module.register_forward_pre_hook(partial(self._tick, self.starts, path)).remove)
            self._hooks.callback(module.register_forward_hook(partial(self._tick, self.ends, path)).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _tick(self, moments: dict[str, int], path: str, *unused: Any) -> None:
        self._clock += 1
        moments.setdefault(path, self._clock)

    def between(self, start: int, end: int) -> list[str]:
        """Modules that start at `start` or later and end by `end`, in the order they end."""
        inside = [
            path
            for path, begun in self.starts.items()
            if begun >= start and start <= self.ends.get(path, end + 1) <= end
        ]
        return sorted(inside, key=self.ends.__getitem__)

    def moment(self, seam: Seam, layer: str) -> int | None:
        """When the value of a seam was there; None when its module did not run."""
        moments = self.starts if seam.side == "input" else self.ends
        for module in (seam.module, *([seam.also] if seam.also else [])):
            try:
                return moments[self._path(module.replace("*", layer))]
            except (AttributeError, IndexError, KeyError):
                continue
        return None

    def _path(self, path: str) -> str:
        """The module's name, a list's last element by number."""
        parts: list[str] = []
        for part in filter(None, path.split(".")):
            if part.startswith("-"):
                children = [name for name, _ in self._model.get_submodule(".".join(parts)).named_children()]
                part = children[int(part)]
            parts.append(part)
        return ".".join(parts)


def localise(
    model: nn.Module, family: Family, arguments: dict[str, Any], first: Comparison, before: Comparison | None
) -> Localisation:
    """Trace one forward pass and name what ran between `before` and `first`."""
    place = _seam(family, first.seam)
    found = Localisation(
        first.run,
        first.seam,
        first.dtype,
        before.seam if before else None,
        before.relative if before else None,
        first.relative,
        note=first.note,
    )
    if place is None:
        return found
    if place[0].parts:
        return _with(found, place[0].parts, ())
    with torch.no_grad(), Trace(model) as trace:
        model(**arguments, use_cache=False)
    end = trace.moment(*place)
    earlier = _seam(family, before.seam) if before else None
    start = (trace.moment(*earlier) or 0) if earlier else 0
    between = trace.between(start, end) if end is not None else []
    outer = [path for path in between if not any(_within(path, other) for other in between)]
    leaves = [path for path in between if path not in outer and not any(_within(other, path) for other in between)]
    return _with(found, tuple(outer), tuple(path for path in leaves if any(True for _ in _weights(model, path))))


def _weights(model: nn.Module, path: str) -> Iterable[object]:
    """What makes a module worth naming: its parameters, or that it is an activation."""
    module = model.get_submodule(path)
    yield from module.parameters(recurse=False)
    if not list(module.children()) and type(module).__module__.startswith(
        ("torch.nn.modules.activation", "transformers.activations")
    ):
        yield module


def _with(found: Localisation, modules: tuple[str, ...], inside: tuple[str, ...]) -> Localisation:
    return Localisation(**{**found.__dict__, "modules": modules, "inside": inside})


def _within(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(other + "."))


def _seam(family: Family, name: str) -> tuple[Seam, str] | None:
    base, _ = base_seam(name)
    return next(((seam, layer) for seam in family.seams if (layer := seam.layer_of(base)) is not None), None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
