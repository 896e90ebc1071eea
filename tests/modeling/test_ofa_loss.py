"""OFA's training loss against its formula, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from weightport.modeling.ofa.loss_ofa import ofa_label_smoothed_loss

LOGITS = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([[4, 2, 1], [5, -100, 2]])
TARGETS = [(0, 0), (0, 1), (1, 0), (1, 2)]


def token_loss(sample: int, position: int, epsilon: float, confidence: float = 1.0) -> float:
    scores = LOGITS[sample, position].tolist()
    normalizer = math.log(sum(math.exp(score) for score in scores))
    log_probs = [(score - normalizer) * confidence for score in scores]
    spread = epsilon / (len(scores) - 1)
    return -(1 - epsilon - spread) * log_probs[LABELS[sample, position]] - spread * sum(log_probs)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_loss_is_the_mean_of_the_formula_over_what_is_no_padding(epsilon):
    expected = sum(token_loss(*target, epsilon) for target in TARGETS) / 4
    assert ofa_label_smoothed_loss(LOGITS, LABELS, epsilon).item() == pytest.approx(expected, abs=1e-12)


def test_smoothing_differs_from_the_librarys_own():
    uniform = -LOGITS.log_softmax(-1).mean(-1)
    library = sum(0.9 * token_loss(*target, 0.0) + 0.1 * uniform[target].item() for target in TARGETS) / 4
    assert abs(ofa_label_smoothed_loss(LOGITS, LABELS, 0.1).item() - library) > 1e-3


def test_confidence_multiplies_the_log_probabilities_of_its_sample():
    expected = sum(token_loss(*target, 0.1, (2.0, 0.5)[target[0]]) for target in TARGETS) / 4
    loss = ofa_label_smoothed_loss(LOGITS, LABELS, 0.1, confidence=torch.tensor([2.0, 0.5]))
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_the_worst_tokens_are_left_out_of_sum_and_count():
    kept = sorted(token_loss(*target, 0.1) for target in TARGETS)[:3]
    loss = ofa_label_smoothed_loss(LOGITS, LABELS, 0.1, drop_worst_ratio=0.25)
    assert loss.item() == pytest.approx(sum(kept) / 3, abs=1e-12)


@pytest.mark.parametrize("count", [40, torch.tensor(40)])
def test_the_trainers_count_divides_the_sum(count):
    expected = sum(token_loss(*target, 0.1) for target in TARGETS) / 40
    loss = ofa_label_smoothed_loss(LOGITS, LABELS, 0.1, num_items_in_batch=count)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_batch_without_targets_has_no_loss():
    assert ofa_label_smoothed_loss(LOGITS, torch.full_like(LABELS, -100), 0.1).item() == 0.0


def test_half_precision_logits_are_summed_in_float32():
    assert ofa_label_smoothed_loss(LOGITS.half(), LABELS, 0.1).dtype == torch.float32


def test_a_model_without_padding_id_counts_every_label():
    labels = torch.tensor([[4, 2, 1], [5, 3, 2]])
    expected = -LOGITS.log_softmax(-1).gather(-1, labels[..., None]).mean()
    assert ofa_label_smoothed_loss(LOGITS, labels, pad_token_id=None).item() == pytest.approx(expected.item())
