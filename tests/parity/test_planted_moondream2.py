"""Mistakes that ports of moondream2 have made, planted in the native model and found where they begin.

In float32 and float64: the flavour of GELU and the epsilon of the tower are worth 1e-4 of a value, which a tolerance
of 1e-3 lets through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import moondream2_cases
import pytest
import torch
from golden_case import Case
from reference_subsets import subset
from test_planted_mistakes import Mistake, attribute, every, on, swap
from transformers.models.phi.modeling_phi import PhiAttention, PhiMLP
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipMLP

from weightport.api import check_parity, convert
from weightport.families.registry import registry
from weightport.modeling.moondream import modeling_moondream
from weightport.parity import ParityReport

FOLDER = Path(__file__).parents[1] / "golden/cases/moondream2"
ONE_VIEW, CROPS, TILES = (
    Case(FOLDER / name, name) for name in ("tiny-2024-04-02", "tiny-2024-08-26", "tiny-2025-06-21")
)
TOWER, PROJECTOR, TEXT = "model.vision_tower", "model.multi_modal_projector", "model.language_model"
BLOCKS, LAYERS = f"{TOWER}.encoder.layers", f"{TEXT}.layers"
RUNS = ("batch", "alone0", "alone1", "answer0")
VISION_HEADS, HEADS, HEAD_WIDTH = 16, 4, 16


@pytest.fixture(scope="module")
def natives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for case in (ONE_VIEW, CROPS, TILES):
        out = tmp_path_factory.mktemp("moondream2") / "native"
        told = moondream2_cases.settings(case)
        convert(case.materialize(out.parent / "original"), out, "moondream2", **told)
        found[case.name] = out
    return found


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("references")
    return {
        case.name: moondream2_cases.write_case(case, folder / f"{case.name}.safetensors")
        for case in (ONE_VIEW, CROPS, TILES)
    }


@pytest.fixture
def judged(natives, references, tmp_path: Path) -> Callable[..., ParityReport]:
    def judge(case: Case, *runs: str) -> ParityReport:
        reference = subset(references[case.name], tmp_path / "some.safetensors")(*runs)
        return check_parity(natives[case.name], reference)

    return judge


def gelu(kind: type, exact: bool = True) -> Callable[[torch.nn.Module], None]:
    return every(kind, lambda module: setattr(module, "activation_fn", torch.nn.GELU("none" if exact else "tanh")))


def under(path: str, change: Callable[[torch.nn.Module], None]) -> Callable[[torch.nn.Module], None]:
    def apply(model: torch.nn.Module) -> None:
        for module in model.get_submodule(path).modules():
            if isinstance(module, torch.nn.LayerNorm):
                change(module)

    return apply


def rows_columns_colours(module: torch.nn.Module) -> None:
    """A patch's values taken in another order than colour, row, column."""
    width, colours, side, _ = module.weight.shape
    other = module.weight.reshape(width, side, side, colours).permute(0, 3, 1, 2)
    module.weight.copy_(other.clone())


def split_a_head(model: torch.nn.Module) -> None:
    """Query, key and value taken head by head from one matrix, whose rows are all queries, keys, values."""
    for layer in model.get_submodule(LAYERS):
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        fused = torch.cat([part.weight for part in parts]).reshape(HEADS, 3, HEAD_WIDTH, -1)
        for place, part in enumerate(parts):
            part.weight.copy_(fused[:, place].flatten(0, 1).clone())


def whole_head_rotary(model: torch.nn.Module) -> None:
    text = model.get_submodule(TEXT)
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, HEAD_WIDTH, 2, dtype=torch.float) / HEAD_WIDTH))
    text.rotary_emb.inv_freq = frequencies
    for layer in text.layers:
        layer.self_attn.rotary_ndims = HEAD_WIDTH


def double_theta(model: torch.nn.Module) -> None:
    rotary = model.get_submodule(TEXT).rotary_emb
    count = len(rotary.inv_freq)
    rotary.inv_freq = 1.0 / (20000.0 ** (torch.arange(count, dtype=torch.float) / count))


def half_the_heads(module: torch.nn.Module) -> None:
    module.num_heads, module.head_dim, module.scale = (
        module.num_heads // 2,
        module.head_dim * 2,
        (module.head_dim * 2) ** -0.5,
    )


