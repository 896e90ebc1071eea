"""Mistakes that ports of BLIP-2 have made, planted in the native model and found where they begin.

In float64, where the references are and where an epsilon shows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import blip2_cases
import pytest
import torch
from golden_case import Case
from reference_subsets import subset
from test_planted_mistakes import Mistake, attribute, on, roll, scale, swap

from weightport.api import check_parity, convert
from weightport.converters.side_file import SIDE_FILE
from weightport.errors import ReferenceFileError
from weightport.families.blip2 import stage_one
from weightport.families.registry import registry
from weightport.parity import ParityReport

CASES = Path(__file__).parents[1] / "golden/cases/blip2"
BLOCK, QUERY, TEXT = "vision_model.encoder.layers.1", "qformer.encoder.layer.0", "language_model.model.decoder"
RUNS = ("forward",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(native directory, whole reference) of a case."""

    @cache
    def make(name: str) -> tuple[Path, Path]:
        case, folder = Case(CASES / name, name), tmp_path_factory.mktemp(name)
        sources = blip2_cases.sources(case, case.materialize(folder / "original"))
        convert(sources, folder / "native", "blip2", **blip2_cases.settings(case))
        return folder / "native", blip2_cases.write_case(case, folder / "reference.safetensors")

    return make


@pytest.fixture
def judged(made, tmp_path: Path) -> Callable[..., ParityReport]:
    def judge(*runs: str, case: str = "opt-tiny") -> ParityReport:
        native, whole = made(case)
        return check_parity(native, subset(whole, tmp_path / "some.safetensors")(*runs), dtypes=[torch.float64])

    return judge


def value_bias_in_the_middle(module: torch.nn.Module) -> None:
    """query, value, zeros: what comes of joining the two biases and filling up."""
    query, zeros, value = module.bias.chunk(3)
    module.bias.copy_(torch.cat([query, value, zeros]))


