"""What a conversion of OFA can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from weightport.converters.options import ConversionOptions, option


@dataclass(frozen=True)
class OFAOptions(ConversionOptions):
    """Options of port-ofa."""

    vocabulary: str | None = option(
        "--vocab",
        None,
        "The original's vocabulary: utils/BERT_CN_dict or utils/BPE of the OFA repository, or a Hub id such as "
        "bert-base-chinese; none: write the model without a tokenizer. By default what stands beside SOURCE.",
        metavar="DIR|HUB_ID|none",
    )
    ema: bool = option("--ema", False, "Convert the averaged weights (EMA) of a training checkpoint.")
    parse_symbols: bool = option(
        "--parse-symbols",
        False,
        "Let the tokenizer read <bin_3>, <code_5> and <mask> in plain text (the original does not).",
    )
    portable: bool = option("--portable", False, "Write the model's code beside the weights, for trust_remote_code.")
