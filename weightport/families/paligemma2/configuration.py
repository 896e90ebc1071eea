"""The native configuration of a big_vision checkpoint: from shapes, and what these do not tell from the variant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightport.checkpoints import TensorRef
from weightport.errors import ConfigurationError, UsageError
from weightport.families.paligemma2.layouts import Towers
from weightport.families.paligemma2.options import PaliGemmaOptions
from weightport.families.paligemma2.rules import EMBEDDING
from weightport.families.paligemma2.variants import (
    ATTENTION_SOFTCAP,
    TextShape,
    Variant,
    variant_named,
    variant_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

POSITIONS = 8192
"""Of the text model; rotary, so that no tensor tells."""
PAD, EOS, BOS = 0, 1, 2
EPSILON = 1e-6
"""Of every norm of both towers."""
MULTIPLE = 64
"""Rows of a padded embedding are a multiple of it."""


@dataclass(frozen=True)
class Sizes:
    """What shapes tell. `positions` image tokens, in a square; `generation` is Gemma's."""

    text: TextShape
    generation: int
    rows: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    patch: int
    positions: int

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return math.isqrt(self.positions) * self.patch


@dataclass(frozen=True)
class Settings:
    """What no shape tells. `query_scalar`: attention scores are divided by its square root. Softcaps and the window
    are None where there is none. `notes` are for the user."""

    query_scalar: int
    attention_softcap: float | None
    final_softcap: float | None
    sliding_window: int | None
    variant: str | None
    notes: tuple[str, ...]


def read_sizes(tensors: Mapping[str, TensorRef], towers: Towers) -> Sizes:
    """The model's sizes. Raises ConfigurationError for what is no PaliGemma, naming the tensor."""
    shapes = _Shapes(tensors)
    rows, width = shapes.of(EMBEDDING, 2)
    if "llm/layers/attn/qkv_einsum/w" in tensors or "llm/layers/0/attn/qkv_einsum/w" in tensors:
        raise ConfigurationError(
            "llm/layers/attn/qkv_einsum/w joins query, key and value, as Gemma models with as many key heads as heads "
            "have them. No released PaliGemma does, and this one cannot be converted."
        )
    text_layers, query = shapes.of_layers("llm/layers/", "attn/q_einsum/w", 3, towers.text_stacked)
    _, keys = shapes.of_layers("llm/layers/", "attn/kv_einsum/w", 4, towers.text_stacked)
    _, mlp = shapes.of_layers("llm/layers/", "mlp/linear", 2, towers.text_stacked)
    norm = "llm/layers/post_ffw_norm/scale" if towers.text_stacked else "llm/layers/0/post_ffw_norm/scale"

    block = "img/Transformer/encoderblock" + ("/" if towers.vision_stacked else "_")
    vision_layers, attention = shapes.of_layers(
        block, "MultiHeadDotProductAttention_0/query/kernel", 3, towers.vision_stacked
    )
    _, hidden = shapes.of_layers(block, "MlpBlock_0/Dense_0/kernel", 2, towers.vision_stacked)
    height, patch, channels, vision_width = shapes.of("img/embedding/kernel", 4)
    _, positions, _ = shapes.of("img/pos_embedding", 3)
    if (height, channels) != (patch, 3):
        raise ConfigurationError(
            f"img/embedding/kernel is {[height, patch, channels, vision_width]}; expected square patches of 3 colours."
        )
    if math.isqrt(positions) ** 2 != positions:
        raise ConfigurationError(f"img/pos_embedding has {positions} positions, which are no square of patches.")
    return Sizes(
        text=TextShape(width, text_layers, query[0], keys[1], query[2], mlp[0]),
        generation=2 if norm in tensors else 1,
        rows=rows,
        vision_width=vision_width,
        vision_layers=vision_layers,
        vision_heads=attention[1],
        vision_mlp=hidden[1],
        patch=patch,
        positions=positions,
    )


