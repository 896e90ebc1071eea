"""Processor of moondream2, for transformers 5: prompts of each period, pictures, and answers read back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

IMAGE_TOKEN = "<image>"
TASKS = ("query", "caption", "detect", "point")
CAPTION_LENGTHS = ("short", "normal", "long")
# A prompt of 2025 is ids before and after its text. In a string these stand for them.
MARK = re.compile(
    r"<\|(query|reason|detect|point)\|>|<\|/(query|reason|detect|point)\|>|<\|caption (short|normal|long)\|>"
)
# Cuts the placeholder's name where the tokenizer would see a picture.
SPELLED_OUT = re.compile(r"(?<=<)(?=image>)")
# What transformers 4 took away from decoded text, and transformers 5 does not.
SPACES = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
          (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip
CUT_END = re.compile(r"<$|<END$")

PLAIN_CHAT = (
    "{%- for message in messages -%}{%- set said = namespace(text='') -%}"
    "{%- if message.content is string -%}{%- set said.text = message.content -%}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<image>' ~ lead -}}"
    "{%- elif part.type == 'text' -%}{%- set said.text = said.text ~ part.text -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)
CHAT_OF_WORDS = (
    "{%- set lead = '\n\n' -%}" + PLAIN_CHAT + "{%- if message.role == 'assistant' -%}{{- ' ' ~ said.text ~ '\n\n' -}}"
    "{%- else -%}{{- 'Question: ' ~ said.text ~ '\n\nAnswer:' -}}{%- endif -%}"
    "{%- endfor -%}"
)
CHAT_OF_MARKS = (
    "{%- set lead = '' -%}" + PLAIN_CHAT + "{%- if message.role == 'assistant' -%}{{- said.text -}}"
    "{%- else -%}{{- '<|query|>' ~ SPACE ~ said.text ~ '<|/query|>' -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""Turns as the original writes a chat's history: questions and answers, the last question open."""


