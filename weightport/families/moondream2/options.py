"""What a conversion of moondream2 can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from weightport.converters.options import ConversionOptions, option
from weightport.families.moondream2.revisions import NAMES


@dataclass(frozen=True)
class MoondreamOptions(ConversionOptions):
    """Options of port-moondream2."""

    vocabulary: str | None = option(
        "--vocab",
        None,
        "The tokenizer, where the right one does not stand beside SOURCE: a tokenizer.json, a folder that holds one, "
        "or a Hub id; none: write the model without a processor.",
        metavar="FILE|DIR|HUB_ID|none",
    )
    revision: str | None = option(
        "--revision",
        None,
        "The dated revision that SOURCE is of, where neither its tensors nor the files beside it tell.",
        choices=NAMES,
    )
    portable: bool = option(
        "--portable", False, "Write the model's code beside the weights, for trust_remote_code without weightport."
    )