MISTAKES = [
    Mistake("patch_values_in_another_order", on(f"{TOWER}.embeddings.patch_embedding", rows_columns_colours),
            "vision.patches", module=f"{TOWER}.embeddings.patch_embedding"),
    Mistake("tower_epsilon_1e-6", under(TOWER, lambda norm: setattr(norm, "eps", 1e-6)), "vision.layers.0",
            module=f"{BLOCKS}.0.layer_norm1"),
    Mistake("exact_gelu_in_the_tower", gelu(SiglipMLP), "vision.layers.0", module=f"{BLOCKS}.0.mlp.activation_fn"),
    Mistake("half_the_heads_in_the_tower", every(SiglipAttention, half_the_heads), "vision.layers.0",
            module=f"{BLOCKS}.0.self_attn.q_proj"),
    Mistake("last_norm_of_the_tower_skipped", attribute(TOWER, "post_layernorm", torch.nn.Identity()), "vision"),
    Mistake("exact_gelu_in_the_projector", attribute(PROJECTOR, "act", torch.nn.GELU()), "projector",
            module=f"{PROJECTOR}.act"),
    Mistake("query_and_key_swapped", swap(f"{LAYERS}.1.self_attn.q_proj", f"{LAYERS}.1.self_attn.k_proj"),
            "decoder.layers.1", module=f"{LAYERS}.1.self_attn.k_proj"),
    Mistake("fused_matrix_split_head_by_head", split_a_head, "decoder.layers.0",
            module=f"{LAYERS}.0.self_attn.q_proj"),
    Mistake("rotary_over_the_whole_head", whole_head_rotary, "decoder.layers.0",
            module=f"{LAYERS}.0.self_attn.q_proj"),
    Mistake("rotary_base_doubled", double_theta, "decoder.layers.0", module=f"{LAYERS}.0.self_attn.q_proj"),
    Mistake("exact_gelu_in_the_text", gelu(PhiMLP), "decoder.layers.0", module=f"{LAYERS}.0.mlp.activation_fn"),
    Mistake("text_epsilon_1e-6", under(TEXT, lambda norm: setattr(norm, "eps", 1e-6)), "decoder.layers.0",
            module=f"{LAYERS}.0.input_layernorm"),
    Mistake("head_without_its_bias", on("lm_head", lambda head: head.bias.zero_()), "logits", module="lm_head"),
]  # fmt: skip


def found(mistake: Mistake, report: ParityReport) -> None:
    assert not report.passed
    assert report.first_departure.seam == mistake.first and mistake.first in report.verdict
    place = report.localisation
    assert place.input_error is None or place.input_error < 1e-5
    if mistake.module:
        assert mistake.module in (*place.modules, *place.inside), place.sentence


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_found_where_it_begins(mistake: Mistake, judged, plant) -> None:
    plant(mistake.plant)
    found(mistake, judged(ONE_VIEW, *RUNS))


@pytest.mark.parametrize(
    ("case", "runs"),
    [(ONE_VIEW, (*RUNS, "train", "greedy")), (CROPS, ("batch", "train", "greedy")), (TILES, ("query1", "greedy1"))],
    ids=lambda each: getattr(each, "name", ""),
)
def test_the_same_runs_agree_without_a_mistake(case: Case, runs: tuple[str, ...], judged) -> None:
    report = judged(case, *runs)
    assert report.passed, report.departures
    assert report.localisation is None


def test_crops_in_another_order_are_found_where_views_are_merged(judged, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = modeling_moondream.merge_views
    monkeypatch.setattr(
        modeling_moondream, "merge_views", lambda views, grids, margin: merge(views, grids.flip(1), margin)
    )
    found(Mistake("crops", lambda model: None, "merged"), judged(CROPS, "batch"))


def test_second_half_left_at_the_whole_view_is_found_where_views_are_merged(
    judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = modeling_moondream.merge_views
    monkeypatch.setattr(
        modeling_moondream, "merge_views", lambda views, grids, margin: merge(views, grids * 0, margin)
    )
    found(Mistake("crops", lambda model: None, "merged"), judged(CROPS, "batch"))


def test_margins_that_overlap_kept_are_found_in_the_projector(judged, plant) -> None:
    plant(lambda model: setattr(model.config, "overlap_margin", 0))
    found(Mistake("margin", lambda model: None, "projector"), judged(TILES, "query1"))


def test_image_attended_to_in_one_direction_is_found_in_the_text(judged, plant) -> None:
    plant(lambda model: setattr(model.config, "prefix_bidirectional", False))
    found(Mistake("prefix", lambda model: None, "decoder.layers.2"), judged(TILES, "query0"))


def test_padding_attended_to_is_found_in_the_logits(judged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left padding carries the start token: without the mask every position sees it."""
    table = registry()["moondream2"].parity
    whole = table.complete

    def unmasked(kind, tensors, options, config):
        arguments = whole(kind, tensors, options, config)
        return arguments | {"attention_mask": torch.ones_like(arguments["attention_mask"])}

    monkeypatch.setattr("weightport.families.moondream2.parity.MOONDREAM2", replace(table, complete=unmasked))
    report = judged(ONE_VIEW, "batch")
    assert report.first_departure.seam == "logits"


def test_scaled_attention_of_another_width_is_found(judged, plant) -> None:
    plant(every(PhiAttention, lambda attention: setattr(attention, "scaling", 1.0)))
    found(Mistake("scaling", lambda model: None, "decoder.layers.0"), judged(CROPS, "alone0"))