class MoondreamProcessor(ProcessorMixin):
    r"""One object for all that goes into moondream2 and comes out of it.

    ```python
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=processor.prompt("query", "What is this?"), return_tensors="pt")
    ids = model.generate(**inputs)
    processor.answers(ids, inputs)
    ```

    Args:
        image_processor ([`MoondreamImageProcessor`]), tokenizer ([`PreTrainedTokenizerFast`]): the two parts.
        templates (`dict`, *optional*): ids before and after the text of a prompt, by task, in the revisions of 2025:
            `{"query": {"prefix": […], "suffix": […]}, "caption": {"short": […]}, …}`. None: prompts are words. That of
            `"reason"` has the ids too that begin and end pointing at places (`ground`), and of a number (`coord`).
        question_space (`bool`, defaults to `False`): a space stands before a question, in 2025-01-09 to 2025-04-14.
        image_texts (`bool`, defaults to `False`): the picture stands between the words `<image>` and `</image>`, as
            in the first revisions of March 2024.
        answer_space (`bool`, defaults to `False`): a prompt ends with a space, as in 2024-03-04.
        end_text (`str`, *optional*): what ends an answer in words, `"<END>"` in March 2024.
        caption_settings (`dict`, *optional*): what captions are generated with, where that is not what answers are
            (2024-08-26): see `settings`.
        clean_spaces (`bool`, defaults to `True`): take away the spaces before punctuation that transformers 4 did.
        chat_template (`str`, *optional*): Jinja template of `apply_chat_template`.
    """

    valid_processor_kwargs = ProcessingKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        templates: dict[str, Any] | None = None,
        question_space: bool = False,
        image_texts: bool = False,
        answer_space: bool = False,
        end_text: str | None = None,
        clean_spaces: bool = True,
        caption_settings: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.templates = templates
        self.question_space = question_space
        self.image_texts = image_texts
        self.answer_space = answer_space
        self.end_text = end_text
        self.clean_spaces = clean_spaces
        self.caption_settings = caption_settings
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) if tokenizer is not None else None
        super().__init__(image_processor, tokenizer)
        own = CHAT_OF_WORDS if templates is None else CHAT_OF_MARKS.replace("SPACE", repr(" " * question_space))
        self.chat_template = chat_template or own

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return names if self.image_processor.views != "none" else [name for name in names if name != "image_grids"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """What the model takes.

        Args:
            images: one picture for every text with `<image>`, in their order.
            text: prompts, as `prompt` writes them. Each is the start token, the picture's places for `<image>`, and
                the ids of what stands before and after it, encoded on its own. A text may have no picture.
            kwargs: of tokenizer (`padding`, `padding_side`, `return_tensors`) and image processor.

        Returns `input_ids`, `attention_mask` int64 [batch, length], padded on the left; `pixel_values` and, of several
        views, `image_grids` for pictures. Raises ValueError for several `<image>` in a text, and where texts and
        pictures do not agree.
        """
        merged = self._merge_kwargs(
            ProcessingKwargs,  # type: ignore[arg-type]
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        images_kwargs.pop("return_tensors", None)
        if images is None and text is None:
            raise ValueError("MoondreamProcessor needs images, text or both.")
        features: dict[str, Any] = {}
        pictures = [] if images is None else _flat(images)
        if pictures:
            features.update(self.image_processor(pictures, **images_kwargs))
        if text is not None:
            texts = _strings(text)
            self._check_pictures(texts, len(pictures))
            features.update(self._encoded(texts, text_kwargs, isinstance(text, str) and return_tensors is None))
        return BatchFeature(features, tensor_type=return_tensors)

    def _check_pictures(self, texts: list[str], pictures: int) -> None:
        counts = [each.count(IMAGE_TOKEN) for each in texts]
        for count, each in zip(counts, texts):
            if count > 1:
                raise ValueError(f"A prompt has one {IMAGE_TOKEN} at most, found {count} in {each[:80]!r}.")
        if sum(counts) != pictures:
            raise ValueError(
                f"Found {pictures} picture(s) for {sum(counts)} {IMAGE_TOKEN} in {len(texts)} text(s): write one "
                f'{IMAGE_TOKEN} where a picture belongs, as prompt("query", …) does.'
            )

    def _encoded(self, texts: list[str], text_kwargs: dict[str, Any], single: bool) -> dict[str, Any]:
        rows = [self.encode(each) for each in texts]
        longest, most = max(map(len, rows)), text_kwargs.get("max_length")
        if text_kwargs.get("truncation") and most is not None and longest > most:
            raise ValueError(
                f"A prompt has {longest} tokens, more than max_length ({most}), and is not truncated: its end asks "
                "for the answer. Shorten the question."
            )
        if single:
            return {"input_ids": rows[0], "attention_mask": [1] * len(rows[0])}
        known = ("padding", "max_length", "pad_to_multiple_of", "padding_side")
        padding = {"padding": True, **{name: text_kwargs[name] for name in known if name in text_kwargs}}
        if padding.get("padding") is False or (len({len(row) for row in rows}) == 1 and "max_length" not in padding):
            return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        return dict(self.tokenizer.pad({"input_ids": rows}, return_attention_mask=True, **padding))

    def encode(self, text: str) -> list[int]:
        """Ids of one prompt: the start token, and the text with a picture's places for `<image>`."""
        ids = [self.tokenizer.bos_token_id]
        before, image, after = text.partition(IMAGE_TOKEN)
        ids += self._text_ids(before)
        if image:
            ids += self.text_ids(IMAGE_TOKEN) if self.image_texts else []
            ids += [self.image_token_id] * self.image_processor.image_seq_length
            ids += self._text_ids("</image>") if self.image_texts else []
        return ids + self._text_ids(after)

    def _text_ids(self, text: str) -> list[int]:
        if self.templates is None:
            return self.text_ids(text)
        ids: list[int] = []
        end = 0
        for mark in MARK.finditer(text):
            ids += self.text_ids(text[end : mark.start()])
            opened, closed, length = mark.groups()
            ids += self._template_ids("caption", length) if length else []
            ids += self._template_ids(opened, "prefix") if opened else []
            ids += self._template_ids(closed, "suffix") if closed else []
            end = mark.end()
        return ids + self.text_ids(text[end:])

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text that holds no picture: one that spells out `<image>` says the word."""
        parts = SPELLED_OUT.split(text)
        return [each for part in parts if part for each in self.tokenizer(part, add_special_tokens=False)["input_ids"]]

    def _template_ids(self, task: str, part: str) -> list[int]:
        found = ((self.templates or {}).get(task) or {}).get(part)
        if found is None:
            raise ValueError(f"This revision has no prompt for {task!r} ({part}).")
        return list(found)

    def prompt(
        self, task: str, text: str = "", *, history: Sequence[tuple[str, str]] = (), reasoning: bool = False
    ) -> str:
        """The string that asks for `task`, with `<image>` first.

        Args:
            task: `"query"` (text: the question), `"caption"` (text: short, normal or long; nothing for the
                revision's usual one), `"detect"` or `"point"` (text: the object; 2025).
            text: see `task`.
            history: earlier (question, answer) pairs of a query.
            reasoning: a query that is thought about first, for `model.reason` (2025-06-21).
        """
        if task not in TASKS:
            raise ValueError(f"There is no task {task!r}. Choose one of {', '.join(TASKS)}.")
        if task in ("detect", "point") and not text.strip():
            raise ValueError(f"{task!r} asks for an object: name what is looked for.")
        if reasoning:
            if task != "query" or "reason" not in (self.templates or {}):
                raise ValueError("Only a query is reasoned about, and only by the revision of 2025-06-21.")
            task = "reason"
        return self._prompt_of_words(task, text, history) if self.templates is None else self._prompt_of_marks(
            task, text, history
        )  # fmt: skip

    def settings(self, task: str) -> dict[str, Any]:
        """What `model.generate` takes for `task` beside its generation_config.json, as the original's own method has
        it."""
        return dict(self.caption_settings or {}) if task == "caption" else {}

    def as_question(self, text: str) -> str:
        """The prompt of a question about a picture."""
        return self.prompt("query", text)

    def _prompt_of_words(self, task: str, text: str, history: Sequence[tuple[str, str]]) -> str:
        if task == "query":
            turns = "".join(f"Question: {question}\n\nAnswer: {answer}\n\n" for question, answer in history)
            return f"{IMAGE_TOKEN}\n\n{turns}Question: {text}\n\nAnswer:{' ' * self.answer_space}"
        if task == "caption" and text in ("", "normal", "short"):
            return f"{IMAGE_TOKEN}\n\n{'Short caption' if text == 'short' else 'Caption'}:"
        raise ValueError(f"The revisions of 2024 have no prompt for {task!r} {text!r}.")

    def _prompt_of_marks(self, task: str, text: str, history: Sequence[tuple[str, str]]) -> str:
        if history:
            raise ValueError("The revisions of 2025 answer a question without earlier ones.")
        if task == "caption":
            length = text or "normal"
            if length not in CAPTION_LENGTHS:
                raise ValueError(f"A caption is {', '.join(CAPTION_LENGTHS)}, not {length!r}.")
            self._template_ids("caption", length)
            return f"{IMAGE_TOKEN}<|caption {length}|>"
        self._template_ids(task, "prefix")
        space = " " if task in ("detect", "point") or self.question_space else ""
        return f"{IMAGE_TOKEN}<|{task}|>{space}{text}<|/{task}|>"

    def answers(self, ids: Any, inputs: Any = None) -> list[str]:
        """The answers in generated ids [batch, length], which begin with the prompts of `inputs` where these are
        given."""
        start = inputs["input_ids"].shape[1] if inputs is not None else 0
        return [self.answer(row[start:]) for row in ids]

    def answer(self, ids: Any) -> str:
        """The answer in generated ids [length] without the prompt, as the original gives it: without special tokens
        and without spaces around it."""
        return self._cut(self.decode(ids, skip_special_tokens=True)).strip()

    def reasoned(self, found: Any) -> dict[str, Any]:
        """What `model.reason` gave, as the original does: `{"reasoning": {"text", "grounding"}, "answer"}`.

        A grounding is the part of the text from `start_idx` to `end_idx` and the `points` (x, y), in fractions of the
        picture's width and height, that it stands for.
        """
        template = (self.templates or {}).get("reason")
        if template is None:
            raise ValueError("Only the revision of 2025-06-21 reasons.")
        chunks: list[list[int]] = [[]]
        for token in found.reasoning_ids:
            if token in template["ground"]:
                chunks.append([])
            chunks[-1].append(token)
        text, grounding, numbers = "", [], iter(found.coordinates)
        for chunk in chunks:
            said = self.decode(chunk, skip_special_tokens=True)
            own = [next(numbers) for token in chunk if token == template["coord"]]
            if len(own) > 1:
                points = list(zip(own[::2], own[1::2]))
                grounding.append({"start_idx": len(text), "end_idx": len(text) + len(said), "points": points})
            text += said
        answer = self.decode(found.answer_ids, skip_special_tokens=True)
        return {"reasoning": {"text": text, "grounding": grounding}, "answer": answer}

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Texts of generated ids [batch, length], for transformers' pipeline."""
        texts = self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens)
        return [self._cut(text) for text in texts]

    def _cut(self, text: str) -> str:
        """`text` without what is left of an end in words: generation stops at its first piece."""
        return CUT_END.sub("", text.replace(self.end_text, "").rstrip()) if self.end_text else text

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        """The tokenizer's `decode`; spaces as transformers 4 had them."""
        return self._cleaned(self.tokenizer.decode(token_ids, **kwargs))

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's `batch_decode`; spaces as transformers 4 had them."""
        return [self._cleaned(text) for text in self.tokenizer.batch_decode(sequences, **kwargs)]

    def _cleaned(self, text: str) -> str:
        if not self.clean_spaces:
            return text
        for found, kept in SPACES:
            text = text.replace(found, kept)
        return text

    @staticmethod
    def in_pixels(objects: Sequence[dict[str, float]], image_size: tuple[int, int]) -> list[dict[str, float]]:
        """Boxes or points of `model.detect` and `model.point` in pixels of a picture of `image_size` (width,
        height)."""
        width, height = image_size
        return [
            {name: value * (width if name.startswith("x") else height) for name, value in each.items()}
            for each in objects
        ]


def _flat(images: Any) -> list[Any]:
    """All pictures in a row, whatever they were nested in."""
    if isinstance(images, (list, tuple)):
        return [picture for each in images for picture in _flat(each)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _strings(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(each, str) for each in texts):
        raise ValueError("moondream2's text is a string or a list of strings.")
    return list(texts)


__all__ = ["MoondreamProcessor"]
