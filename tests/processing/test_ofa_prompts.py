from __future__ import annotations

import pytest

from weightport.modeling.ofa.prompts_ofa import TASKS, build_prompt

# Word for word what the original's data classes give to encode_text.
ORIGINAL = [
    ("caption", "en", {}, " what does the image describe?"),
    ("caption", "zh", {}, "图片描述了什么内容?"),
    ("ofa_chinese_caption", "zh", {}, "图片描述了什么?"),
    ("ocr", "en", {}, " what are the texts on the image?"),
    ("ocr", "zh", {}, "图片上的文字是什么?"),
    ("vqa", "en", {"question": "What COLOR is the cat"}, " what color is the cat?"),
    ("vqa", "en", {"question": "  ok-ish/or  not? "}, " ok ish or not?"),
    ("vqa_with_objects", "en", {"question": "where?", "objects": "tree&&a dog"}, " where? object: tree a dog"),
    (
        "grounding",
        "en",
        {"text": "...A <person>-like  Car\n"},
        ' which region does the text " a person like car " describe?',
    ),
    ("grounding", "zh", {"text": "红色的车"}, '这段文字" 红色的车 "描述的是哪个区域？'),
    ("region_caption", "en", {"region": "<bin_1>"}, "  what does the region describe? region:<bin_1>"),
    ("visual_entailment", "en", {"hypothesis": "A dog."}, ' does the image describe " a dog. "?'),
    (
        "visual_entailment_with_caption",
        "en",
        {"caption": "Cap", "hypothesis": "Hyp"},
        ' can image and text1 " cap " imply text2 " hyp "?',
    ),
    ("summary", "en", {"text": "An <unk> Article"}, ' what is the summary of article " an unk article "?'),
    ("summary", "zh", {"text": "文章"}, "文章 请用一个句子简单总结上文："),
    ("image_generation", "en", {"text": " A  Cat "}, " what is the complete image? caption: a cat"),
    ("image_infilling", "en", {}, " what is the image in the middle part?"),
    ("text_infilling", "en", {"text": "A <mask> car "}, ' what is the complete text of " a <mask> car "?'),
    ("detection", "en", {}, " what are the objects in the image?"),
    ("sst2", "en", {"text": "Good"}, ' is the sentiment of text " good " positive or negative?'),
    ("cola", "en", {"text": "Good"}, ' is the text " good " grammatically correct?'),
    ("mnli", "en", {"text1": "A", "text2": "B"}, ' can text1 " a " imply text2 " b "?'),
    ("mrpc", "en", {"text1": "A", "text2": "B"}, ' does text1 " a " and text2 " b " have the same semantics?'),
    ("qqp", "en", {"question1": "A", "question2": "B"}, ' is question " a " and question " b " equivalent?'),
    ("qnli", "en", {"text": "A", "question": "B"}, ' does " a " contain the answer to question " b "?'),
]


@pytest.mark.parametrize(("task", "language", "fields", "expected"), ORIGINAL)
def test_prompts_are_the_originals_word_for_word(task, language, fields, expected):
    assert build_prompt(task, language, fields) == expected


def test_long_fields_are_cut_to_the_originals_number_of_words():
    words = " ".join(["word"] * 100)
    assert build_prompt("grounding", "en", {"text": words}).count("word") == 80
    assert build_prompt("vqa", "en", {"question": words}).count("word") == 80
    assert build_prompt("image_generation", "en", {"text": words}).count("word") == 64


def test_braces_in_a_field_are_text():
    assert build_prompt("grounding", "en", {"text": "{0} {text}"}) == (
        ' which region does the text " {0} {text} " describe?'
    )


@pytest.mark.parametrize("task", TASKS)
def test_english_prompts_begin_with_a_space_and_chinese_ones_do_not(task):
    prompts = TASKS[task].prompts
    assert prompts.get("en", " ").startswith(" ")
    assert not prompts.get("zh", "").startswith(" ")


def test_what_the_original_lacks_is_refused_with_what_it_has():
    with pytest.raises(ValueError, match=r"no prompt for 'vqa' in 'zh', only in 'en'.*grounding"):
        build_prompt("vqa", "zh", {"question": "?"})
    with pytest.raises(ValueError, match="no task 'captions'"):
        build_prompt("captions", "en", {})
    with pytest.raises(ValueError, match="'grounding' takes text, found none"):
        build_prompt("grounding", "en", {})
    with pytest.raises(ValueError, match="'caption' takes no fields, found text"):
        build_prompt("caption", "en", {"text": "x"})
