"""Processor of OFA and OFA-CN, for transformers 5: prompts, images, boxes, and answers read back."""

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

from .boxes_ofa import BIN, dequantize_boxes, parse_bins, parse_regions, quantize_boxes
from .prompts_ofa import build_prompt, task_named

SYMBOL_PATTERN = re.compile(r"<(?:mask|code_\d+|bin_\d+)>")
CODE_PATTERN = re.compile(r"<code_(\d+)>")
# Ideographs, their punctuation, full-width forms: what Chinese writes without spaces.
CHINESE = "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0002fa1f"
SPACES_OF_CHINESE = re.compile(rf"(?<=[{CHINESE}]) +| +(?=[{CHINESE}])")
IGNORED_LABEL = -100
DECODER_PROMPTS = ("none", "src", "prev_output")
# A conversation is its texts, for OFA has no turns; English ones get the leading space that OFA's prompts have.
_TEXTS_OF_A_CHAT = (
    "{{% for message in messages %}}{{% if message.content is string %}}{{{{ '{space}' ~ message.content | trim }}}}"
    "{{% else %}}{{% for part in message.content if part.type == 'text' %}}{{{{ '{space}' ~ part.text | trim }}}}"
    "{{% endfor %}}{{% endif %}}{{% endfor %}}"
)
CHAT_TEMPLATES = {"en": _TEXTS_OF_A_CHAT.format(space=" "), "zh": _TEXTS_OF_A_CHAT.format(space="")}


class SymbolText(str):
    """Text in which `<bin_i>`, `<code_i>` and `<mask>` mean these symbols. In any other text they are characters."""


class OFAProcessorKwargs(ProcessingKwargs, total=False):
    r"""
    parse_symbols (`bool`, *optional*):
        Read `<bin_i>`, `<code_i>` and `<mask>` in texts and targets as these symbols, which the original never does.
        By default (`None`) only in what `prompt` and `boxes_to_bins` wrote with symbols.
    decoder_prompt (`str`, *optional*, defaults to `"none"`):
        `"prev_output"` begins the decoder's input with the prompt less its `</s>`, `"src"` with all of it, as the
        original's prompt_type does for its VQA, entailment and GLUE checkpoints.
    """

    parse_symbols: bool | None
    decoder_prompt: str

    # Chats ask for it before transformers 5.23.
    _defaults = {}  # type: ignore[misc]


