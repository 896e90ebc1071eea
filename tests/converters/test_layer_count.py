"""A layer's number in a tensor's name decides how many layers are built, so it cannot be any number."""

from __future__ import annotations

import re

import pytest

from weightport.converters.layer_count import MAX_LAYERS, count_layers
from weightport.converters.patterns import Pattern
from weightport.errors import ConfigurationError

LAYER = re.compile(r"layers\.(\d+)\.")


def test_layers_are_counted_by_the_largest_number():
    assert count_layers(LAYER, ["layers.0.w", "layers.11.w", "layers.2.w", "x.layers.99.w"]) == 12
    assert count_layers(LAYER, ["w"]) == 0
    assert count_layers(LAYER, [f"layers.{MAX_LAYERS - 1}.w"]) == MAX_LAYERS


@pytest.mark.parametrize("number", ["1024", "999999999", "9" * 4000])
def test_a_layer_that_no_model_has_is_refused_by_name(number: str):
    with pytest.raises(ConfigurationError, match=r"layers\.\d+\S* would be of layer \d+…?; a model has at most 1024"):
        count_layers(LAYER, [f"layers.{number}.w"])


def test_a_number_that_python_would_not_convert_is_no_layer():
    assert Pattern("layers.*.w").match(f"layers.{'9' * 5000}.w") is None
    assert Pattern("layers.*.w").match("layers.123.w") == (123,)
