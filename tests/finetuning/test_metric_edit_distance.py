"""ANLS, Levenshtein similarity and exact match against the values of DocVQA's task page and the Florence-2 guide."""

from __future__ import annotations

import pytest
from metric_cases import answered

from weightport.finetuning.metrics import METRICS

COLA = ("Coca Cola", "Coca Cola Company")


def value(metric: str, *pairs: tuple) -> float:
    return METRICS[metric].score(answered(*pairs)).value


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("The Coca", 0.00), ("CocaCola", 0.89), ("Coca cola", 1.00), ("Cola", 0.00), ("Cat", 0.00)],
)
def test_anls_gives_the_scores_of_the_challenges_own_table(answer, expected):
    # The example of https://rrc.cvc.uab.es/?ch=11&com=tasks, rounded there to two places.
    assert round(value("anls", (answer, COLA)), 2) == expected


@pytest.mark.parametrize(
    ("answer", "expected"), [("The Coca", 0.44), ("CocaCola", 0.89), ("Cola", 0.44), ("Cat", 0.22)]
)
def test_levenshtein_gives_the_similarities_of_the_challenges_table(answer, expected):
    assert round(value("levenshtein", (answer.lower(), [reference.lower() for reference in COLA])), 2) == expected


def test_a_similarity_of_exactly_one_half_counts_for_docvqa_and_not_for_the_guide():
    # The challenge's script drops what is "< 0.5"; the guide keeps distances "< 0.5".
    assert value("anls", ("ab", "ac")) == 0.5
    assert value("anls-florence2", ("ab", "ac")) == 0.0


def test_anls_collapses_white_space_and_ignores_case_but_keeps_the_final_period():
    assert value("anls", ("  The\n BLUE  one ", "the blue one")) == 1.0
    assert value("anls", ("yes.", "yes")) == pytest.approx(1 - 1 / 4)


def test_anls_divides_by_the_length_as_answered_like_the_challenges_script():
    # One wrong character of three; the script takes the longer raw length, 5 with the spaces.
    assert value("anls", (" abd ", "abc")) == pytest.approx(1 - 1 / 5)


def test_the_guides_anls_removes_one_final_period_and_scores_an_empty_answer_zero():
    assert value("anls-florence2", ("Yes.", "yes")) == 1.0
    assert value("anls-florence2", ("yes", "YES.")) == 1.0
    assert value("anls-florence2", ("yes..", "yes")) == pytest.approx(1 - 1 / 4)
    assert value("anls-florence2", ("", ".")) == 0.0


def test_the_guides_anls_does_not_strip_white_space():
    assert value("anls-florence2", ("yes ", "yes")) == pytest.approx(1 - 1 / 4)


def test_levenshtein_counts_characters_and_not_bytes():
    assert value("levenshtein", ("红色连衣裙", "红色长裙")) == pytest.approx(1 - 2 / 5)
    assert value("levenshtein", ("naïve", "naive")) == pytest.approx(1 - 1 / 5)


def test_levenshtein_of_kitten_and_sitting():
    # The textbook example: three edits of seven characters.
    assert value("levenshtein", ("kitten", "sitting")) == pytest.approx(1 - 3 / 7)


def test_exact_match_strips_and_does_nothing_else():
    pairs = [(" 42\n", "42"), ("Yes", "yes"), ("a  b", "a b"), ("no", ("yes", "no"))]
    scores = METRICS["exact-match"].score(answered(*pairs))
    assert scores.per_sample == [1.0, 0.0, 0.0, 1.0]
    assert scores.value == 0.5


@pytest.mark.parametrize("metric", ["anls", "anls-florence2", "levenshtein", "exact-match"])
def test_an_empty_answer_scores_zero(metric):
    assert value(metric, ("", "yes")) == 0.0
