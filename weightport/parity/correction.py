"""What a correction of the running model changes: how far the directory, as transformers loads it, is from the model
that was held against the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from weightport.parity.family import Family
from weightport.parity.reference import Run
from weightport.parity.runner import native_arguments

OUTPUTS = ("logits", "logits_per_image")


def effect_of(model: PreTrainedModel, family: Family, runs: Sequence[Run], undo: Callable[[], None]) -> str:
    """One sentence: what the correction of `model` is for, and how much logits change without it. `undo` takes it
    back, and it stays undone. Empty where no run is a forward or training one."""
    run = next((each for each in runs if each.kind != "generate"), None)
    if run is None or family.correction is None:
        return ""
    arguments = native_arguments(family, run, model)
    with_it = _output(model, arguments)
    undo()
    without = _output(model, arguments)
    if with_it is None or without is None:
        return ""
    largest, scale = float((with_it - without).abs().max()), float(with_it.abs().max())
    return (
        f"corrected while measured: {family.correction.because}. As transformers loads this directory, its outputs "
        f"differ by {largest:.1e} from these (largest value {scale:.1f}; run {run.name})."
    )


def _output(model: PreTrainedModel, arguments: dict[str, Any]) -> torch.Tensor | None:
    with torch.no_grad():
        output = model(**arguments, use_cache=False)
    return next((value for name in OUTPUTS if (value := getattr(output, name, None)) is not None), None)