@dataclass(frozen=True)
class _Shapes:
    """Shapes of tensors that must be there."""

    tensors: Mapping[str, TensorRef]

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of `name`, which has so many axes. Raises ConfigurationError."""
        if name not in self.tensors:
            raise ConfigurationError(
                f"The checkpoint lacks {name}, so the model's sizes cannot be told. `weightport inspect` lists what "
                "is in it."
            )
        shape = self.tensors[name].shape
        if len(shape) != axes or 0 in shape:
            raise ConfigurationError(f"{name} has the shape {list(shape)}; expected {axes} axes, none of them empty.")
        return shape

    def of_layers(self, before: str, name: str, axes: int, stacked: bool) -> tuple[int, tuple[int, ...]]:
        """(number of layers, shape in one layer) of a layer's tensor, which has so many axes without the layers'."""
        if stacked:
            layers, *rest = self.of(before + name, axes + 1)
            return layers, tuple(rest)
        shape = self.of(f"{before}0/{name}", axes)
        count = 0
        while f"{before}{count}/{name}" in self.tensors:
            count += 1
        return count, shape


def settings_of(sizes: Sizes, options: PaliGemmaOptions) -> Settings:
    """What the shapes leave open: of the variant, and of the options where these say otherwise.

    Raises ConfigurationError for a variant that contradicts the shapes, UsageError for options that mean nothing for
    the model or are no numbers.
    """
    variant = _variant(sizes, options.variant)
    text, name, notes = sizes.text, variant.name if variant else None, []
    if sizes.generation == 1:
        _refuse_for_gemma_1(options)
        return Settings(text.head_width, None, None, None, name, ())
    scale = options.query_scale or (variant.query_scale if variant else "head")
    known = {"head": text.head_width, "width": text.width // text.heads}
    scalar = known.get(scale) or _positive("--query-scale", scale, whole=True, words="head, width or a whole number")
    if variant is None and options.query_scale is None:
        notes.append(
            "The text model is of no released size: attention is taken to be scaled by a head's width. "
            "--query-scale or --variant say otherwise."
        )
    softcap = options.attention_softcap
    return Settings(
        query_scalar=int(scalar),
        attention_softcap=ATTENTION_SOFTCAP if softcap is None else _optional("--attention-softcap", softcap),
        final_softcap=_optional("--final-softcap", options.final_softcap),
        sliding_window=_window(options.sliding_window),
        variant=name,
        notes=tuple(notes),
    )


def _variant(sizes: Sizes, name: str | None) -> Variant | None:
    found = variant_of(sizes.text, sizes.generation)
    if name is None or (found is not None and found.name == name):
        return found
    wanted = variant_named(name)
    said = f"{found.name}, of " if found else "a text model of "
    raise ConfigurationError(
        f"--variant {name} has a Gemma {wanted.generation} of {_words(wanted.shape)}; the checkpoint is {said}"
        f"Gemma {sizes.generation} with {_words(sizes.text)}.\n  Leave --variant out, or convert the file that you "
        "mean."
    )


def _words(shape: TextShape) -> str:
    return (
        f"width {shape.width}, {shape.layers} layers, {shape.heads} heads of {shape.head_width}, {shape.key_heads} "
        f"key heads, MLP {shape.mlp}"
    )


def _refuse_for_gemma_1(options: PaliGemmaOptions) -> None:
    given = {
        "--query-scale": options.query_scale not in (None, "head"),
        "--attention-softcap": options.attention_softcap not in (None, "none"),
        "--final-softcap": options.final_softcap != "none",
        "--sliding-window": options.sliding_window != "none",
    }
    wrong = [flag for flag, said in given.items() if said]
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: this checkpoint is a PaliGemma 1, whose text model has none of it.")


def _optional(flag: str, text: str) -> float | None:
    return None if text == "none" else _positive(flag, text, whole=False, words="none or a number")


def _window(text: str) -> int | None:
    return None if text == "none" else int(_positive("--sliding-window", text, whole=True, words="none or a number"))


def _positive(flag: str, text: str, *, whole: bool, words: str) -> float:
    try:
        value: float = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{flag} is {words} above 0, not {text!r}.")
    return value


def native_config(sizes: Sizes, settings: Settings, *, pad_vocab: bool) -> PreTrainedConfig:
    """The configuration of PaliGemmaForConditionalGeneration. Raises ConfigurationError for sizes that transformers
    does not take."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PaliGemmaConfig

    special: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    rows = _padded(sizes.rows) if pad_vocab else sizes.rows
    try:
        return PaliGemmaConfig(
            vision_config=_vision(sizes),
            text_config=_gemma_1(sizes, rows) if sizes.generation == 1 else _gemma_2(sizes, settings, rows),
            image_token_index=sizes.rows,
            projection_dim=sizes.text.width,
            hidden_size=sizes.text.width,
            vocab_size=rows,
            tie_word_embeddings=True,
            **special,
        )
    except (ValueError, StrictDataclassError) as error:
        raise ConfigurationError(f"transformers has no model of these sizes: {error}") from error


def _padded(rows: int) -> int:
    """Rows with one for <image>, and up to a multiple."""
    return -(-(rows + 1) // MULTIPLE) * MULTIPLE


def _vision(sizes: Sizes) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.vision_mlp,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "num_channels": 3,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": EPSILON,
        "attention_dropout": 0.0,
        # Left out, transformers builds the pooling head, whose weights no PaliGemma has.
        "vision_use_head": False,
    }


def _text(sizes: Sizes, rows: int) -> dict[str, Any]:
    text = sizes.text
    return {
        "vocab_size": rows,
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.key_heads,
        "head_dim": text.head_width,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": EPSILON,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
    }


def _gemma_1(sizes: Sizes, rows: int) -> dict[str, Any]:
    return {**_text(sizes, rows), "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}


def _gemma_2(sizes: Sizes, settings: Settings, rows: int) -> dict[str, Any]:
    window: dict[str, Any] = {"sliding_window": settings.sliding_window}
    if settings.sliding_window is None:
        # transformers makes a mask for the window even where no layer uses it, and fails where it is None.
        window = {"sliding_window": WINDOW, "layer_types": ["full_attention"] * sizes.text.layers}
    return {
        **_text(sizes, rows),
        **window,
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": settings.query_scalar,
        "attn_logit_softcapping": settings.attention_softcap,
        "final_logit_softcapping": settings.final_softcap,
    }


WINDOW = 4096
"""Gemma 2's, of which the original's PaliGemma makes no use."""
