"""What a conversion of PaliGemma can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from weightport.converters.options import ConversionOptions, option
from weightport.families.paligemma2.variants import NAMES


@dataclass(frozen=True)
class PaliGemmaOptions(ConversionOptions):
    """Options of port-paligemma2. What is None follows from the variant, which follows from the shapes."""

    vocabulary: str | None = option(
        "--vocab",
        None,
        "The tokenizer, where none stands beside SOURCE: a sentencepiece .model file (PaliGemma's, or Gemma's), a "
        "folder that holds one, or a Hub id; none: write the model without a processor.",
        metavar="FILE|DIR|HUB_ID|none",
    )
    variant: str | None = option(
        "--variant", None, "The released model that SOURCE is of; by default told from the shapes.", choices=NAMES
    )
    query_scale: str | None = option(
        "--query-scale",
        None,
        "What the scores of attention are divided by the square root of: head (a head's width), width (the model's "
        "width by its heads, as 28b has it), or a whole number. Default: the variant's, else head.",
        metavar="head|width|N",
    )
    attention_softcap: str | None = option(
        "--attention-softcap",
        None,
        "Softcap of attention scores (PaliGemma 2). Default: 50.",
        metavar="NUMBER|none",
    )
    final_softcap: str = option(
        "--final-softcap",
        "none",
        "Softcap of logits (PaliGemma 2). none, the default: as the original trains and evaluates. 30: as the "
        "published transformers configuration has it.",
        metavar="NUMBER|none",
    )
    sliding_window: str = option(
        "--sliding-window",
        "none",
        "Positions that every other layer sees (PaliGemma 2). none, the default: all, as in the original. 4096: as "
        "the published transformers configuration has it.",
        metavar="N|none",
    )
    pad_vocab: bool = option(
        "--pad-vocab",
        False,
        "Append rows of zeros to the embedding, for <image> and up to a multiple of 64 (257152 to 257216).",
    )
    resample: str = option(
        "--resample",
        "bilinear",
        "How pictures are resized. bilinear, the default: as in training. bicubic: as the published processor does.",
        choices=("bilinear", "bicubic"),
    )
