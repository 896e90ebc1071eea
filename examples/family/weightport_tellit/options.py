"""What a conversion of Tellit can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from weightport.converters.options import ConversionOptions, option


@dataclass(frozen=True)
class TellitOptions(ConversionOptions):
    """Options of port-tellit."""

    lower_case: bool = option("--lower-case", False, "Let the tokenizer read capitals as small letters.")
    processor: bool = True
