"""OFA's tokenizer and image processor against the strings and images of the golden cases."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ofa_cases
import pytest
import torch
from golden_case import Case
from PIL import Image
from transformers import AutoTokenizer

from weightport.modeling.ofa.image_processing_ofa import OFAImageProcessor

# What stands in the dictionary under its own name; the other entries of an English one are BPE ids in decimal digits.
SYMBOL = re.compile(r"<.+>|\[.+\]|madeupword\d+")
IMAGE = re.compile(r"(?P<file>.+\.\w+)\.(?P<size>\d+)")


def of_this_family(case: Case) -> Case:
    if case.family != ofa_cases.FAMILY:
        pytest.skip(f"a case of {case.family!r}")
    return case


def strings_of(case: Case) -> dict[str, Any]:
    """The case's strings and their ids; those of a case beside it where it says so."""
    own = case.data("tokenization.json")
    beside = re.search(r"\S+/tokenization\.json", str(case.spec.get("reference", {}).get("tokenizer", "")))
    found = own or (case.data(f"../{beside[0]}") if beside else None)
    if found is None or not case.checkpoints:
        pytest.skip("the case has no strings")
    return found


def test_tokenizer_gives_the_ids_of_the_original_pipeline(case: Case, converted: Callable[..., Path]) -> None:
    strings = strings_of(of_this_family(case))
    tokenizer = AutoTokenizer.from_pretrained(converted(case))
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == strings["size"], case.name
    assert {symbol: vocabulary.get(symbol) for symbol in strings["specials"]} == strings["specials"], case.name
    for each in strings["cases"]:
        if each["use_bpe"]:
            ids = tokenizer(each["text"], add_special_tokens=False).input_ids
            assert ids == each["ids"], f"{case.name}: {each['text']!r}"
            assert tokenizer(each["text"]).input_ids == [0, *each["ids"], 2], f"{case.name}: {each['text']!r}"
        else:
            for word, index in zip(each["text"].split(), each["ids"], strict=True):
                if SYMBOL.fullmatch(word) and index != vocabulary["<unk>"]:
                    assert vocabulary[word] == index, f"{case.name}: {word}"


def test_tokenizer_reads_ids_back_as_the_original_prints_them(case: Case, converted: Callable[..., Path]) -> None:
    strings = strings_of(of_this_family(case))
    tokenizer = AutoTokenizer.from_pretrained(converted(case))
    for each in strings["cases"]:
        if each["use_bpe"]:
            text = tokenizer.decode([0, *each["ids"], 2], skip_special_tokens=True)
            assert text == each["decoded"], f"{case.name}: {each['text']!r}"


def test_image_processor_gives_the_pixels_of_the_original_transform(case: Case) -> None:
    found = {name: IMAGE.fullmatch(name) for name in of_this_family(case).tensors}
    images = {name: match for name, match in found.items() if match and (case.path / match["file"]).is_file()}
    if not images:
        pytest.skip("the case has no images")
    for name, match in images.items():
        size = int(match["size"])
        processor = OFAImageProcessor(size={"height": size, "width": size})
        with Image.open(case.path / match["file"]) as image:
            pixels = processor(images=image, return_tensors="pt").pixel_values[0]
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, case.tensors[name]), f"{case.name}: {name}"
