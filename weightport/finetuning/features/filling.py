"""Filling a feature store before the first step: every process computes its share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments

from weightport.errors import DataError, OutputError
from weightport.finetuning.data.collation import Indexed
from weightport.finetuning.data.samples import Sample, Samples, left_to_skip
from weightport.finetuning.family import Family, prompt_of
from weightport.finetuning.features.plan import FeaturePlan, computed
from weightport.finetuning.features.store import FeatureStore, RecordFile, StoreWriter, locked, open_store
from weightport.finetuning.recipes.settings import BatchSettings, Recipe
from weightport.finetuning.setup.model_loading import Loaded

SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class _Asked:
    """The part's inputs for the samples at `indices`; `failures` are those whose picture cannot be read."""

    indices: tuple[int, ...]
    inputs: dict[str, torch.Tensor]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class _Asker:
    """What the data loader's workers do: read and decode pictures, tokenise prompts."""

    family: Family
    processor: Any
    batch: BatchSettings
    size: int

    def __call__(self, items: Sequence[tuple[int, Sample | str]]) -> _Asked:
        indices, prompts, images, failures = [], [], [], []
        for index, sample in items:
            try:
                if isinstance(sample, str) or sample.picture is None:
                    raise DataError(sample if isinstance(sample, str) else f"{sample.place} has no picture.")
                images.append(sample.picture.read())
            except DataError as error:
                failures.append(str(error))
                continue
            prompts.append(prompt_of(self.family, self.processor, self.batch, sample))
            indices.append(index)
        if not indices:
            return _Asked((), {}, tuple(failures))
        # A full batch, so that kernels are those of training: the last sample stands in for the missing ones.
        missing = self.size - len(indices)
        prompts += prompts[-1:] * missing
        images += images[-1:] * missing
        return _Asked(
            tuple(indices), self.family.questions(self.processor, self.batch, prompts, images), tuple(failures)
        )


def filled_store(
    plan: FeaturePlan,
    loaded: Loaded,
    recipe: Recipe,
    arguments: TrainingArguments,
    samples: Samples,
    say: Callable[[str], None],
) -> FeatureStore:
    """The plan's features, computed now unless they are on the disk. Called in every process, which wait for each
    other.

    Raises DataError for a picture that cannot be read, beyond the bad samples that may be left out; OutputError when
    the disk cannot be written or is not shared by all processes.
    """
    state = PartialState()
    writer = StoreWriter(plan.folder, plan.layout)
    with _only_run(plan, main=state.is_main_process):
        if state.is_main_process and not plan.filled:
            writer.begin()
        state.wait_for_everyone()
        if not plan.filled:
            if not writer.work.is_dir():
                raise OutputError(
                    f"{writer.work} is not there in every process: set model.feature_folder to a shared disk."
                )
            with writer.writing() as records:
                _fill(plan, records, loaded, recipe, arguments, samples, say)
            state.wait_for_everyone()
            if state.is_main_process:
                writer.finish()
        state.wait_for_everyone()
    store = open_store(plan.folder, plan.layout)
    if store is None:
        raise OutputError(f"{plan.folder} was changed while it was filled. Start again.")
    return store


@contextmanager
def _only_run(plan: FeaturePlan, *, main: bool) -> Iterator[None]:
    with locked(plan.folder) if main else nullcontext():
        yield


def _fill(
    plan: FeaturePlan,
    file: RecordFile,
    loaded: Loaded,
    recipe: Recipe,
    arguments: TrainingArguments,
    samples: Samples,
    say: Callable[[str], None],
) -> None:
    firsts = plan.records.firsts[arguments.process_index :: arguments.world_size].tolist()
    loader = DataLoader(
        Subset(Indexed(samples), firsts),
        batch_size=arguments.train_batch_size,
        collate_fn=_Asker(loaded.family, loaded.processor, recipe.batch, arguments.train_batch_size),
        num_workers=arguments.dataloader_num_workers,
        # A loader draws a seed; training's random numbers stay those of a run without features.
        generator=torch.Generator(),
    )
    failures, done, begun = 0, 0, time.monotonic()
    told = begun
    for asked in loader:
        failures += len(asked.failures)
        if failures > left_to_skip(samples, recipe.data.skip_bad):
            advice = "More samples are bad" if recipe.data.skip_bad else "Mend it, or leave bad samples out"
            raise DataError(f"{asked.failures[0]}\n  {advice}: --skip-bad N allows up to N.")
        if asked.indices:
            features = computed(loaded.model, plan.part, asked.inputs, arguments)
            for index, states, length in zip(asked.indices, features.states, features.lengths.tolist()):
                _require_fit(states[:length], plan, samples[index])
                file.write(int(plan.records.of[index]), states[:length])
        done += len(asked.indices)
        if (now := time.monotonic()) - told > SECONDS_BETWEEN_LINES:
            told = now
            say(f"features {done:,} of {len(firsts):,} · {done / (now - begun):.1f} a second")
    say(f"features of {done:,} pictures computed in {time.monotonic() - begun:.1f} s")


def _require_fit(states: torch.Tensor, plan: FeaturePlan, sample: Sample) -> None:
    shape = plan.layout.shape
    if len(states) > shape[0] or tuple(states.shape[1:]) != shape[1:]:
        raise DataError(
            f"{sample.place}: its features are {tuple(states.shape)}, those of the others {shape}. --cache-features "
            "needs pictures that are resized to one size."
        )
