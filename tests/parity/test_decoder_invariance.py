"""The checks without a reference on models whose decoder reads image, prompt and answer in one sequence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weightport import api
from weightport.checkpoints import open_checkpoint
from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.conversion import convert
from weightport.parity.check import check_parity
from weightport.parity.compare import Comparison, Place
from weightport.parity.family import leading_block
from weightport.parity.float64_arithmetic import Float64Throughout
from weightport.parity.invariance import BATCH, CACHE, INVARIANCES, PADDING, check_invariances
from weightport.parity.noise import Noise

EXAMPLE = Path(__file__).parents[2] / "examples" / "family"
IMAGE, PAD = 63, 0


def test_family_of_another_package_computes_the_same_alone_behind_padding_and_step_by_step(tmp_path: Path) -> None:
    sys.path.insert(0, str(EXAMPLE))
    from weightport_tellit import FAMILY

    case = EXAMPLE / "cases" / "tiny"
    sources = Sources({MAIN: open_checkpoint(case / "tellit.pt")})
    convert(sources, tmp_path / "model", FAMILY.conversion, FAMILY.options())
    report = check_parity(
        tmp_path / "model", case / "reference.safetensors", FAMILY.parity, FAMILY.conversion, invariance=True
    )
    judged = {each.seam: each for each in report.comparisons if each.seam in INVARIANCES and each.dtype == "float64"}
    assert set(judged) == set(INVARIANCES)
    assert report.passed and all(each.largest < 1e-13 for each in judged.values())


@pytest.fixture
def prefix_model() -> Any:
    """A tiny PaliGemma 2: image and prompt see each other, the answer is causal."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "model_type": "gemma2", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48, "vocab_size": 64, "pad_token_id": PAD,
        "query_pre_attn_scalar": 16, "sliding_window": 64,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
        "patch_size": 14, "image_size": 28, "vision_use_head": False, "projection_dim": 32,
    }  # fmt: skip
    config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_index=IMAGE)
    model = PaliGemmaForConditionalGeneration(config).double().eval()
    for parameter in model.parameters():
        # As large as they are when they are trained: the initial values hide what attention does.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def arguments(*, left: bool = False) -> dict[str, torch.Tensor]:
    """Two samples of four places of an image, prompts of three and one token, answers of four and two."""
    rows = [[IMAGE] * 4 + [5, 6, 7] + [11, 12, 13, 14], [IMAGE] * 4 + [8] + [15, 16]]
    types = [[0] * 7 + [1] * 4, [0] * 5 + [1] * 2]
    width = max(map(len, rows))

    def padded(values: list[list[int]]) -> torch.Tensor:
        filled = [[PAD] * (width - len(row)) for row in values]
        return torch.tensor([fill + row if left else row + fill for row, fill in zip(values, filled)])

    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": padded(rows),
        "attention_mask": padded([[1] * len(row) for row in rows]),
        "token_type_ids": padded(types),
        "pixel_values": torch.randn(2, 3, 28, 28, generator=generator, dtype=torch.float64),
    }


class Table:
    """What the checks need of a family's table."""

    prefix = staticmethod(leading_block)


def judged(model: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    place = Place("forward", torch.float64, 5, Noise(growth=48.0, limit=1.5e-5))
    with Float64Throughout():
        return {each.seam: each for each in check_invariances(model, Table, given, place)}  # type: ignore[arg-type]


@pytest.mark.parametrize("left", [False, True])
def test_prefix_that_sees_itself_computes_the_same_on_either_side_of_padding(prefix_model: Any, left: bool) -> None:
    found = judged(prefix_model, arguments(left=left))
    assert set(found) == set(INVARIANCES)
    for seam, each in found.items():
        assert isinstance(each, Comparison) and each.largest < 1e-12, (seam, each)
    # Every real position is held, the prefix's too: 11 columns of the first sample, 7 of the second.
    assert found[CACHE].shape[0] == found[BATCH].shape[0] == 18


def test_prefix_reaches_to_its_last_token() -> None:
    class Config:
        image_token_id = IMAGE

    given = {name: value[:1] for name, value in arguments().items()}
    assert leading_block(given, Config) == 7
    del given["token_type_ids"]
    assert leading_block(given, Config) == 4
    assert leading_block({"input_ids": torch.tensor([[5, 6]])}, Config) == 1


def first_image_for_all(model: Any) -> None:
    tower = model.model.vision_tower
    forward = tower.forward
    tower.forward = lambda pixels, **given: forward(pixels[:1].expand_as(pixels), **given)


def padding_is_seen(model: Any) -> None:
    forward = model.model.forward
    model.model.forward = lambda attention_mask=None, **given: forward(
        attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **given
    )


def prefix_is_causal_when_cached(model: Any) -> None:
    forward = model.model.forward

    def cached(token_type_ids: Any = None, use_cache: Any = None, **given: Any) -> Any:
        types = torch.ones_like(token_type_ids) if use_cache and token_type_ids is not None else token_type_ids
        return forward(token_type_ids=types, use_cache=use_cache, **given)

    model.model.forward = cached


@pytest.mark.parametrize(
    ("mistake", "shows"),
    [
        (first_image_for_all, {BATCH, CACHE}),
        (padding_is_seen, {PADDING, CACHE}),
        (prefix_is_causal_when_cached, {CACHE}),
    ],
)
def test_planted_mistake_shows_where_it_is(prefix_model: Any, mistake: Callable[[Any], None], shows: set[str]) -> None:
    mistake(prefix_model)
    found = judged(prefix_model, arguments())
    assert {seam for seam, each in found.items() if not each.verdict.passes} == shows


def test_converted_prefix_model_computes_the_same_alone_behind_padding_and_step_by_step(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden"
    sys.path.insert(0, str(golden))
    import paligemma2_cases
    from golden_case import Case

    case = Case(golden / "cases" / "paligemma2" / "tiny-gemma2", "tiny-gemma2")
    (tmp_path / "original").mkdir()
    api.convert(case.materialize(tmp_path / "original"), tmp_path / "model")
    reference = paligemma2_cases.write_case(case, tmp_path / "reference.safetensors")
    report = api.check_parity(tmp_path / "model", reference, dtypes=[torch.float64], invariance=True)
    judged = {each.seam: each for each in report.comparisons if each.seam in INVARIANCES}
    assert set(judged) == set(INVARIANCES)
    assert report.passed and all(each.largest < 1e-13 for each in judged.values())
