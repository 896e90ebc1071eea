"""What a recipe says, section by section. Every field can be set on the command line by its dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightport.finetuning.data.settings import DataSettings

METHODS = ("full", "lora", "qlora")
LOSS_MEANS = ("tokens", "samples", "batches")
SAMPLINGS = ("plain", "balanced", "nearby")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BatchSettings:
    """How samples become tensors.

    prompt: what the model is asked, `{prefix}` being the sample's own question; without it the model's prompt for
    `task`. image_size: pixels of the square that images are resized to, by default the processor's.
    max_prompt_length, max_target_length: tokens kept of prompt and answer, end token included.
    count_padding: padding counts in the loss, as in some published loops. attend_padding: the encoder attends to the
    padding of prompts, as Florence-2's remote code does. loss_mean: what a step's loss is the mean of, `tokens` of all
    answers, as in transformers; `samples`, of each answer's own mean, as big_vision trains; `batches`, of each
    accumulated batch's tokens, and the step's is their sum, as in loops that do not divide by the accumulation.
    augment: names of changes that training pictures go through (augmentation.py). sampling: `plain` takes every sample
    once an epoch, `balanced` draws classes equally often, `nearby` takes every sample once, in windows of samples that
    stand next to each other in the files. group_by_image: batches hold samples of the same pictures.
    fit_memory: search for the largest batch of a process that fits, and accumulate so that a step's samples stay as
    many. memory: what it may use, as "8 GB"; by default 0.9 of a GPU, or half of what a machine without one has free.
    """

    prompt: str | None = None
    task: str = "caption"
    image_size: int | None = None
    max_prompt_length: int | None = None
    max_target_length: int = 512
    count_padding: bool = False
    attend_padding: bool = False
    loss_mean: str = "tokens"
    augment: tuple[str, ...] = ()
    sampling: str = "plain"
    group_by_image: bool = False
    fit_memory: bool = False
    memory: str | None = None


@dataclass(frozen=True)
class ModelSettings:
    """What is trained. freeze: the family's names of parts. frozen_mode: `eval` keeps dropout and batch statistics of
    frozen parts still, `train` leaves them moving as published loops do. dtype: of the weights during training
    (mixed precision is `training.bf16` or `training.fp16`); the result has the base's. attention: transformers'
    attn_implementation. config: fields of the model's config, by dotted name. cache_features: compute the outputs of
    frozen parts once. feature_folder: where they are kept, by default in the run; runs that share it share them.
    ema_decay: keep a moving average of the trained weights, which is what is measured and saved."""

    method: str = "full"
    freeze: tuple[str, ...] = ()
    frozen_mode: str = "eval"
    dtype: str = "float32"
    attention: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    cache_features: bool = False
    feature_folder: str | None = None
    ema_decay: float | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured. metrics: names of `weightport evaluate --metric`. samples: how many of the evaluation data,
    all by default. batch_size: of generation. previews: answers shown after each evaluation. generation: settings of
    `generate`, over the model's generation_config.json. rerank: of a model for retrieval, how many of the nearest
    pictures or texts the matching head has its word on; 0: none. early_stopping_patience: evaluations in a row
    without a better figure (`training.metric_for_best_model`) after which the run ends; early_stopping_threshold: by
    how much a figure has to be better."""

    metrics: tuple[str, ...] = ()
    samples: int | None = None
    batch_size: int = 8
    previews: int = 3
    generation: Mapping[str, Any] = field(default_factory=dict)
    rerank: int = 128
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0


@dataclass(frozen=True)
class Published:
    """How the guide itself runs: settings by dotted name, and what is wrong with them."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    mistakes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A published way of fine-tuning. `families` are those it is for, by name, with the settings that are theirs; `*`
    are all others.

    `training` are transformers' TrainingArguments, `lora` peft's LoraConfig, both by their own names.
    """

    name: str
    title: str
    families: Mapping[str, Mapping[str, Any]]
    source: str = ""
    data: DataSettings = field(default_factory=DataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    published: Mapping[str, Published] = field(default_factory=dict)
