"""What a family brings to parity: one table. Arguments, seams, generation settings, and how deep each seam lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import LogitsProcessor, PreTrainedConfig, PreTrainedModel

from weightport.parity.noise import Noise
from weightport.parity.reference import Kind

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Argument:
    """An argument of the original, and what the native model calls it.

    `convert` takes the stored tensor to what the native model expects; `content` is checked before: token ids lie in
    the vocabulary, images have four axes.
    """

    original: str
    native: str
    content: Literal["tokens", "images", "samples"] = "tokens"
    convert: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Seam:
    """A place where the original's values and the native model's can be compared.

    `name` and `module` may hold one `*`, the layer number. `pick` takes what the module returned (or, with
    `side="input"`, its first argument) to the tensor the original would have given: same axes, same order; None where
    the model has no such value. `parts` names the modules that make the value, where they are not those that run
    between the seam before and this one. `within` cuts the picked tensor to what the original has of it, by the
    configuration (a native embedding may have more rows). `also` is the module in models of the family that have no
    `module`.
    """

    name: str
    module: str
    pick: Callable[[Any], torch.Tensor | None] = lambda value: value
    side: Literal["input", "output"] = "output"
    parts: tuple[str, ...] = ()
    within: Callable[[torch.Tensor, PreTrainedConfig], torch.Tensor] | None = None
    also: str = ""

    def layer_of(self, name: str) -> str | None:
        """What `*` stands for in `name`, "" where there is no `*`, None where this is another seam."""
        head, star, tail = self.name.partition("*")
        if not star:
            return "" if name == self.name else None
        layer = name[len(head) : len(name) - len(tail)]
        fits = name.startswith(head) and name.endswith(tail) and layer.isdecimal()
        return layer if fits else None


@dataclass(frozen=True)
class Generation:
    """One call of `generate`, in transformers' terms.

    `settings` are generation settings, `processors` come after `generate`'s own. `log_probabilities` takes logits
    [batch, vocabulary] to what the original calls a token's log-probability. `prompt_length` tokens at the start of
    the native sequences are not in the original's. `returned` hypotheses of each sample are the original's (None: one
    a beam). Settings that are None, or not there, are the converted directory's own.
    """

    settings: Mapping[str, Any]
    beams: int | None = 1
    length_penalty: float | None = 1.0
    returned: int | None = None
    processors: Sequence[LogitsProcessor] = ()
    log_probabilities: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits.log_softmax(-1)
    prompt_length: int = 1


def leading_block(sample: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """Columns of `input_ids` of one sample without padding that a decoder has to read at once.

    Where token types are given, all up to the last one of the first column's type: the prefix that sees itself. All
    places of the image in any case, and one column at least.
    """
    ids, types = sample["input_ids"][0], sample.get("token_type_ids")
    image = getattr(config, "image_token_id", None)
    blocks = [] if types is None else [types[0] == types[0, 0]]
    blocks += [] if image is None else [ids == image]
    return max([1, *(int(block.nonzero().max()) + 1 for block in blocks if bool(block.any()))])


@dataclass(frozen=True)
class Correction:
    """What the original computes and the native class has no setting for, made up for while the model is measured.

    `apply` makes a running model compute it and returns how to undo that, or None where there is nothing to correct.
    `because` says what differs; the report states how much it changes.
    """

    because: str
    apply: Callable[[PreTrainedModel], Callable[[], None] | None]


@dataclass(frozen=True)
class Family:
    """The table of one family.

    `required` names the original arguments that a run of each kind cannot do without, `options` the options it may
    have. `complete` adds native arguments that follow from others (attention masks, the loss's settings).
    `depth(config, seam)` counts the residual blocks before a seam: rounding errors grow with its square root.
    `noise` is what lies between two correct implementations where a reference does not say it; `noise_of` has that of
    seams whose names begin so, where it is another. `kinked(config, seam)`: whether a gradient has passed
    rectifiers. `plain` are configuration values that make a training step reproducible (no dropout). `losses` computes
    further training seams from the model's output, the native arguments and the configuration. `training_loss`
    computes the loss of a training run from these and the run's options, where it is not the model's own (then None).
    `exact_loss` stands in
    for the model's own loss in float64, where transformers rounds logits to float32 first. `casts_to_float32`: the
    native model's own code casts values to float32, which a float64 run leaves out. `prefix` counts the columns that
    a model without an encoder reads at once before it decodes step by step. `correction`: the model is held against
    the original with it.
    """

    name: str
    model_type: str
    auto_class: Any
    arguments: tuple[Argument, ...]
    seams: tuple[Seam, ...]
    required: Mapping[Kind, tuple[str, ...]]
    options: Mapping[Kind, tuple[str, ...]]
    complete: Callable[[Kind, Tensors, Mapping[str, Any], PreTrainedConfig], dict[str, Any]]
    generation: Callable[[Tensors, Mapping[str, Any], PreTrainedConfig], Generation]
    depth: Callable[[PreTrainedConfig, str], int]
    noise: Noise
    noise_of: Mapping[str, Noise] = field(default_factory=dict)
    kinked: Callable[[PreTrainedConfig, str], bool] = lambda config, seam: False
    plain: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Callable[[Any, Mapping[str, Any], PreTrainedConfig], torch.Tensor]] = field(
        default_factory=dict
    )
    training_loss: (
        Callable[[Any, Mapping[str, Any], Mapping[str, Any], PreTrainedConfig], torch.Tensor | None] | None
    ) = None
    exact_loss: Callable[..., torch.Tensor] | None = None
    casts_to_float32: bool = False
    prefix: Callable[[Mapping[str, Any], PreTrainedConfig], int] = leading_block
    correction: Correction | None = None

    def noise_at(self, seam: str) -> Noise:
        """The noise of a seam."""
        return next((noise for start, noise in self.noise_of.items() if seam.startswith(start)), self.noise)


def stack_and_layer(seam: str) -> tuple[str, str]:
    """(`encoder.layers`, `3`) of `encoder.layers.3` and of every seam inside that layer; ("", "") of any other."""
    for place, part in enumerate(parts := seam.split(".")):
        if part.isdecimal() and place:
            return ".".join(parts[:place]), part
    return "", ""
