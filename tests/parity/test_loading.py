"""The converted model as parity runs it: with the attention that was asked for in every part, and the values set."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_case import Case

from weightport.api import convert
from weightport.errors import ConfigurationError
from weightport.families.registry import registry
from weightport.parity.loading import load_native

CASES = Path(__file__).parents[1] / "golden/cases"


def converted(family: str, case: str, folder: Path) -> Path:
    convert(Case(CASES / family / case, case).materialize(folder / "original"), folder / "native", family)
    return folder / "native"


def attentions(model) -> set[str]:
    return {
        part.config._attn_implementation
        for part in model.modules()
        if type(part).__name__.endswith("Attention") and hasattr(part, "config")
    }


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_every_part_has_the_attention_that_was_asked_for_beside_values_that_are_set(name: str, tmp_path: Path) -> None:
    family = registry()["florence2"].parity
    model = load_native(
        converted("florence2", "tiny-main", tmp_path), family, overrides=family.plain, attn_implementation=name
    )
    assert attentions(model) == {name}
    assert model.config.text_config.dropout == 0.0 and model.config.vision_config.drop_path_rate == 0.0


def test_attention_that_a_part_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    family = registry()["paligemma2"].parity
    directory = converted("paligemma2", "tiny-gemma2", tmp_path)
    with pytest.raises(ConfigurationError, match="with sdpa attention: Gemma2"):
        load_native(directory, family, overrides=family.plain, attn_implementation="sdpa")
    assert attentions(load_native(directory, family, overrides=family.plain, attn_implementation="eager")) == {"eager"}
