"""BLEU, ROUGE-L and CIDEr-D against documented figures and those of COCO's caption evaluation.

Figures marked "pycocoevalcap" were computed with pycocoevalcap 1.2: its cider_scorer.py, its rouge.py, and Stanford's
PTBTokenizer of CoreNLP 3.4.1 that it ships.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from metric_cases import answered

from weightport.errors import DataError
from weightport.finetuning.metrics import METRICS
from weightport.finetuning.metrics.cider import cider_d
from weightport.finetuning.metrics.segmentation import words, words_and_characters

BITES = [
    ("The dog bit the man.", ("The dog bit the man.", "The dog had bit the man.")),
    ("It wasn't surprising.", ("It was not unexpected.", "No one was surprised.")),
    ("The man had just bitten him.", ("The man bit him first.", "The man had bitten the dog.")),
]

ENGLISH = [
    (
        "a man riding a wave on a surfboard",
        (
            "A man riding a wave on top of a surfboard.",
            "A surfer rides a large wave in the ocean.",
            "The man isn't falling off his board.",
        ),
    ),
    (
        "two dogs play with a ball in the park",
        (
            "Two dogs play with a red ball.",
            "A black dog and a white dog are playing in the park.",
            "The dogs' ball is red.",
            "Dogs run on the grass.",
        ),
    ),
    ("a plate of food", ("A plate of food with broccoli and rice.", "The table has a white plate on it.")),
    ("", ("A red double-decker bus drives down the street.", "A bus.")),
    ("cat cat cat cat cat", ("A cat sits on a laptop.", "The cat is lying on a computer keyboard.")),
    ("a train", ("A train.",)),
]

CHINESE = [
    ("一件红色的连衣裙", ("红色连衣裙，优雅大方！", "一件红色的长款连衣裙", "修身显瘦的红裙子")),
    ("纯棉T恤男短袖", ("纯棉T恤男士短袖", "夏季男装短袖T恤", "男士纯棉圆领T恤，3件装")),
    ("新款手机壳", ("新款iPhone13手机壳", "透明防摔手机壳")),
    ("可爱的小猫玩具", ("可爱猫咪毛绒玩具", "小猫咪玩偶")),
]


def test_bleu_gives_the_figures_of_sacrebleus_documentation():
    # README of sacrebleu 2.6 (48.53, brevity penalty 0.943) and its test_bleu.py, test_max_ngram_order.
    scores = METRICS["bleu-4"].score(answered(*BITES))
    assert round(scores.value, 2) == 48.53
    assert {name: round(value, 2) for name, value in scores.details.items()} == {
        "bleu-1": 77.65,
        "bleu-2": 60.50,
        "bleu-3": 53.93,
        "bleu-brevity-penalty": 0.94,
    }


def test_bleu_takes_samples_with_different_numbers_of_references():
    # README of sacrebleu 2.6, "Variable Number of References".
    fewer = [(BITES[0][0], BITES[0][1][1:]), *BITES[1:]]
    assert round(METRICS["bleu-4"].score(answered(*fewer)).value, 2) == 29.44


def test_bleu_cuts_chinese_into_characters():
    # By hand: 4 of 5 characters, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples: (4/5 * 3/4 * 2/3 * 1/2) ** (1/4).
    assert METRICS["bleu-4"].score(answered(("一件红裙子", "一件红裙"))).value == pytest.approx(100 * 0.2**0.25)


def test_bleu_of_empty_answers_is_zero():
    assert METRICS["bleu-4"].score(answered(("", "a dog"), ("", "a cat"))).value == 0.0


def test_rouge_l_is_that_of_cocos_caption_evaluation():
    # pycocoevalcap, rouge.py
    expected = [0.8714285714285713, 0.7672955974842767, 0.6288659793814433, 0.0, 0.1788856304985337, 1.0]
    assert METRICS["rouge-l"].score(answered(*ENGLISH)).per_sample == pytest.approx(expected, abs=1e-12)
    expected = [0.8714285714285713, 0.9222462203023757, 0.8944281524926685, 0.6587473002159828]
    assert METRICS["rouge-l"].score(answered(*CHINESE)).per_sample == pytest.approx(expected, abs=1e-12)


def test_rouge_l_f1_is_that_of_the_rouge_paper():
    # Lin 2004, section 3.1: "police killed the gunman" against "police kill the gunman" and "the gunman kill police".
    for answer, expected in (("police kill the gunman", 3 / 4), ("the gunman kill police", 2 / 4)):
        scores = METRICS["rouge-l"].score(answered((answer, "police killed the gunman")))
        assert scores.details["rouge-l-f1"] == pytest.approx(expected)


def test_cider_d_of_english_is_that_of_pycocoevalcap():
    # pycocoevalcap, cider_scorer.py and PTBTokenizer
    expected = [2.4745920280706826, 2.05550716420331, 2.6703414880873613, 0.0, 0.2486572743163107, 5.0]
    scores = METRICS["cider-d"].score(answered(*ENGLISH))
    assert scores.per_sample == pytest.approx(expected, abs=1e-12)
    assert scores.value == pytest.approx(2.074849659112944, abs=1e-12)


def test_cider_d_of_chinese_characters_is_that_of_pycocoevalcap():
    expected = [3.3388029400595283, 3.5894150276539594, 3.730393222610587, 2.0450870509159054]
    assert METRICS["cider-d"].score(answered(*CHINESE)).per_sample == pytest.approx(expected, abs=1e-12)


def test_cider_d_of_chinese_words_is_that_of_pycocoevalcap():
    # With the words of jieba 0.42.1
    expected = [2.1455144918746316, 1.5974048417091626, 0.7668965020211316, 0.35586684020551546]
    assert METRICS["cider-d-words"].score(answered(*CHINESE)).per_sample == pytest.approx(expected, abs=1e-12)


def test_cider_d_reaches_ten_on_its_only_reference_and_less_where_n_grams_are_missing():
    four_words = answered(("red dogs run fast",) * 2, ("blue cats sleep well",) * 2)
    assert METRICS["cider-d"].score(four_words).per_sample == pytest.approx([10.0, 10.0])
    # Two words have neither triples nor quadruples: half of the four cosines.
    two_words = answered(("red dogs",) * 2, ("blue cats",) * 2)
    assert METRICS["cider-d"].score(two_words).per_sample == pytest.approx([5.0, 5.0])


def test_cider_d_by_hand():
    # Two pictures: log 2 for a word of one of them, 0 for "a". "a dog" equals its reference in words and pairs and has
    # nothing longer: 2 of 4 cosines. "a bird" and "a cat" have no telling word in common.
    scores = cider_d([["a", "dog"], ["a", "bird"]], [[["a", "dog"]], [["a", "cat"]]], ["1", "2"])
    assert scores == pytest.approx(np.array([5.0, 0.0]))


def test_cider_d_does_not_change_when_a_picture_is_asked_about_twice():
    answers = [["a", "dog", "runs"], ["a", "cat", "sits"], ["the", "bird", "sings"]]
    references = [[answer] for answer in answers]
    once = cider_d(answers, references, ["1", "2", "3"])
    twice = cider_d([*answers, answers[0]], [*references, references[0]], ["1", "2", "3", "1"])
    assert twice == pytest.approx(np.array([*once, once[0]]))


def test_cider_d_knows_a_picture_by_its_key():
    once = METRICS["cider-d"].score(answered(*CHINESE))
    again = replace(answered(*CHINESE)[0], place="val.jsonl, line 5")
    assert METRICS["cider-d"].score([*answered(*CHINESE), again]).per_sample == pytest.approx(
        [*once.per_sample, once.per_sample[0]]
    )


@pytest.mark.parametrize("answer", [[], ["dog"], ["unknown", "words", "only", "here", "now"]])
def test_cider_d_of_an_answer_without_any_common_word_is_zero(answer):
    assert cider_d([answer, ["cat"]], [[["a", "bus"]], [["a", "cat"]]], ["1", "2"])[0] == 0.0


def test_cider_d_refuses_a_single_picture_instead_of_scoring_it_zero():
    with pytest.raises(DataError, match="single picture"):
        METRICS["cider-d"].score(answered(("a dog", "a dog")))


def test_cider_d_refuses_references_that_are_the_same_for_every_picture():
    with pytest.raises(DataError, match="every n-gram of the references describes every picture"):
        METRICS["cider-d"].score(answered(("a dog", "a dog"), ("a dog", "a dog")))


PTB = {
    # Output of Stanford's PTBTokenizer (CoreNLP 3.4.1, -preserveLines -lowerCase) less COCO's list of punctuation.
    "Two dogs, one black and one white, aren't playing with the boy's ball!": (
        "two dogs one black and one white are n't playing with the boy 's ball"
    ),
    "It's a black-and-white photo of a 1950's car (parked near St. Mary's church).": (
        "it 's a black-and-white photo of a 1950 's car parked near st. mary 's church"
    ),
    "A man says \"hello\" to friends; they're at McDonald's.": "a man says hello to friends they 're at mcdonald 's",
    "3,000 people & 20% more: $5.50 each... isn't it?": "3,000 people & 20 % more $ 5.50 each is n't it",
    "The U.S. flag flies at 10:30 a.m. on a T-shirt -- nice": "the u.s. flag flies at 10:30 a.m. on a t-shirt nice",
    "Café au lait in a naïve façade, 3.5 kg of jalapeños": "café au lait in a naïve façade 3.5 kg of jalapeños",
    "She cannot go, I'm gonna wait; we'll see what he'd've done": (
        "she can not go i 'm gon na wait we 'll see what he 'd 've done"
    ),
    "an 8-year-old's #1 cake @ home": "an 8-year-old 's # 1 cake @ home",
    "stop sign.A car passes.": "stop sign.a car passes",
    "half 1/2 cup of sugar_free coffee": "half 1/2 cup of sugar_free coffee",
}


@pytest.mark.parametrize("sentence", PTB)
def test_english_words_are_those_of_cocos_tokenizer(sentence):
    assert " ".join(words_and_characters(sentence)) == PTB[sentence]


def test_chinese_is_cut_into_characters_or_words_and_its_punctuation_removed():
    sentence = "新款iPhone13手机，纯棉T恤！¥39.9"
    assert " ".join(words_and_characters(sentence)) == "新 款 iphone13 手 机 纯 棉 t 恤 ¥ 39.9"
    assert " ".join(words(sentence)) == "新款 iphone13 手机 纯棉 t恤 ¥ 39.9"


def test_a_typographic_apostrophe_is_an_apostrophe():
    assert words_and_characters("The dog’s ball isn’t red") == ["the", "dog", "'s", "ball", "is", "n't", "red"]


def test_words_of_scripts_with_combining_marks_stay_whole():
    assert words_and_characters("हिन्दी में, 한국어!") == ["हिन्दी", "में", "한국어"]


@pytest.mark.parametrize("metric", ["bleu-4", "rouge-l", "cider-d", "cider-d-words"])
def test_metrics_print_and_log_nothing(metric, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        METRICS[metric].score(answered(*CHINESE, *[("a dog sits .", "a dog sits .")] * 120))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
