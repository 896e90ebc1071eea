"""OFA's tokenizer and image processor against the strings and images of the golden cases."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import ofa_cases
import pytest
import torch
from golden_case import Case
from needs import has_checkpoint, judges, of_family, strings
from PIL import Image
from transformers import AutoTokenizer

from weightport.modeling.ofa.image_processing_ofa import OFAImageProcessor

OFA = of_family(ofa_cases.FAMILY)

# What stands in the dictionary under its own name; the other entries of an English one are BPE ids in decimal digits.
SYMBOL = re.compile(r"<.+>|\[.+\]|madeupword\d+")
IMAGE = re.compile(r"(?P<file>.+\.\w+)\.(?P<size>\d+)")


def images(case: Case) -> dict[str, re.Match[str]]:
    """Pixels of the case's images: by the tensor's name, the file and the size."""
    found = {name: IMAGE.fullmatch(name) for name in case.tensor_names}
    return {name: match for name, match in found.items() if match and (case.path / match["file"]).is_file()}


@judges(OFA, has_checkpoint, strings)
def test_tokenizer_gives_the_ids_of_the_original_pipeline(case: Case, converted: Callable[..., Path]) -> None:
    stated = strings(case)
    assert stated is not None
    tokenizer = AutoTokenizer.from_pretrained(converted(case))
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == stated["size"], case.name
    assert {symbol: vocabulary.get(symbol) for symbol in stated["specials"]} == stated["specials"], case.name
    for each in stated["cases"]:
        if each["use_bpe"]:
            ids = tokenizer(each["text"], add_special_tokens=False).input_ids
            assert ids == each["ids"], f"{case.name}: {each['text']!r}"
            assert tokenizer(each["text"]).input_ids == [0, *each["ids"], 2], f"{case.name}: {each['text']!r}"
        else:
            for word, index in zip(each["text"].split(), each["ids"], strict=True):
                if SYMBOL.fullmatch(word) and index != vocabulary["<unk>"]:
                    assert vocabulary[word] == index, f"{case.name}: {word}"


@judges(OFA, has_checkpoint, strings)
def test_tokenizer_reads_ids_back_as_the_original_prints_them(case: Case, converted: Callable[..., Path]) -> None:
    stated = strings(case)
    assert stated is not None
    tokenizer = AutoTokenizer.from_pretrained(converted(case))
    for each in stated["cases"]:
        if each["use_bpe"]:
            text = tokenizer.decode([0, *each["ids"], 2], skip_special_tokens=True)
            assert text == each["decoded"], f"{case.name}: {each['text']!r}"


@pytest.mark.pillow13
@judges(OFA, images)
def test_image_processor_gives_the_pixels_of_the_original_transform(case: Case) -> None:
    for name, match in images(case).items():
        size = int(match["size"])
        processor = OFAImageProcessor(size={"height": size, "width": size})
        with Image.open(case.path / match["file"]) as image:
            pixels = processor(images=image, return_tensors="pt").pixel_values[0]
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, case.tensors[name]), f"{case.name}: {name}"