OPT_MISTAKES = [
    Mistake("block_epsilon_1e-5_for_1e-6", attribute(f"{BLOCK}.layer_norm1", "eps", 1e-5),
            "vision", RUNS, f"{BLOCK}.layer_norm1"),
    Mistake("zeros_behind_the_value_bias", on(f"{BLOCK}.self_attn.qkv", value_bias_in_the_middle),
            "vision", RUNS, f"{BLOCK}.self_attn.qkv"),
    Mistake("tanh_gelu_in_the_vision_encoder", attribute(f"{BLOCK}.mlp", "activation_fn", torch.nn.GELU("tanh")),
            "vision", RUNS, f"{BLOCK}.mlp.activation_fn"),
    Mistake("qformer_epsilon_1e-6_for_1e-12", attribute("qformer.layernorm", "eps", 1e-6),
            "qformer", RUNS, "qformer.layernorm"),
    Mistake("cross_attention_key_and_value_swapped",
            swap(f"{QUERY}.crossattention.attention.key", f"{QUERY}.crossattention.attention.value"),
            "qformer", RUNS, f"{QUERY}.crossattention.attention.key"),
    Mistake("projection_scaled", on("language_projection", scale(1.001)), "projector", RUNS, "language_projection"),
    Mistake("text_positions_offset_by_one", on(f"{TEXT}.embed_positions", roll),
            "logits", RUNS, f"{TEXT}.embed_positions"),
    Mistake("text_attention_unscaled", attribute(f"{TEXT}.layers.0.self_attn", "scaling", 1.0),
            "logits", RUNS, f"{TEXT}.layers.0.self_attn.q_proj"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", OPT_MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_found_where_it_begins(mistake: Mistake, judged, plant) -> None:
    plant(mistake.plant)
    report = judged(*mistake.runs)
    assert report.first_departure.seam == mistake.first and mistake.first in report.verdict
    place = report.localisation
    assert place.input_error is None or place.input_error < 1e-12
    assert mistake.module in (*place.modules, *place.inside), place.sentence


def tied_head(model: torch.nn.Module) -> None:
    """What loading by load_state_dict, or resizing the embedding, does to Flan-T5."""
    text = model.get_submodule("language_model")
    text.lm_head.weight.copy_(text.shared.weight)


@pytest.mark.parametrize(
    ("plant_it", "first", "module"),
    [
        (tied_head, "logits", "language_model.lm_head"),
        (
            attribute("language_model.encoder.block.0.layer.1.DenseReluDense", "act", torch.nn.GELU("tanh")),
            "encoder",
            "language_model.encoder.block.0.layer.1.DenseReluDense.act",
        ),
    ],
    ids=["head_tied_to_the_embedding", "flan_t5s_own_gelu"],
)
def test_mistake_in_t5_is_found_where_it_begins(plant_it, first: str, module: str, judged, plant) -> None:
    plant(plant_it)
    report = judged("forward", "forward.rounded", case="t5-coco-tiny")
    assert report.first_departure.seam == first
    assert module in (*report.localisation.modules, *report.localisation.inside), report.localisation.sentence


@pytest.mark.parametrize("case", ["opt-tiny", "t5-coco-tiny", "itm-tiny"])
def test_the_same_runs_agree_without_a_mistake(case: str, judged) -> None:
    runs = ("itm", "itc", "train") if case == "itm-tiny" else ("forward", "train")
    report = judged(*runs, case=case)
    assert report.passed, report.departures
    assert report.localisation is None


def changed(monkeypatch: pytest.MonkeyPatch, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make the family's arguments wrong."""
    family = registry()["blip2"].parity

    def complete(*args):
        arguments = family.complete(*args)
        return arguments | {name: change(arguments[name]) for name, change in changes.items() if name in arguments}

    monkeypatch.setattr("weightport.families.blip2.parity.BLIP2", replace(family, complete=complete))


def test_labels_at_padding_show_in_the_loss_and_not_before(judged, monkeypatch) -> None:
    changed(monkeypatch, labels=lambda labels: labels.masked_fill(labels == -100, 1))
    report = judged("forward", "train")
    assert report.first_departure.seam == "loss"


def test_text_without_places_for_the_image_shows_in_the_logits(judged, monkeypatch) -> None:
    changed(monkeypatch, input_ids=lambda ids: ids.masked_fill(ids == 349, 5))
    report = judged("forward")
    assert report.first_departure.seam == "logits"


def test_padding_that_is_seen_shows_in_the_matching_head(judged, monkeypatch) -> None:
    changed(monkeypatch, attention_mask=torch.ones_like)
    report = judged("itm", case="itm-tiny")
    assert report.first_departure.seam == "itm"


def words_that_see_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    own = stage_one._captions_mask
    monkeypatch.setattr(stage_one, "_captions_mask", lambda *args: torch.zeros_like(own(*args)))


def no_smoothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_one, "SMOOTHING", 0.0)


def matching_alone_with_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair is its own hard negative."""
    monkeypatch.setattr(stage_one, "_others", lambda similarity: torch.eye(len(similarity), dtype=similarity.dtype))


@pytest.mark.parametrize(
    ("mistake", "first"),
    [
        (words_that_see_what_follows, "loss_lm"),
        (no_smoothing, "loss_itc"),
        (matching_alone_with_other_texts, "loss_itm"),
    ],
)
def test_mistake_in_stage_1_shows_in_the_loss_that_it_is_of(mistake, first: str, judged, monkeypatch) -> None:
    mistake(monkeypatch)
    report = judged("train", case="itm-tiny")
    assert report.first_departure.seam == first


def test_stage_1s_own_parameters_have_their_gradients_and_come_from_the_side_file(judged, plant) -> None:
    plant(lambda model: model.temp.mul_(1.01))
    report = judged("train", case="itm-tiny")
    assert report.first_departure.seam == "loss_itc"
    assert {"grad_norm.temp", "grad_norm.Qformer.cls.predictions.bias"} <= {each.seam for each in report.comparisons}


def test_without_the_side_file_stage_1_has_no_losses(made, tmp_path: Path) -> None:
    native, whole = made("itm-tiny")
    bare = Path(shutil.copytree(native, tmp_path / "bare"))
    (bare / SIDE_FILE).unlink()
    reference = subset(whole, tmp_path / "some.safetensors")("train")
    with pytest.raises(ReferenceFileError, match=r"it computes no loss: .* unconverted\.sft"):
        check_parity(bare, reference, dtypes=[torch.float64])


def test_the_native_class_alone_departs_at_its_norm_behind_the_vision_encoder(judged, monkeypatch) -> None:
    family = registry()["blip2"].parity
    monkeypatch.setattr("weightport.families.blip2.parity.BLIP2", replace(family, correction=None))
    report = judged("forward")
    assert report.first_departure.seam == "vision.norm"
    assert "vision_model.post_layernorm" in (*report.localisation.modules, *report.localisation.inside)


def test_the_report_states_what_the_correction_changes(judged) -> None:
    report = judged("forward")
    (note,) = [note for note in report.notes if "corrected while measured" in note]
    assert "differ by 9." in note and "e-06" in note
