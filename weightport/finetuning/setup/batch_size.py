"""How a step's samples are divided among processes and batches, and the largest batch that fits into memory."""

from __future__ import annotations

import gc
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments

from weightport.errors import DataError, RecipeError, TrainingError
from weightport.finetuning import activation_checkpointing
from weightport.finetuning.data.collation import FAILURE, INDICES, BadSamples, Collator, Indexed
from weightport.finetuning.data.samples import Samples
from weightport.finetuning.evaluation.answering import chosen
from weightport.finetuning.family import prompt_of
from weightport.finetuning.recipes.settings import Recipe
from weightport.finetuning.setup.model_loading import Loaded
from weightport.finetuning.setup.precision import autocast
from weightport.formatting import size

LOOKED_AT = 1024
"""Samples, spread over the data, of which the longest is tried."""

UNITS: Mapping[str, float] = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Division:
    """A step's samples: batches of `size`, `accumulation` of them in each of `processes`."""

    size: int
    accumulation: int
    processes: int

    @property
    def samples(self) -> int:
        """Samples of one step."""
        return self.size * self.accumulation * self.processes

    @property
    def described(self) -> str:
        """How they make a step, in words."""
        batches = "1 batch" if self.accumulation == 1 else f"{self.accumulation} batches"
        where = "" if self.processes == 1 else f" in each of {self.processes} processes"
        makes = "makes" if self.accumulation == self.processes == 1 else "make"
        return f"{batches} of {self.size}{where} {makes} the {self.samples} samples of a step"

    def among(self, processes: int) -> Division:
        """The same samples among another number of processes, in batches as large as before where that can be. Raises
        TrainingError when they cannot be divided."""
        own, rest = divmod(self.samples, processes)
        if rest:
            then = "1 process" if self.processes == 1 else f"{self.processes} processes"
            raise TrainingError(
                f"The run was started with {self.samples} samples a step ({self.size} × {self.accumulation} in "
                f"{then}), which {processes} processes cannot share evenly. Resume with another "
                "number of processes."
            )
        largest = next(each for each in range(min(self.size, own), 0, -1) if own % each == 0)
        return Division(largest, own // largest, processes)

    def apply(self, arguments: TrainingArguments) -> None:
        """Let the arguments say so."""
        arguments.per_device_train_batch_size = self.size
        arguments.gradient_accumulation_steps = self.accumulation


def division_of(arguments: TrainingArguments) -> Division:
    """What the arguments say."""
    size, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    return Division(size, accumulation, arguments.world_size)


def bytes_of(text: str) -> int:
    """Bytes in "8 GB", "500MB", "1.5e9". Raises RecipeError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)b?\s*", text.lower())
    with suppress(ValueError):
        if match and (found := int(float(match.group(1)) * UNITS[match.group(2)])):
            return found
    raise RecipeError(f"batch.memory is {text!r}. It is an amount such as 8 GB.")


def require_searchable(recipe: Recipe, arguments: TrainingArguments, *, sharded: bool) -> None:
    """Raises RecipeError where no search for a batch size can say what would fit."""
    if recipe.batch.memory is not None:
        bytes_of(recipe.batch.memory)
        if not recipe.batch.fit_memory:
            raise RecipeError("batch.memory is what --batch-size auto may use, and there is no such search here.")
    if not recipe.batch.fit_memory:
        return
    if recipe.batch.loss_mean == "batches":
        raise RecipeError(
            "--batch-size auto divides a step's samples anew, and with batch.loss_mean=batches another division is "
            "another loss. Set training.per_device_train_batch_size."
        )
    if sharded:
        raise RecipeError(
            "--batch-size auto tries a whole model in every process, and FSDP and DeepSpeed share it out. Set "
            "training.per_device_train_batch_size."
        )
    if arguments.n_gpu > 1:
        raise RecipeError("--batch-size auto needs one process a GPU: start it with torchrun or accelerate launch.")
    if arguments.auto_find_batch_size:
        raise RecipeError(
            "--batch-size auto keeps a step's samples as many, and training.auto_find_batch_size does not: set one."
        )


def fitting_division(
    loaded: Loaded,
    recipe: Recipe,
    arguments: TrainingArguments,
    samples: Samples,
    measure: Callable[[int], float] | None = None,
) -> tuple[Division, str]:
    """(the division of a step with the largest batch that fits, a note on it). The model, its gradients and the random
    numbers are left as they were.

    Batches that divide a step's samples in a process are tried from 1 upwards, each a forward and a backward pass of
    the data's longest sample repeated; one that would pass the budget, by the growth so far, is not tried. Every
    process searches, and the smallest result counts. `measure`: batch size → bytes at the peak, `inf` for a batch that
    does not fit at all. Raises TrainingError when no batch fits.
    """
    now = division_of(arguments)
    own = now.size * now.accumulation
    budget = _budget(recipe, arguments)
    peak = measure or _Trial(loaded, recipe, arguments, samples).peak
    extra = _not_yet_there(loaded.model, recipe, arguments)
    fits, peaks = 0, list[tuple[int, float]]()
    with _as_it_was(loaded.model, arguments):
        for batch in (each for each in range(1, own + 1) if own % each == 0):
            if peaks and _foreseen(peaks, batch) + extra > budget:
                break
            peaks.append((batch, peak(batch)))
            if peaks[-1][1] + extra > budget:
                break
            fits = batch
    fits = _smallest(fits, arguments.world_size)
    if not fits:
        needs = f"{size(peaks[0][1] + extra)}" if peaks and peaks[0][1] < float("inf") else "more"
        raise TrainingError(
            f"Not even a batch of one sample fits: it needs {needs}, and {size(budget)} are there (batch.memory). "
            "gradient_checkpointing=true, --method lora or --freeze need less."
        )
    found = replace(now, size=fits, accumulation=own // fits)
    used = dict(peaks)[fits] + extra
    return found, (
        f"batches of {found.size}: the largest that fits {size(budget)}, with {size(used)} at the peak; "
        f"{found.described}"
    )


def _budget(recipe: Recipe, arguments: TrainingArguments) -> float:
    """Bytes that this process may use in all."""
    if recipe.batch.memory is not None:
        return bytes_of(recipe.batch.memory)
    if arguments.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(arguments.device)
        return 0.9 * (free + torch.cuda.memory_reserved(arguments.device))
    # Processes of one machine share its memory; what other programs need comes and goes.
    own = psutil.Process().memory_info().rss
    return own + 0.5 * psutil.virtual_memory().available / arguments.world_size


def _not_yet_there(model: torch.nn.Module, recipe: Recipe, arguments: TrainingArguments) -> float:
    """Bytes of what a run holds beside weights, gradients and activations: the optimizer's two moments, the moving
    average and what it takes the place of, and DistributedDataParallel's copy of the gradients."""
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    averaged = 8 if recipe.model.ema_decay is not None else 0
    shared = 4 if arguments.world_size > 1 else 0
    return trained * (8 + averaged + shared)


def _foreseen(peaks: list[tuple[int, float]], batch: int) -> float:
    """The peak of a batch, from the two largest before it; 0 while there is nothing to go by."""
    if len(peaks) < 2:
        return 0.0
    (smaller, low), (larger, high) = peaks[-2:]
    return high + max(0.0, high - low) / (larger - smaller) * (batch - larger)


def _smallest(fits: int, processes: int) -> int:
    """The least of all processes' results."""
    if processes == 1:
        return fits
    from accelerate.utils import gather_object

    return min(gather_object([fits]))


class _Trial:
    """Forward and backward passes of batches of the longest sample, as training makes them."""

    def __init__(self, loaded: Loaded, recipe: Recipe, arguments: TrainingArguments, samples: Samples) -> None:
        self._model = loaded.model
        self._arguments = arguments
        self._collator = Collator(
            loaded.family,
            loaded.processor,
            loaded.model.config,
            recipe.batch,
            BadSamples(samples, recipe.data.skip_bad),
        )
        self._item = self._longest(loaded, recipe, samples)

    def peak(self, batch: int) -> float:
        """Bytes of the process, or of what torch allocated on a GPU, at the peak of one pass."""
        cuda = self._arguments.device.type == "cuda"
        inputs = self._collator([self._item] * batch)
        inputs.pop(INDICES)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._arguments.device)
        else:
            _reset_peak()
        try:
            self._pass(inputs)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return float("inf")
        finally:
            self._model.zero_grad(set_to_none=True)
            gc.collect()
        return float(torch.cuda.max_memory_allocated(self._arguments.device) if cuda else _peak())

    def _pass(self, inputs: dict[str, Any]) -> None:
        model: Any = self._model
        arguments = self._arguments
        if next(model.parameters()).device != arguments.device:
            model.to(arguments.device)
        placed = {name: tensor.to(arguments.device) for name, tensor in inputs.items()}
        with autocast(arguments):
            loss = model(**placed).loss
        loss.backward()

    def _longest(self, loaded: Loaded, recipe: Recipe, samples: Samples) -> Any:
        """The sample with the most characters that becomes a batch. Raises DataError when none does."""
        indexed = Indexed(samples)
        lengths = []
        for index in chosen(len(samples), LOOKED_AT):
            with suppress(DataError):
                sample = samples[index]
                texts = (prompt_of(loaded.family, loaded.processor, recipe.batch, sample), sample.suffix)
                lengths.append((sum(map(len, texts)), index))
        made: dict[str, Any] = {FAILURE: f"{samples.name}: no sample can be read."}
        for _, index in sorted(lengths, reverse=True):
            made = self._collator([indexed[index]])
            if FAILURE not in made:
                return indexed[int(made[INDICES][0])]
        raise DataError(made[FAILURE])


@contextmanager
def _as_it_was(model: Any, arguments: TrainingArguments) -> Iterator[None]:
    """The model as it is trained, its batch statistics and the random state put back at the end."""
    buffers = {name: each.detach().cpu().clone() for name, each in model.named_buffers()}
    training = model.training
    if activation_checkpointing.is_asked_for(arguments):
        activation_checkpointing.enable(model)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model.train()
            yield
    finally:
        model.train(training)
        if activation_checkpointing.is_asked_for(arguments):
            activation_checkpointing.disable(model)
        with torch.no_grad():
            for name, each in model.named_buffers():
                each.copy_(buffers[name])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _reset_peak() -> None:
    """Let the high-water mark of this process's memory begin anew, where the system can do that."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as control:
        control.write("5")


def _peak() -> float:
    """Bytes of this process's memory at its high-water mark."""
    with suppress(OSError, ValueError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
