"""What fine-tuning needs to know of a family: the parts of its model, its prompts, its batches, its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import PreTrainedModel

from weightport.errors import DataError
from weightport.finetuning.data.samples import Objects, Sample
from weightport.finetuning.features.cached_part import CachedPart
from weightport.finetuning.recipes.settings import BatchSettings

Images = Sequence[Image.Image | None] | None
"""The pictures of a batch, or None where their features are at hand."""


@dataclass(frozen=True)
class Parts:
    """The model's parts, which cover it without overlap, and what `--freeze` calls one or several of them.

    prefixes: beginnings of module names by part; a module belongs to the first part that matches. targets: parts by
    name of a freeze target. lora: regular expressions of the modules that LoRA changes by default, by part.
    """

    prefixes: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, tuple[str, ...]]
    lora: Mapping[str, str]

    def part_of(self, name: str) -> str | None:
        """The part that the module or parameter `name` belongs to."""
        for part, prefixes in self.prefixes.items():
            if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
                return part
        return None


@dataclass(frozen=True)
class Answer:
    """A generated answer in words, and the boxes in it where boxes were asked for."""

    text: str
    objects: Objects | None = None


@dataclass(frozen=True)
class Room:
    """Tokens that the model has positions for: of a prompt without its special tokens, and of an answer with them.

    total: columns of `input_ids` that prompt and answer share, special tokens and places of the image included, where
    a decoder reads both in one sequence; None where an encoder reads the prompt.
    """

    prompt: int
    answer: int
    total: int | None = None


class Family(Protocol):
    """One family. `name` is the one that recipes list it by.

    `causal`: a decoder reads image, prompt and answer in one sequence. The answer is then what `generate` returns
    behind the prompt, `questions` pads on the left and `labels` go with `input_ids`, -100 on all but the answer.
    `full_precision` are the modules, by their whole names, that QLoRA leaves as they are. `own_loss` is True when the
    model's loss never counts padding, so that a guide that counts it needs another. `leaves_unused`: a step leaves
    some of the trained parameters without a gradient. `cached` are the beginnings of the model whose output can be
    kept while they are frozen, the longest first.

    A family may also have: `of`, which takes a config.json and gives the stage for its model, where models of the
    family differ; `counts_padding`, that it makes labels of padding itself where `batch.count_padding` asks for it,
    causal or not; `mean_of_batch`, that the model's own loss is the mean of one batch whatever makes a step, so that
    Trainer has to compute it; `text_only`, True where a sample may have no picture; `holds_turns`, which takes the
    processor and says whether its prompts hold the earlier questions and answers of a chat.
    """

    name: str
    causal: bool
    parts: Parts
    full_precision: tuple[str, ...]
    own_loss: bool
    leaves_unused: bool
    cached: tuple[CachedPart, ...]

    def resize(self, processor: Any, config: Any, pixels: int) -> None:
        """Make the processor turn images into squares of `pixels`. Raises RecipeError for a size that cannot be."""

    def room(self, processor: Any, config: Any) -> Room:
        """How long prompts and answers may be."""

    def smooth_labels(self, model: PreTrainedModel, amount: float) -> bool:
        """Set the model's own label smoothing; False when it has none, and the Trainer's is used."""

    def prompt(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        """What the model is asked."""

    def answer(self, processor: Any, batch: BatchSettings, sample: Sample) -> str:
        """What it should say. Raises DataError when that is longer than `max_target_length` and cannot be cut."""

    def questions(
        self, processor: Any, batch: BatchSettings, prompts: Sequence[str], images: Images
    ) -> dict[str, torch.Tensor]:
        """The model's inputs without an answer, padded. `images` is None where features stand for them: the text is
        then that of samples with an image."""

    def encode(
        self,
        processor: Any,
        config: Any,
        batch: BatchSettings,
        prompts: Sequence[str],
        answers: Sequence[str],
        images: Images,
    ) -> dict[str, torch.Tensor]:
        """`questions`, `labels` int64 [batch, length] with -100 as padding unless it counts, `decoder_input_ids`; of a
        causal family the sequences of prompt and answer, with `attention_mask`, and `labels` of the same columns."""

    def read(self, processor: Any, batch: BatchSettings, ids: torch.Tensor, size: tuple[int, int] | None) -> Answer:
        """The answer in generated ids [length], without the prompt's, about an image of `size` (width, height)."""


def prompt_of(family: Family, processor: Any, batch: BatchSettings, sample: Sample) -> str:
    """What the model is asked. Raises DataError, naming the sample's place, for one that the family's prompts cannot
    hold: text alone, or a chat of several turns."""
    if sample.picture is None and not getattr(family, "text_only", False):
        raise DataError(f"{sample.place}: a sample without a picture, and {family.name} is asked about pictures.")
    holds_turns = getattr(family, "holds_turns", None)
    if sample.history and not (holds_turns is not None and holds_turns(processor)):
        raise DataError(
            f"{sample.place}: an answer after {len(sample.history)} others of a chat, and the prompts of this "
            f"{family.name} model hold one question. Ask each question by itself with data.turns=alone."
        )
    return family.prompt(processor, batch, sample)


def shortened(tokenizer: Any, text: str, tokens: int | None) -> str:
    """`text` cut to `tokens` tokens, without special tokens; as it is when it has no more."""
    if tokens is None:
        return text
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]


def filled(template: str, sample: Sample) -> str:
    """The prompt template with the sample's question in it."""
    return template.replace("{prefix}", sample.prefix)


def shifted(labels: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """Decoder inputs for `labels` [batch, length]: the start token, then all labels but the last; -100 as padding."""
    before = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return before.masked_fill(before == -100, pad)


def without_marks(tokenizer: Any, text: str) -> str:
    """Decoded text whose special tokens say where boxes are, without those that say where it begins and ends."""
    for mark in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        text = text.replace(mark, "")
    return text.strip()
