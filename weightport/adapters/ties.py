"""Bases whose head is their token embedding: one matrix in the file, two places in the model.

An adapter on one of the two places changes that place only. Merged into the one matrix it would change both, so either
the two are written apart, which changes no number of the model with the adapter, or the merge is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightport.checkpoints import TensorRef
from weightport.checkpoints.lazy_tensors import same_bits

_EMBEDDINGS = ("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output_projection", "cls.predictions.decoder")
_LANGUAGE_MODELS = (
    "ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "ForSeq2SeqLM",
    "ForImageTextToText", "ForVision2Seq",
)  # fmt: skip

# What else transformers ties under the same setting, and so must be written when it is turned off: name → its source.
_EMBEDDED_APART = {f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")}
_OUTPUT_BIAS = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
_ALSO_TIED: Mapping[str, Mapping[str, str]] = {
    "bart": _EMBEDDED_APART,
    "mbart": _EMBEDDED_APART,
    "plbart": _EMBEDDED_APART,
    "m2m_100": _EMBEDDED_APART,
    "pegasus": _EMBEDDED_APART,
    "marian": _EMBEDDED_APART,
    "blenderbot": _EMBEDDED_APART,
    "bert": _OUTPUT_BIAS,
    "electra": _OUTPUT_BIAS,
    "ofa": {"model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight"},
}

# T5's configuration reads tie_word_embeddings as "scale the decoder's output", and its loader keeps a head that the
# file holds beside the embedding: the setting stays as it is.
_SETTING_MEANS_ELSE = frozenset({"t5", "mt5", "umt5", "longt5", "pix2struct", "switch_transformers"})


@dataclass(frozen=True)
class TiedHead:
    """The one matrix of a tied model: `embedding` is its name in the base, `head` the name that an own head has.

    `aliases`: what must be written beside an own head, by its source. `sets_config`: whether the tie is undone in
    config.json too.
    """

    embedding: str
    head: str
    aliases: Mapping[str, str]
    sets_config: bool

    @property
    def places(self) -> tuple[str, ...]:
        """Further names of the matrix in the running model: of `shared`, the encoder's and the decoder's embedding."""
        start = self.embedding.removesuffix("shared.weight")
        if start == self.embedding:
            return ()
        return (f"{start}encoder.embed_tokens.weight", f"{start}decoder.embed_tokens.weight")


def tied_head(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> TiedHead | None:
    """How the base ties its head to its embedding; None for a base without a head, or with one of its own."""
    architectures = [name for name in config.get("architectures") or () if isinstance(name, str)]
    if architectures and not any(name.endswith(_LANGUAGE_MODELS) for name in architectures):
        return None
    if config.get("tie_word_embeddings") is False and config.get("model_type") not in _SETTING_MEANS_ELSE:
        return None
    embedding = token_embedding(tensors)
    if embedding is None:
        return None
    head = next((name for name in tensors if _is_head(name)), None)
    if head is not None:
        same = tensors[head].storage == tensors[embedding].storage or (
            tensors[head].shape == tensors[embedding].shape
            and same_bits(tensors[head].read(), tensors[embedding].read())
        )
        if not same:
            return None
    model_type = str(config.get("model_type"))
    own = "cls.predictions.decoder.weight" if "cls.predictions.bias" in tensors else "lm_head.weight"
    own = "embed_out.weight" if model_type == "gpt_neox" else own
    aliases = {name: source for name, source in _ALSO_TIED.get(model_type, {}).items() if source in tensors}
    return TiedHead(
        embedding,
        head or own,
        {name: source for name, source in aliases.items() if name not in tensors},
        model_type not in _SETTING_MEANS_ELSE,
    )


def _is_head(name: str) -> bool:
    module = name.removesuffix(".weight")
    return module != name and any(module == head or module.endswith(f".{head}") for head in _HEADS)


def token_embedding(tensors: Mapping[str, TensorRef]) -> str | None:
    """The token embedding that a head may be: of several the one with most rows, and the decoder's."""
    found = [
        name
        for name, ref in tensors.items()
        if len(ref.shape) == 2 and any(f".{name}".endswith(f".{leaf}.weight") for leaf in _EMBEDDINGS)
    ]
    return max(found, key=lambda name: (tensors[name].shape[0], "decoder" in name), default=None)


def is_head_module(module: str) -> bool:
    """Whether `module` is named as a model's head is."""
    return _is_head(f"{module}.weight")
