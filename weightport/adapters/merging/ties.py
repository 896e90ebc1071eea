"""Bases whose head is their token embedding: one matrix in the file, two places in the model.

An adapter on one of the two places changes that place only. Merged into the one matrix it would change both, so either
the two are written apart, which changes no number of the model with the adapter, or the merge is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightport.checkpoints import TensorRef
from weightport.checkpoints.lazy_tensors import same_bits
from weightport.converters.name_spaces import NameSpace

# Last words of names that may be a tied place; which are, the running model says.
_EMBEDDINGS = ("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output_projection", "cls.predictions.decoder")

# T5's configuration reads tie_word_embeddings as "scale the decoder's output", and its loader keeps a head that the
# file holds beside the embedding: the setting stays as it is.
_SETTING_MEANS_ELSE = frozenset({"t5", "mt5", "umt5", "longt5", "pix2struct", "switch_transformers"})


@dataclass(frozen=True)
class TiedHead:
    """The one matrix of a tied model: `embedding` is its name in the base, `head` the name that an own head has.

    `running`: what the running model calls the head. `aliases`: the model's other tied places by the names that they
    have when they are written apart, to the stored tensors that they are. `sets_config`: whether the tie is undone in
    config.json too, so that all of them must be written. `rows_together`: whether peft trains single rows in all
    places at once.
    """

    embedding: str
    head: str
    running: str
    aliases: Mapping[str, str]
    sets_config: bool
    rows_together: bool = True

    @property
    def apart(self) -> Mapping[str, str]:
        """By the name of a place written apart, the stored tensor that it is in the base."""
        return {**self.aliases, self.head: self.embedding}


def tied_head(space: NameSpace, tensors: Mapping[str, TensorRef], model_type: str) -> TiedHead | None:
    """How the base ties its head to its embedding; None for a base without a head, or with one of its own."""
    running = space.head
    if running is None:
        return None
    source = space.tied.get(running) or space.bound.get(running)
    pieces = space.pieces(source) if source is not None else ()
    if source is None or len(pieces) != 1:
        return None
    embedding = pieces[0].stored
    if running in space.tied:
        head = space.stored_name(running)
    else:
        # Both places are stored: they are one while they hold the same.
        head = space.pieces(running)[0].stored
        if tensors[head].shape != tensors[embedding].shape or (
            tensors[head].storage != tensors[embedding].storage
            and not same_bits(tensors[head].read(), tensors[embedding].read())
        ):
            return None
    aliases = {
        space.stored_name(name): space.pieces(name)[0].stored
        for name in space.tied
        if name != running and len(space.pieces(name)) == 1
    }
    if embedding == head:
        # Only the head is stored: the embedding is what would be written apart.
        head, running = space.stored_name(source), source
    return TiedHead(embedding, head, running, aliases, model_type not in _SETTING_MEANS_ELSE, space.ties_words)


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
    return any(module == head or module.endswith(f".{head}") for head in _HEADS)
