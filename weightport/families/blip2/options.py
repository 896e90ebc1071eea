"""What a conversion of BLIP-2 can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from weightport.converters.options import ConversionOptions, option

NO_VOCABULARY = "none"


@dataclass(frozen=True)
class Blip2Options(ConversionOptions):
    """Options of port-blip2, beside its sources. 0 and None: told by the sources, or as the releases have it."""

    vocabulary: str | None = option(
        "--vocab",
        None,
        "The folder of the tokenizer, where it is not the language model's folder; none: write the model without a "
        "processor.",
        metavar="DIR|none",
    )
    qformer_tokenizer: str | None = option(
        "--qformer-tokenizer",
        None,
        "The Q-Former's BERT (bert-base-uncased): a stage-1 checkpoint takes its tokenizer from there, and its "
        "config.json tells the number of heads.",
        metavar="DIR|HUB_ID",
    )
    image_size: int = option(
        "--image-size",
        0,
        "Pixels of a picture's side. Default: what a fine-tuned vision encoder has, else what SOURCE's configuration "
        "says, else 224.",
        metavar="N",
    )
    vision_heads: int = option(
        "--vision-heads", 0, "Attention heads of the vision encoder. Default: 16, as both released ones have.",
        metavar="N",
    )  # fmt: skip
    vision_layers: int = option(
        "--vision-layers",
        0,
        "Blocks of the vision encoder in use. Default: all in SOURCE where it was fine-tuned; of a file all but the "
        "last, as LAVIS does.",
        metavar="N",
    )
    qformer_heads: int = option(
        "--qformer-heads",
        0,
        "Attention heads of the Q-Former. Default: as --qformer-tokenizer says, else one for 64 of its width.",
        metavar="N",
    )
    exact: bool = option(
        "--exact",
        False,
        "Write weightport's own class, which has LAVIS's epsilon behind the vision encoder, where transformers' has "
        "none of its own. A model with ViT-L has this class in any case.",
    )
    portable: bool = option(
        "--portable",
        False,
        "Write the code of weightport's own class beside the weights (a model with ViT-L, or --exact), for "
        "trust_remote_code without weightport.",
    )
    llm_dtype: str = option(
        "--llm-dtype",
        "keep",
        "keep: the language model's values as its folder has them. bf16-as-lavis: rounded to bfloat16, as LAVIS "
        "computes with Flan-T5.",
        choices=("keep", "bf16-as-lavis"),
    )
