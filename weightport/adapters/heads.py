"""A head of its own: what a tied model needs before an adapter on the head is merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def untie_head(model: PreTrainedModel) -> PreTrainedModel:
    """Give `model` a copy of its token embedding as the head, in place; `save_pretrained` then keeps both matrices.

    No number changes. A head that is untied already is left as it is.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(
            embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad
        )
    model.config.tie_word_embeddings = False
    # What save_pretrained and a later loading consult.
    tied = getattr(model, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        tied.pop("lm_head.weight", None)
    return model
