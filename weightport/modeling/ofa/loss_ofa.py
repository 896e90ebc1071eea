"""Training loss of OFA: cross entropy with fairseq's label smoothing, adjusted as OFA does."""

from __future__ import annotations

import torch
from torch import nn


def ofa_label_smoothed_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    *,
    pad_token_id: int | None = 1,
    confidence: torch.Tensor | None = None,
    drop_worst_ratio: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    r"""OFA's `adjust_label_smoothed_cross_entropy`, averaged over the target tokens.

    A token's loss is \\((1 - \epsilon - \epsilon_i) nll + \epsilon_i \sum_v -\log p_v\\) with \\(\epsilon_i = \epsilon
    / (V - 1)\\). (`transformers`' `LabelSmoother` spreads \\(\epsilon / V\\) instead.)

    Args:
        logits: [batch, length, V], any floating dtype; computed in float32, or in float64 if they are.
        labels: int64 [batch, length]; -100 and `pad_token_id` are no targets.
        label_smoothing: \\(\epsilon\\).
        pad_token_id: id that is no target, `None` if every id is one.
        confidence: [batch], multiplies a sample's log-probabilities (in OFA's pre-training 2.0 for samples of text,
            images and detection; in VQA the score of the answer).
        drop_worst_ratio: share of the tokens, those with the largest loss, that is left out (noisy captions).
        num_items_in_batch: divisor of the sum instead of the number of target tokens; what `Trainer` counts over all
            the batches of an accumulated step. It counts labels other than -100, so pad labels with -100.

    Returns:
        The loss, a scalar; 0 if there is no target token.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = nn.functional.log_softmax(logits, dim=-1)
    if confidence is not None:
        log_probs = log_probs * confidence.to(log_probs)[:, None, None]

    is_target = labels != -100
    if pad_token_id is not None:
        is_target = is_target & (labels != pad_token_id)
    log_probs, labels = log_probs[is_target], labels[is_target]

    losses = -log_probs.gather(-1, labels[:, None])[:, 0]
    if label_smoothing > 0.0:
        spread = label_smoothing / (log_probs.shape[-1] - 1)
        losses = (1.0 - label_smoothing - spread) * losses - spread * log_probs.sum(dim=-1)

    num_targets = losses.numel()
    if drop_worst_ratio > 0.0:
        losses = losses.topk(int(num_targets * (1.0 - drop_worst_ratio)), largest=False).values
    if num_items_in_batch is None:
        return losses.sum() / max(losses.numel(), 1)
    kept = losses.numel() / max(num_targets, 1)
    return losses.sum() / (torch.as_tensor(num_items_in_batch, device=losses.device) * kept)


__all__ = ["ofa_label_smoothed_loss"]
