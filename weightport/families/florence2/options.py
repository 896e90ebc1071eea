"""What a conversion of Florence-2 can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from weightport.converters.options import ConversionOptions, option


@dataclass(frozen=True)
class Florence2Options(ConversionOptions):
    """Options of port-florence2. `image_token` "none", for a model that is only looked at, is not offered to users."""

    vocabulary: str | None = option(
        "--vocab",
        None,
        "The tokenizer, where none stands beside SOURCE: a folder with tokenizer.json, or a Hub id such as "
        "microsoft/Florence-2-base; none: write the model without a processor.",
        metavar="DIR|HUB_ID|none",
    )
    ema: bool = option("--ema", False, "Convert the averaged weights (EMA) of a training checkpoint.")
    image_token: str = option(
        "--image-token",
        "reuse",
        "The id that stands for an image. reuse: one that the original has and no text gives, so that no number "
        "changes; append: a new row.",
        choices=("reuse", "append"),
    )
