"""One run of a reference on the native model: forward, train or generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from weightport.errors import ReferenceFileError
from weightport.parity.family import Family, Tensors
from weightport.parity.generation import run_generation
from weightport.parity.memory import is_out_of_memory
from weightport.parity.originals import Originals
from weightport.parity.reference import Expected, Run
from weightport.parity.seams import Missed, Observations, recording
from weightport.parity.training import run_training


def native_arguments(family: Family, run: Run, model: PreTrainedModel) -> dict[str, Any]:
    """The run's inputs as the native model takes them. Raises ReferenceFileError when they do not fit the model."""
    known = {argument.original: argument for argument in family.arguments}
    _refuse("arguments", [name for name in run.inputs if name not in known], known, run)
    _refuse(
        "options",
        [name for name in run.options if name not in family.options[run.kind]],
        family.options[run.kind],
        run,
    )
    missing = [name for name in family.required[run.kind] if name not in run.inputs]
    if missing:
        raise ReferenceFileError(f"Run {run.name!r} ({run.kind}) lacks the input {', '.join(missing)}.")
    tensors: Tensors = {}
    batch: dict[str, int] = {}
    for name, ref in run.inputs.items():
        argument, value = known[name], ref.read()
        if not value.ndim:
            raise ReferenceFileError(f"{ref.name} is a single number; expected a tensor with a batch axis.")
        batch[name] = value.shape[0]
        if argument.content == "tokens":
            _check_tokens(ref.name, value, model.config.get_text_config().vocab_size)
        if argument.content == "images" and (value.ndim < 4 or value.shape[-3] != 3 or 0 in value.shape):
            raise ReferenceFileError(
                f"{ref.name} has the shape {list(value.shape)}; expected images [batch, 3, height, width]."
            )
        tensors[argument.native] = argument.convert(value)
    if len(set(batch.values())) > 1:
        raise ReferenceFileError(f"Run {run.name!r} has inputs of different batch sizes: {batch}.")
    with _options_of(run):
        arguments = family.complete(run.kind, tensors, run.options, model.config)
    return {name: _placed(value, model) for name, value in arguments.items()}


def execute(
    model: PreTrainedModel, family: Family, run: Run, wanted: Sequence[Expected], originals: Originals,
    *, use_cache: bool = True,
) -> Observations:  # fmt: skip
    """Run `run` and return what the model gave at the wanted seams. The model is left as it was."""
    arguments = native_arguments(family, run, model)
    try:
        if run.kind == "generate":
            with _options_of(run):
                generation = family.generation(arguments, run.options, model.config)
            observations = run_generation(model, generation, arguments, wanted, use_cache)
        elif run.kind == "train":
            observations = run_training(model, family, run, arguments, wanted, originals)
        else:
            observations = _forward(model, family, arguments, wanted)
    except (ValueError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"run {run.name!r}: {error}") from error
        raise ReferenceFileError(f"The model does not take the inputs of run {run.name!r}: {error}") from error
    passed_by = Missed("the run does not pass there")
    return {each.tensor.name: observations.get(each.tensor.name, passed_by) for each in wanted}


def _forward(
    model: PreTrainedModel, family: Family, arguments: Mapping[str, Any], wanted: Sequence[Expected]
) -> Observations:
    with torch.no_grad(), recording(model, family.seams, wanted) as observations:
        model(**arguments, use_cache=False)
    return observations


@contextmanager
def _options_of(run: Run) -> Iterator[None]:
    """What goes wrong while the block reads the run's options is the options' fault."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ReferenceFileError(f"The options of run {run.name!r} cannot be read: {error}.") from error


def _refuse(what: str, unknown: Sequence[str], known: Any, run: Run) -> None:
    if unknown:
        raise ReferenceFileError(
            f"Run {run.name!r} has the {what} {', '.join(unknown)}; known are {', '.join(known)}."
        )


def _check_tokens(name: str, ids: torch.Tensor, vocabulary: int) -> None:
    if ids.dtype.is_floating_point or ids.ndim != 2 or 0 in ids.shape:
        raise ReferenceFileError(f"{name} is {ids.dtype} {list(ids.shape)}; expected token ids [batch, length].")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ReferenceFileError(
            f"{name} holds ids from {low} to {high}; the model's vocabulary has {vocabulary} entries."
        )


def _placed(value: Any, model: PreTrainedModel) -> Any:
    """Tensors on the model's device; images in the model's dtype."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
