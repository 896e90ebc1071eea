"""The number of layers that tensor names tell."""

from __future__ import annotations

import re
from collections.abc import Iterable

from weightport.errors import ConfigurationError
from weightport.formatting import shortened

# Ten times the deepest model there is. The native model is built with as many layers before a tensor is missed.
MAX_LAYERS = 1024


def count_layers(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    """One more than the largest number that `pattern` captures at the beginning of a name; 0 without any.

    Raises ConfigurationError for more than MAX_LAYERS.
    """
    largest, where = -1, ""
    for name in names:
        found = pattern.match(name)
        if found is not None and int(found[1]) > largest:
            largest, where = int(found[1]), name
    if largest >= MAX_LAYERS:
        raise ConfigurationError(
            f"{shortened(where)} would be of layer {shortened(str(largest), 12)}; a model has at most {MAX_LAYERS}. "
            "The tensor's name is damaged."
        )
    return largest + 1
