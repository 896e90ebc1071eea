"""Mistakes that ports of Florence-2 have made, planted in the native model and found where they begin.

In float64, where the references are and where an epsilon shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import florence2_cases
import pytest
import torch
from golden_case import Case
from reference_subsets import subset
from test_planted_mistakes import Mistake, attribute, on, roll, scale, swap, transpose

from weightport.api import check_parity, convert
from weightport.families.registry import registry
from weightport.parity import ParityReport

CASE = Case(Path(__file__).parents[1] / "golden/cases/florence2/tiny-main", "tiny-main")
TOWER, PROJECTOR, TEXT = "model.vision_tower", "model.multi_modal_projector", "model.language_model"
POSITIONS = f"{PROJECTOR}.image_position_embed"
RUNS = ("batch", "alone0")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("florence2") / "native"
    convert(CASE.materialize(out.parent / "original"), out, "florence2")
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return florence2_cases.write_case(CASE, tmp_path_factory.mktemp("reference") / "reference.safetensors")


@pytest.fixture
def judged(native: Path, whole: Path, tmp_path: Path) -> Callable[..., ParityReport]:
    return lambda *runs: check_parity(
        native, subset(whole, tmp_path / "some.safetensors")(*runs), dtypes=[torch.float64]
    )


def under(path: str, change: Callable[[torch.nn.Module], None]) -> Callable[[torch.nn.Module], None]:
    def apply(model: torch.nn.Module) -> None:
        for module in model.get_submodule(path).modules():
            if isinstance(module, torch.nn.LayerNorm):
                change(module)

    return apply


def flip(module: torch.nn.Module) -> None:
    module.weight.copy_(module.weight.flip(-1).clone())


LAYER = f"{TEXT}.encoder.layers"
MISTAKES = [
    Mistake("tower_norm_epsilon_1e-6_for_1e-5", under(TOWER, lambda norm: setattr(norm, "eps", 1e-6)),
            "vision.stages.0", RUNS, f"{TOWER}.convs.0"),
    Mistake("depthwise_kernel_mirrored", on(f"{TOWER}.blocks.2.0.spatial_block.conv1", flip),
            "vision.stages.2", RUNS, f"{TOWER}.blocks.2.0.spatial_block.conv1"),
    Mistake("image_projection_scaled", on(f"{PROJECTOR}.image_projection", scale(1.001)),
            "projector", RUNS, PROJECTOR),
    Mistake("rows_and_columns_swapped",
            swap(f"{POSITIONS}.row_embeddings", f"{POSITIONS}.column_embeddings"),
            "projector", RUNS, f"{POSITIONS}.row_embeddings"),
    Mistake("positions_offset_by_one", on(f"{TEXT}.encoder.embed_positions", roll),
            "encoder.embeddings", RUNS, f"{TEXT}.encoder.embed_positions"),
    Mistake("query_transposed", on(f"{LAYER}.1.self_attn.q_proj", transpose),
            "encoder.layers.1", RUNS, f"{LAYER}.1.self_attn.q_proj"),
    Mistake("attention_scale_missing", attribute(f"{LAYER}.0.self_attn", "scaling", 1.0),
            "encoder.layers.0", RUNS, f"{LAYER}.0.self_attn.q_proj"),
    Mistake("query_and_key_swapped",
            swap(f"{TEXT}.decoder.layers.1.encoder_attn.q_proj", f"{TEXT}.decoder.layers.1.encoder_attn.k_proj"),
            "decoder.layers.1", RUNS, f"{TEXT}.decoder.layers.1.encoder_attn.k_proj"),
    Mistake("tanh_gelu", attribute(f"{TEXT}.decoder.layers.0", "activation_fn", torch.nn.GELU("tanh")),
            "decoder.layers.0", RUNS, f"{TEXT}.decoder.layers.0.activation_fn"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_found_where_it_begins(mistake: Mistake, judged, plant) -> None:
    plant(mistake.plant)
    report = judged(*mistake.runs)
    assert report.first_departure.seam == mistake.first and mistake.first in report.verdict
    place = report.localisation
    assert place.input_error is None or place.input_error < 1e-12
    assert mistake.module in (*place.modules, *place.inside), place.sentence


def test_the_same_runs_agree_without_a_mistake(judged) -> None:
    report = judged(*RUNS, "masked0", "train.pad_as_label")
    assert report.passed, report.departures
    assert report.localisation is None


def changed(monkeypatch: pytest.MonkeyPatch, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make the family's arguments wrong."""
    family = registry()["florence2"].parity

    def complete(*args):
        arguments = family.complete(*args)
        return arguments | {name: change(arguments[name]) for name, change in changes.items() if name in arguments}

    monkeypatch.setattr("weightport.families.florence2.parity.FLORENCE2", replace(family, complete=complete))


def test_inverted_mask_shows_in_the_encoder(judged, monkeypatch) -> None:
    changed(monkeypatch, attention_mask=lambda mask: 1 - mask)
    report = judged("masked0")
    # This run holds nothing before the encoder's output.
    assert report.first_departure.seam == "encoder"
    assert f"{TEXT}.encoder" in report.localisation.modules


def test_padding_left_out_of_the_loss_shows_there_and_not_before(judged, monkeypatch) -> None:
    changed(monkeypatch, labels=lambda labels: labels.masked_fill(labels == 1, -100))
    report = judged("train.pad_as_label")
    assert report.first_departure.seam == "loss"
