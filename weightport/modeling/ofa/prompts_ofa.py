"""What OFA is asked in each task, word for word, and how the original cleans the text that goes into it.

Wording, spaces and marks are the original's (data/*_data/*.py). English prompts begin with a space, which the
byte-level vocabulary tells from none.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

# string.punctuation of the caption data class, which it deletes from the captions it trains on.
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_caption(text: str, max_words: int = 80) -> str:
    """OFADataset.pre_caption: lower case, no leading marks, hyphens and slashes as spaces, `max_words` at most."""
    text = text.lower().lstrip(",.!?*#:;~").replace("-", " ").replace("/", " ").replace("<person>", "person")
    return _first_words(re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int = 80) -> str:
    """OFADataset.pre_question, and the question mark that VqaGenDataset adds where it is missing."""
    text = text.lower().lstrip(",.!?*#:;~").replace("-", " ").replace("/", " ")
    text = _first_words(re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" "), max_words)
    return text if text.endswith("?") else text + "?"


def clean_sentence(text: str, max_words: int = 512) -> str:
    """Lower case, white space as single spaces, `max_words` at most (the GLUE and image-generation data classes)."""
    return " ".join(text.lower().split()[:max_words])


def clean_article(text: str, max_words: int = 512) -> str:
    """SummaryDataset's cleaning."""
    return clean_caption(text, max_words).replace("<unk>", "unk")


def clean_objects(text: str, max_words: int = 30) -> str:
    """Detected objects, joined by `&&` as in the original's data: the first `max_words` of them."""
    return " ".join(text.strip().split("&&")[:max_words])


def clean_target_caption(text: str, max_words: int = 30) -> str:
    """CaptionDataset's training target: ASCII punctuation deleted, `max_words` at most."""
    return " ".join(text.translate(WITHOUT_PUNCTUATION).split()[:max_words])


def clean_text(text: str) -> str:
    """Lower case, no white space around (UnifyDataset's plain text)."""
    return text.strip().lower()


def clean_ocr_target(text: str) -> str:
    """OcrDataset's target, except that it also turns traditional characters into simplified ones (zhconv)."""
    return unicodedata.normalize("NFKC", text).lower()


def clean_nothing(text: str) -> str:
    return text


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])


Cleaner = Callable[[str], str]


@dataclass(frozen=True)
class Task:
    """One task: its prompt by language ("en", "zh"), the cleaning of each field in it, the kind of its answer.

    `answer` is "text", "box" (one box), "regions" (boxes and labels) or "codes" (an image's).
    """

    prompts: Mapping[str, str]
    fields: Mapping[str, Cleaner] = field(default_factory=dict)
    answer: str = "text"
    clean_target: Cleaner = clean_nothing


def _sentence_pair(prompt: str, first: str = "text1", second: str = "text2") -> Task:
    return Task({"en": prompt}, {first: clean_sentence, second: clean_sentence})


IMPLIES = ' can text1 " {text1} " imply text2 " {text2} "?'

TASKS: dict[str, Task] = {
    "caption": Task(
        {"en": " what does the image describe?", "zh": "图片描述了什么内容?"}, clean_target=clean_target_caption
    ),
    "ofa_chinese_caption": Task({"zh": "图片描述了什么?"}),
    "image_classification": Task({"en": " what does the image describe?"}),
    "vqa": Task({"en": " {question}"}, {"question": clean_question}),
    "vqa_with_objects": Task(
        {"en": " {question} object: {objects}"}, {"question": clean_question, "objects": clean_objects}
    ),
    "ocr": Task(
        {"en": " what are the texts on the image?", "zh": "图片上的文字是什么?"}, clean_target=clean_ocr_target
    ),
    "grounding": Task(
        {"en": ' which region does the text " {text} " describe?', "zh": '这段文字" {text} "描述的是哪个区域？'},
        {"text": clean_caption},
        answer="box",
    ),
    "region_caption": Task(
        {"en": "  what does the region describe? region:{region}"},
        {"region": clean_nothing},
        clean_target=partial(clean_caption, max_words=30),
    ),
    "detection": Task({"en": " what are the objects in the image?"}, answer="regions"),
    "visual_entailment": Task({"en": ' does the image describe " {hypothesis} "?'}, {"hypothesis": clean_caption}),
    "visual_entailment_with_caption": Task(
        {"en": ' can image and text1 " {caption} " imply text2 " {hypothesis} "?'},
        {"caption": clean_caption, "hypothesis": clean_caption},
    ),
    "image_text_matching": Task({"en": ' does the image describe " {text} "?'}, {"text": clean_caption}),
    "image_infilling": Task({"en": " what is the image in the middle part?"}, answer="codes"),
    "image_generation": Task(
        {"en": " what is the complete image? caption: {text}"},
        {"text": partial(clean_sentence, max_words=64)},
        answer="codes",
    ),
    "text_infilling": Task({"en": ' what is the complete text of " {text} "?'}, {"text": clean_text}),
    "summary": Task(
        {"en": ' what is the summary of article " {text} "?', "zh": "{text} 请用一个句子简单总结上文："},
        {"text": clean_article},
        clean_target=partial(clean_article, max_words=128),
    ),
    "sst2": Task(
        {"en": ' is the sentiment of text " {text} " positive or negative?'},
        {"text": clean_sentence},
    ),
    "cola": Task({"en": ' is the text " {text} " grammatically correct?'}, {"text": clean_sentence}),
    "mnli": _sentence_pair(IMPLIES),
    "rte": _sentence_pair(IMPLIES),
    "mrpc": _sentence_pair(' does text1 " {text1} " and text2 " {text2} " have the same semantics?'),
    "qqp": _sentence_pair(
        ' is question " {question1} " and question " {question2} " equivalent?', "question1", "question2"
    ),
    "qnli": _sentence_pair(' does " {text} " contain the answer to question " {question} "?', "text", "question"),
}


def build_prompt(task: str, language: str, fields: Mapping[str, str]) -> str:
    """The prompt of `task` in `language` with its cleaned `fields`. Raises ValueError on what the original lacks."""
    entry = task_named(task)
    if language not in entry.prompts:
        raise ValueError(
            f"OFA has no prompt for {task!r} in {language!r}, only in {', '.join(map(repr, entry.prompts))}. "
            f"In {language!r} it has: {', '.join(name for name, t in TASKS.items() if language in t.prompts)}."
        )
    if set(fields) != set(entry.fields):
        raise ValueError(
            f"The prompt of {task!r} takes {', '.join(entry.fields) or 'no fields'}, "
            f"found {', '.join(fields) or 'none'}."
        )
    return entry.prompts[language].format(**{name: clean(fields[name]) for name, clean in entry.fields.items()})


def task_named(task: str) -> Task:
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}. Choose one of {', '.join(TASKS)}.")
    return TASKS[task]


__all__ = ["TASKS", "Task", "build_prompt", "task_named"]
