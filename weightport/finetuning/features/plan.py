"""Frozen parts computed once: which part, for which pictures and prompts, under which key, and when to refuse.

What is exact. A picture's features are what the frozen part makes of it in a batch of the training's own size, under
the training's own mixed precision, so that losses are those of a run without the cache. Where all inputs of the part
have one shape (OFA with one prompt, any vision tower) they are bit for bit, as far as the machine's kernels give a row
of a batch the same result whatever the other rows hold. Where prompts differ in length, padding differs between the
batches of filling and of training, which moves sums of floating-point numbers: losses agree to about 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments

from weightport.errors import DataError, RecipeError
from weightport.finetuning.data.collation import Indexed, StoredFeatures
from weightport.finetuning.data.samples import Sample, Samples
from weightport.finetuning.family import Family, prompt_of
from weightport.finetuning.features.cached_part import CachedPart, Features, SharedStates, bypass
from weightport.finetuning.features.key import feature_key
from weightport.finetuning.features.store import FeatureStore, Layout, open_store, require_space
from weightport.finetuning.recipes.settings import BatchSettings, Recipe
from weightport.finetuning.setup.freezing import plain_name
from weightport.finetuning.setup.model_loading import Loaded
from weightport.finetuning.setup.precision import autocast, autocast_dtype
from weightport.formatting import size

FOLDER = "features"
"""Within the run, unless `model.feature_folder` says another."""

CHUNK = 512
"""Prompts that are tokenised at once to find the longest."""


@dataclass(frozen=True)
class Records:
    """The distinct pictures (and prompts) of a data set.

    of: int32 [samples], the record of each sample, -1 for one that cannot be read; firsts: of each record, the first
    sample that has it; longest: the record whose prompt has the most tokens.
    """

    of: np.ndarray
    firsts: np.ndarray
    longest: int


@dataclass(frozen=True)
class FeaturePlan:
    """Features that a run will use. `shared`: see `Features`, as many rows as the longest record has. `grouped`: a
    batch holds each record once, and says which samples have it."""

    part: CachedPart
    records: Records
    layout: Layout
    folder: Path
    shared: torch.Tensor | None
    grouped: bool = False
    held: SharedStates = field(default_factory=SharedStates)

    @property
    def filled(self) -> bool:
        return open_store(self.folder, self.layout) is not None

    def note(self) -> str:
        """What will be on disk, in a line."""
        shape = " × ".join(map(str, self.layout.shape))
        kept = "are used again" if self.filled else "are computed before the first step"
        return (
            f"features of the frozen {self.part.name} {kept}: {self.layout.records:,} × {shape} "
            f"{str(self.layout.dtype).removeprefix('torch.')}, {size(self.layout.nbytes)} in {self.folder}"
        )

    def stored(self, store: FeatureStore) -> StoredFeatures:
        """What the collator reads."""
        return StoredFeatures(store, self.records.of, self.grouped)

    def attach(self, model: Any) -> None:
        """Let the model take features in the place of pictures."""
        bypass(base_model(model), self.part, self.layout.shape)
        if self.grouped and self.part.projections is not None:
            self.held.attach(base_model(model), self.part.projections)

    def feed(
        self, inputs: dict[str, Any], states: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """The model's inputs with features [batch, rows, …] in them; or [records, rows, …], `rows` int64 [batch] being
        the record of each sample."""
        shared = self.shared.to(states.device)[: states.shape[1]] if self.shared is not None else None
        if rows is None:
            return self.part.feed(inputs, Features(states, lengths, shared))
        return self.part.feed(inputs, Features(self.held.by_sample(states, rows), lengths[rows], shared))


def plan_features(
    loaded: Loaded,
    recipe: Recipe,
    arguments: TrainingArguments,
    samples: Samples,
    frozen: frozenset[str],
    run: Path,
) -> FeaturePlan:
    """Decide what is kept and where; nothing is written. Runs the part on one sample to see what it gives.

    Raises RecipeError when no part can be kept, DataError for a sample without a picture, OutputError for lack of
    space.
    """
    family = loaded.family
    part = cached_part(family, loaded.model, recipe, frozen)
    if arguments.n_gpu > 1:
        raise RecipeError("--cache-features needs one process a GPU: start it with torchrun or accelerate launch.")
    if any(parameter.is_meta or not parameter.numel() for parameter in loaded.model.parameters()):
        raise RecipeError(
            "--cache-features needs whole weights in every process: DeepSpeed's stage 3 shares them out, FSDP's "
            "cpu_ram_efficient_loading loads them in one. Turn that off."
        )
    records = distinct(samples, family, loaded.processor, recipe.batch, per_prompt=part.per_prompt)
    features = _probe(loaded, recipe.batch, arguments, samples, int(records.firsts[records.longest]), part)
    key = feature_key(loaded, recipe, arguments, samples, part, records.of)
    layout = Layout(key, len(records.firsts), tuple(features.states.shape[1:]), features.states.dtype)
    root = Path(recipe.model.feature_folder) if recipe.model.feature_folder else run / FOLDER
    folder = root / key[:32]
    if open_store(folder, layout) is None:
        require_space(root, layout)
    return FeaturePlan(part, records, layout, folder, features.shared, recipe.batch.group_by_image)


def cached_part(family: Family, model: nn.Module, recipe: Recipe, frozen: frozenset[str]) -> CachedPart:
    """The longest beginning of the model that stands still. Raises RecipeError when there is none."""
    if recipe.model.frozen_mode != "eval":
        raise RecipeError(
            "--cache-features needs frozen parts that stand still, and model.frozen_mode is "
            f"{recipe.model.frozen_mode!r}: their dropout acts anew in every step. Set model.frozen_mode=eval."
        )
    trained = {
        family.parts.part_of(plain_name(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for part in family.cached:
        if part.per_prompt and recipe.batch.attend_padding:
            # What attends to padding depends on the other samples of its batch.
            continue
        if frozen.issuperset(part.frozen) and trained.isdisjoint(part.frozen):
            return part
    wanted = " or ".join(" ".join(f"--freeze {target}" for target in part.frozen) for part in family.cached[::-1])
    raise RecipeError(
        f"--cache-features has nothing to keep: frozen here are {', '.join(sorted(frozen)) or 'no parts'}, and "
        f"{family.name} needs {wanted}, with no adapter inside."
    )


def distinct(samples: Samples, family: Family, processor: Any, batch: BatchSettings, *, per_prompt: bool) -> Records:
    """Look at every sample's picture name and prompt; no picture is read. Raises DataError for one without picture."""
    numbers: dict[tuple[str, str], int] = {}
    of = np.full(len(samples), -1, dtype=np.int32)
    firsts: list[int] = []
    indexed = Indexed(samples)
    for index in range(len(samples)):
        _, sample = indexed[index]
        if isinstance(sample, str):
            # Whether it may be left out is decided where it is trained on.
            continue
        found = numbers.setdefault(_identity(sample, family, processor, batch, per_prompt), len(numbers))
        if found == len(firsts):
            firsts.append(index)
        of[index] = found
    if not firsts:
        raise DataError(f"{samples.name}: no sample can be read, so that there are no features to keep.")
    return Records(of, np.array(firsts), _longest(list(numbers), family, processor, batch) if per_prompt else 0)


