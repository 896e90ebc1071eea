"""The filters of wavelets by which WaveFT writes weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightport.converters.lora_patterns import shown
from weightport.errors import AdapterError

HAAR = "db1"


def synthesis_filters(name: Any, where: str) -> tuple[list[float], list[float]]:
    """(low pass, high pass) of the wavelet `name`. Raises AdapterError for one that is not known, by the settings'
    place `where`.

    Haar's is known here. Those of the other families are peft's own tables, which say what an adapter means: peft must
    be installed for them.
    """
    if name == HAAR:
        half = 0.5**0.5
        return [half, half], [half, -half]
    try:
        from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
        from peft.tuners.waveft.wavelet import Wavelet
    except ImportError as error:
        raise AdapterError(
            f"{where}: the filters of wavelet_family {shown(name)} are peft's, which is not installed: "
            "pip install '.[adapters]' in the checkout."
        ) from error
    known: Mapping[str, Any] = WAVELET_REDUCTIONS
    if not isinstance(name, str) or name not in known:
        raise AdapterError(f"{where}: wavelet_family is {shown(name)}, which peft does not have.")
    try:
        found = Wavelet(name)
    except ValueError as error:
        raise AdapterError(f"{where}: wavelet_family is {name}, which peft names and has no filters of.") from error
    low, high = list(found.rec_lo), list(found.rec_hi)
    if tuple(known[name]) != (len(low) - 2, len(low) - 2):
        raise AdapterError(
            f"{where}: wavelet_family {name} has filters of {len(low)} values, for which peft leaves a margin of "
            f"{known[name]} where {len(low) - 2} is needed: its own change does not fit the weight."
        )
    return low, high