class OFAProcessor(ProcessorMixin):
    r"""One object for all that goes into OFA and comes out of it.

    ```python
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=processor.prompt("caption"), return_tensors="pt")
    ids = model.generate(**inputs)[0]
    processor.post_process_generation(ids, "caption")
    ```

    Args:
        image_processor ([`OFAImageProcessor`]), tokenizer ([`PreTrainedTokenizerFast`]): the two parts.
        max_image_size (`int`, defaults to 512): pixels of the resized image that the location bins span.
        chat_template (`str`, *optional*): Jinja template of `apply_chat_template`; by default the texts of all
            messages, one after the other.
    """

    valid_processor_kwargs = OFAProcessorKwargs
    parse_symbols: bool | None = None
    decoder_prompt = "none"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_image_size: int = 512,
        chat_template: str | None = None,
    ) -> None:
        self.max_image_size = max_image_size
        super().__init__(image_processor, tokenizer)
        self.chat_template = chat_template or CHAT_TEMPLATES[self.language]

    @cached_property
    def language(self) -> str:
        """ "zh" when the vocabulary is BERT's word pieces (OFA-CN), "en" when it is GPT-2's BPE."""
        return "zh" if type(self.tokenizer.backend_tokenizer.model).__name__ == "WordPiece" else "en"

    @cached_property
    def num_bins(self) -> int:
        """Location symbols of the vocabulary."""
        return sum(token.startswith("<bin_") for token in self.tokenizer.get_vocab())

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "patch_masks"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[OFAProcessorKwargs],
    ) -> BatchFeature:
        """What the model takes.

        Args:
            images: one image a sample, of any kind the image processor takes. A sample without one is None or an
                empty list; a single text is repeated for several images.
            text: the prompts, encoded as `<s>` text `</s>`. Nothing is added to them or cleaned: see `prompt`.
            text_target (`str` or `list[str]`, *optional*): the answers, encoded as text `</s>`. See `target`.
            kwargs: see [`OFAProcessorKwargs`]; those of tokenizer and image processor too.

        Returns `input_ids`, `attention_mask` int64 [batch, length] for text; `pixel_values` float32 [batch, 3, height,
        width] and `patch_masks` bool [batch] (False, with zeros as pixels, where a sample has no image) for images;
        `labels` int64 [batch, length], -100 where there is no target, for targets; `decoder_input_ids` for a decoder
        prompt.
        """
        decoder_prompt = kwargs.pop("decoder_prompt", self.decoder_prompt)
        parse_symbols = kwargs.pop("parse_symbols", self.parse_symbols)
        if decoder_prompt not in DECODER_PROMPTS:
            raise ValueError(f"decoder_prompt is one of {', '.join(DECODER_PROMPTS)}, found {decoder_prompt!r}.")
        # Without our own two, which transformers before 5.23 takes for kinds of input.
        merged = self._merge_kwargs(
            ProcessingKwargs,  # type: ignore[arg-type]
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        images_kwargs.pop("return_tensors", None)
        text_target = text_kwargs.pop("text_target", None)
        if images is None and text is None and text_target is None:
            raise ValueError("OFAProcessor needs at least one of images, text and text_target.")

        features: dict[str, Any] = {}
        samples = _one_image_a_sample(images) if images is not None else None
        if samples is not None:
            features.update(self._image_features(samples, images_kwargs))
            if isinstance(text, str) and isinstance(images, (list, tuple)):
                text = [text] * len(samples)
        if text is not None:
            texts = _strings(text)
            if samples is not None and len(texts) != len(samples):
                raise ValueError(f"Found {len(texts)} texts for {len(samples)} images: OFA takes one image a sample.")
            tokenizer = self._tokenizer_for(texts, parse_symbols)
            unbatched = isinstance(text, str) and return_tensors is None and decoder_prompt == "none"
            features.update(tokenizer(text if unbatched else texts, **text_kwargs))
        if text_target is not None or decoder_prompt != "none":
            prompts = self._decoder_prompts(features, decoder_prompt)
            features.update(self._target_features(text_target, prompts, parse_symbols))
        return BatchFeature(features, tensor_type=return_tensors)

    def _image_features(self, samples: list[Any], images_kwargs: dict[str, Any]) -> dict[str, Any]:
        present = [image for image in samples if image is not None]
        if not present:
            return {}
        pixels = iter(self.image_processor(present, **images_kwargs)["pixel_values"])
        processed = [None if image is None else np.asarray(next(pixels)) for image in samples]
        blank = np.zeros_like(next(image for image in processed if image is not None))
        return {
            "pixel_values": [blank if image is None else image for image in processed],
            "patch_masks": [image is not None for image in processed],
        }

    def _tokenizer_for(self, texts: list[str], parse_symbols: bool | None) -> Any:
        if parse_symbols is None:
            parse_symbols = any(isinstance(text, SymbolText) for text in texts)
        return self.symbol_tokenizer if parse_symbols else self.tokenizer

    @cached_property
    def symbol_tokenizer(self) -> Any:
        """The tokenizer, but reading `<bin_i>`, `<code_i>` and `<mask>` in text as these symbols.

        White space before a symbol is dropped: the original encodes what stands between symbols on its own.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        symbols = [token for token in tokenizer.get_vocab() if SYMBOL_PATTERN.fullmatch(token)]
        tokenizer.add_tokens([AddedToken(symbol, lstrip=True, normalized=False) for symbol in symbols])
        return tokenizer

    def _decoder_prompts(self, features: dict[str, Any], decoder_prompt: str) -> list[list[int]] | None:
        """Token ids that the decoder's input begins with, by sample; None when it begins with `<s>` alone."""
        if decoder_prompt == "none":
            return None
        if "input_ids" not in features:
            raise ValueError(f"decoder_prompt={decoder_prompt!r} repeats the text: give text too.")
        prompts = [[i for i in ids if i != self.tokenizer.pad_token_id] for ids in features["input_ids"]]
        return prompts if decoder_prompt == "src" else [prompt[:-1] for prompt in prompts]

    def _target_features(
        self, text_target: str | list[str] | None, prompts: list[list[int]] | None, parse_symbols: bool | None
    ) -> dict[str, Any]:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        if text_target is None:
            prompts = prompts or []
            if len({len(prompt) for prompt in prompts}) > 1:
                raise ValueError(
                    "These prompts differ in length, and padding between a decoder prompt and its answer would change "
                    "the answer: generate batches of equal length, or one by one."
                )
            return {"decoder_input_ids": prompts}
        targets = _strings(text_target)
        tokenizer = self._tokenizer_for(targets, parse_symbols)
        answers = [tokenizer(target, add_special_tokens=False)["input_ids"] for target in targets]
        if prompts is None:
            return {"labels": _padded([[*answer, eos] for answer in answers], IGNORED_LABEL)}
        if len(prompts) != len(answers):
            raise ValueError(f"Found {len(answers)} targets for {len(prompts)} texts.")
        return {
            "decoder_input_ids": _padded([[*p, *answer] for p, answer in zip(prompts, answers)], pad),
            "labels": _padded(
                [[*[IGNORED_LABEL] * (len(p) - 1), *answer, eos] for p, answer in zip(prompts, answers)], IGNORED_LABEL
            ),
        }

    def prompt(
        self,
        task: str,
        language: str | None = None,
        *,
        box: Sequence[float] | None = None,
        image_size: tuple[int, int] | None = None,
        **fields: str,
    ) -> str:
        """What OFA is asked in `task`, e.g. `prompt("grounding", text="a red car")`.

        Args:
            task: a name in `prompts_ofa.TASKS`.
            language: "en" or "zh"; by default the vocabulary's.
            box, image_size: for "region_caption", (x0, y0, x1, y1) in pixels of an image of (width, height).
            fields: the task's own, cleaned as the original's data classes clean them.
        """
        if box is not None:
            fields["region"] = self.boxes_to_bins([box], image_size)
        prompt = build_prompt(task, language or self.language, fields)
        has_symbols = task == "text_infilling" or any(isinstance(text, SymbolText) for text in fields.values())
        return SymbolText(prompt) if has_symbols else prompt

    def target(self, task: str, text: str) -> str:
        """The answer `text` as OFA is trained on it: cleaned, with a space before it, which begins an English word."""
        if isinstance(text, SymbolText):
            return text
        return " " + task_named(task).clean_target(text)

    def boxes_to_bins(self, boxes: Any, image_size: tuple[int, int] | None) -> str:
        """`<bin_x0> <bin_y0> <bin_x1> <bin_y1>` of every box, in a row.

        Args:
            boxes: [boxes, 4] (or one box), (x0, y0, x1, y1) in pixels of the original image.
            image_size: (width, height) of that image, as PIL's `Image.size`.
        """
        if image_size is None:
            raise ValueError("Boxes in pixels need image_size, the (width, height) of their image.")
        bins = quantize_boxes(boxes, image_size, self._resized, self.num_bins, self.max_image_size)
        return SymbolText(" ".join(BIN.format(bin_) for bin_ in bins.flatten().tolist()))

    def bins_to_boxes(self, answer: Any, image_size: tuple[int, int]) -> torch.Tensor:
        """Boxes in pixels of an image of (width, height): float32 [boxes, 4], from token ids or from text.

        Every four bins are a box; what else stands in the answer is passed over.
        """
        return self._boxes(parse_bins(self._text(answer)), image_size)

    def _boxes(self, bins: list[list[int]], image_size: tuple[int, int]) -> torch.Tensor:
        if not bins:
            return torch.zeros(0, 4)
        return dequantize_boxes(bins, image_size, self._resized, self.num_bins, self.max_image_size)

    @property
    def _resized(self) -> tuple[int, int]:
        size = self.image_processor.size
        return size["width"], size["height"]

    def _text(self, answer: Any) -> str:
        return answer if isinstance(answer, str) else self.tokenizer.decode(answer, skip_special_tokens=True)

    def decode(self, *args: Any, join: bool = False, **kwargs: Any) -> Any:
        """The tokenizer's `decode`. `join` removes the spaces that a Chinese vocabulary puts between characters."""
        return _joined(self.tokenizer.decode(*args, **kwargs), join)

    def batch_decode(self, *args: Any, join: bool = False, **kwargs: Any) -> list[str]:
        """The tokenizer's `batch_decode`; `join` as in `decode`."""
        return _joined(self.tokenizer.batch_decode(*args, **kwargs), join)

    def post_process_generation(
        self, answer: Any, task: str, image_size: tuple[int, int] | None = None, join: bool = True
    ) -> dict[str, Any]:
        """The answer of one sample, by task: `{"caption": "…"}`, `{"grounding": {"boxes": [[x0, y0, x1, y1]]}}`.

        Args:
            answer: token ids or decoded text.
            image_size: (width, height) of the original image, for answers that hold boxes.
            join: remove the spaces between Chinese characters (the original's caption metrics keep them).

        Text is a string, boxes are floats in pixels, regions have "labels" beside "boxes", codes are integers.
        """
        kind, text = task_named(task).answer, self._text(answer)
        if kind == "text":
            return {task: _joined(text.strip(), join)}
        if kind == "codes":
            return {task: [int(code) for code in CODE_PATTERN.findall(text)]}
        if image_size is None:
            raise ValueError(f"The answer of {task!r} holds boxes: give image_size, the image's (width, height).")
        if kind == "box":
            return {task: {"boxes": self.bins_to_boxes(text, image_size).tolist()}}
        regions = parse_regions(text)
        boxes = self._boxes([bins for bins, _ in regions], image_size)
        return {task: {"boxes": boxes.tolist(), "labels": [_joined(label, join) for _, label in regions]}}


def _one_image_a_sample(images: Any) -> list[Any]:
    """The image of every sample, None where it has none."""
    if isinstance(images, (list, tuple)):
        nested = [image if isinstance(image, (list, tuple)) else [image] for image in images]
        if any(len(sample) > 1 for sample in nested):
            raise ValueError(f"OFA takes one image a sample, found {max(map(len, nested))}.")
        return [sample[0] if sample else None for sample in nested]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _strings(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(each, str) for each in texts):
        raise ValueError("OFA's text is a string or a list of strings, one a sample.")
    return list(texts)


def _joined(text: Any, join: bool) -> Any:
    if not join:
        return text
    if isinstance(text, list):
        return [_joined(each, join) for each in text]
    return SPACES_OF_CHINESE.sub("", text)


def _padded(rows: list[list[int]], value: int) -> list[list[int]]:
    length = max(map(len, rows), default=0)
    return [[*row, *[value] * (length - len(row))] for row in rows]


__all__ = ["OFAProcessor", "SymbolText"]