def _identity(
    sample: Sample, family: Family, processor: Any, batch: BatchSettings, per_prompt: bool
) -> tuple[str, str]:
    if sample.picture is None:
        raise DataError(f"{sample.place} has no picture, and --cache-features keeps what is computed of pictures.")
    return sample.picture.key, prompt_of(family, processor, batch, sample) if per_prompt else ""


def _longest(identities: Sequence[tuple[str, str]], family: Family, processor: Any, batch: BatchSettings) -> int:
    """The first record whose prompt has the most tokens."""
    first = {prompt: number for number, (_, prompt) in reversed(list(enumerate(identities)))}
    prompts = list(first)
    lengths = [
        length
        for start in range(0, len(prompts), CHUNK)
        for length in _lengths(family.questions(processor, batch, prompts[start : start + CHUNK], None))
    ]
    return first[prompts[int(np.argmax(lengths))]]


def _lengths(inputs: dict[str, torch.Tensor]) -> list[int]:
    found: list[int] = inputs["attention_mask"].sum(dim=1).tolist()
    return found


def _probe(
    loaded: Loaded,
    batch: BatchSettings,
    arguments: TrainingArguments,
    samples: Samples,
    index: int,
    part: CachedPart,
) -> Features:
    """The features of one sample; of one with another picture where that cannot be read."""
    prompt = prompt_of(loaded.family, loaded.processor, batch, samples[index])
    for other in (index, *range(len(samples))):
        try:
            picture = samples[other].picture
            image = picture.read() if picture is not None else None
        except DataError:
            # Filling decides whether it may be left out; another picture is resized to the same shape.
            continue
        inputs = loaded.family.questions(loaded.processor, batch, [prompt], [image])
        return computed(loaded.model, part, inputs, arguments)
    raise DataError(f"{samples.name}: no picture can be read.")


def computed(model: Any, part: CachedPart, inputs: dict[str, torch.Tensor], arguments: TrainingArguments) -> Features:
    """The part's features of a batch, as training would compute them, in the dtype that they are kept in."""
    base = base_model(model)
    if next(base.parameters()).device != arguments.device:
        base.to(arguments.device)
    placed = {name: tensor.to(arguments.device) for name, tensor in inputs.items()}
    training = base.training
    base.eval()
    try:
        with torch.no_grad(), autocast(arguments):
            features = part.compute(base, placed)
    finally:
        base.train(training)
    kept = autocast_dtype(arguments) if part.read_by_linear else None
    if kept is None or not features.states.is_floating_point():
        return features
    return Features(features.states.to(kept), features.lengths, features.shared)


def base_model(model: Any) -> Any:
    """The model itself, without peft around it."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
