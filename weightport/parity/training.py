"""Training runs: the loss, gradients and buffers under the original's names. The model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from weightport.errors import ReferenceFileError
from weightport.parity.family import Family
from weightport.parity.memory import free_memory
from weightport.parity.noise import GRADIENT_FLOOR, gradient_scale_of
from weightport.parity.originals import Originals
from weightport.parity.reference import Expected, Run
from weightport.parity.seams import Missed, Observations, observe, recording
from weightport.parity.streaming import WideWeight

GRADIENT, GRADIENT_NORM, TOTAL_NORM, AFTER = "grad.", "grad_norm.", "grad_norm", "after."
LOSS = "loss"


def run_training(
    model: PreTrainedModel, family: Family, run: Run, arguments: Mapping[str, Any], wanted: Sequence[Expected],
    originals: Originals,
) -> Observations:  # fmt: skip
    """One step without an update: forward in the run's mode, backward when the reference holds gradients."""
    special = [each for each in wanted if _is_gradient(each.seam) or each.seam in family.losses]
    backward = any(_is_gradient(each.seam) and not each.seam.startswith(AFTER) for each in special)
    with (
        torch.set_grad_enabled(backward),
        _unchanged(model),
        _exact_loss(model, family),
        recording(model, family.seams, [each for each in wanted if each not in special]) as observations,
    ):
        model.train(run.options.get("mode") == "train")
        output = model(**arguments, use_cache=False)
        if output.loss is None:
            raise ReferenceFileError(f"The model computed no loss in run {run.name!r}.")
        loss = family.training_loss(output, arguments, run.options, model.config) if family.training_loss else None
        if loss is None:
            loss = output.loss
        else:
            observations.update(
                {each.tensor.name: observe(loss.detach(), each) for each in wanted if each.seam == LOSS}
            )
        for each in special:
            if each.seam in family.losses:
                value = family.losses[each.seam](output, arguments, model.config)
                observations[each.tensor.name] = observe(value.detach(), each)
        if backward:
            loss.backward()
        _record_originals(model, special, originals, observations)
    return observations


@dataclass
class TrainingMemory:
    """What training steps take, measured where they were run: bytes of activations kept for the backward pass, an
    element, by run."""

    elements: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def measuring(self, run: Run, model: PreTrainedModel) -> Iterator[None]:
        """Count what the block keeps for its backward pass, when `run` is a training run."""
        if run.kind != "train":
            yield
            return
        weights = {id(each) for each in model.parameters()}
        kept: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in weights and not isinstance(tensor, WideWeight):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        self.elements[run.name] = sum(kept.values())

    def shortage(self, run: Run, model: PreTrainedModel) -> str:
        """Why a training run in float64 cannot be taken: gradients and activations of `model` do not fit into the
        memory that is free. Empty where they do, where another run is meant, or where nothing was measured before."""
        if model.dtype != torch.float64 or run.name not in self.elements:
            return ""
        gradients = sum(each.numel() for each in model.parameters())
        needed = (gradients + self.elements[run.name]) * torch.float64.itemsize
        free = free_memory(model.device)
        return f"it needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free" if needed > free else ""


def _record_originals(
    model: PreTrainedModel, wanted: Sequence[Expected], originals: Originals, observations: Observations
) -> None:
    """Gradients, their norms and buffers, under the original's names."""
    # Zeros stand for gradients that no parameter got; where none is compared, nothing of the model's size is made.
    compared = any(_is_gradient(each.seam) and not each.seam.startswith(AFTER) for each in wanted)
    parameters = dict(model.named_parameters(remove_duplicate=False)) if compared else {}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    buffers = dict(model.named_buffers())
    norms = [each.seam.removeprefix(GRADIENT_NORM) for each in wanted if each.seam.startswith(GRADIENT_NORM)]
    for each in wanted:
        if not _is_gradient(each.seam):
            continue
        if each.seam == TOTAL_NORM:
            named = [originals.tensor(name, gradients) for name in dict.fromkeys(norms)]
            parts = [g for g in named if g is not None] or [p.grad for p in model.parameters() if p.grad is not None]
            value: torch.Tensor | None = torch.stack([part.double().norm() for part in parts]).norm()
        else:
            prefix = next(p for p in (GRADIENT_NORM, GRADIENT, AFTER) if each.seam.startswith(p))
            value = originals.tensor(each.seam.removeprefix(prefix), buffers if prefix == AFTER else gradients)
            if value is not None and prefix == GRADIENT_NORM:
                value = _norm_like(value.double(), each.tensor.shape)
        observations[each.tensor.name] = (
            Missed("the model has no such parameter") if value is None else observe(value.detach(), each)
        )


def _norm_like(gradient: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The 2-norm; of each entry of axis 0 where the reference holds so many (a tensor of all layers has one a
    layer)."""
    return gradient.flatten(1).norm(dim=1) if shape == gradient.shape[:1] and gradient.ndim > 1 else gradient.norm()


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Gradients are cleared and buffers restored when the block ends; the model evaluates again."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        model.eval()


@contextmanager
def _exact_loss(model: PreTrainedModel, family: Family) -> Iterator[None]:
    """While the block runs, a float64 model computes its loss in float64."""
    if family.exact_loss is None or model.dtype != torch.float64:
        yield
        return
    model.loss_function = family.exact_loss
    try:
        yield
    finally:
        del model._loss_function


def whole_gradient(run: Run) -> float:
    """Norm of the whole gradient in the reference, as far as it says; 0 when the run holds no gradient."""
    by_seam = {
        each.seam: each for each in run.outputs if each.seam == TOTAL_NORM or each.seam.startswith(GRADIENT_NORM)
    }
    if TOTAL_NORM in by_seam:
        return float(by_seam[TOTAL_NORM].tensor.read())
    if by_seam:
        return float(torch.stack([each.tensor.read().double().norm() for each in by_seam.values()]).norm())
    gradients = {each.seam: each for each in run.outputs if each.seam.startswith(GRADIENT)}
    norms = [each.tensor.read().double().norm() for each in gradients.values()]
    return float(torch.stack(norms).norm()) if norms else 0.0


def gradient_floor(expected: Expected, observed: torch.Tensor, total: float) -> float:
    """The smallest scale a gradient is measured against (see noise.GRADIENT_FLOOR); 0 for everything else.

    `total`: the norm of the whole gradient.
    """
    if expected.seam.startswith(GRADIENT_NORM):
        return GRADIENT_FLOOR * total
    if expected.seam.startswith(GRADIENT):
        even = GRADIENT_FLOOR * total / max(observed.numel(), 1) ** 0.5
        return max(even, gradient_scale_of(expected.tensor.read()))
    return 0.0


def _is_gradient(seam: str) -> bool:
    return seam == TOTAL_NORM or seam.startswith((GRADIENT, GRADIENT_NORM, AFTER))
