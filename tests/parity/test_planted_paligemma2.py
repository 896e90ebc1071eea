"""Mistakes that ports of PaliGemma have made, planted in the native model and found where they begin."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import paligemma2_cases
import pytest
import torch
from golden_case import Case
from reference_subsets import subset
from test_planted_mistakes import Mistake, attribute, every, on, scale, swap
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2MLP, Gemma2RMSNorm
from transformers.models.paligemma import modeling_paligemma
from transformers.models.siglip.modeling_siglip import SiglipMLP

from weightport.api import check_parity, convert
from weightport.families.registry import registry
from weightport.parity import ParityReport

CASE = Case(Path(__file__).parents[1] / "golden/cases/paligemma2/tiny-gemma2", "tiny-gemma2")
TOWER, PROJECTOR, TEXT = "model.vision_tower", "model.multi_modal_projector", "model.language_model"
LAYERS = f"{TEXT}.layers"
RUNS = ("forward",)
TRAINING = ("train.token_mean", "train.trainer")
WIDTH, HEADS, HEAD_WIDTH = 40, 4, 16


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paligemma2") / "native"
    convert(CASE.materialize(out.parent / "original"), out, "paligemma2")
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paligemma2_cases.write_case(CASE, tmp_path_factory.mktemp("reference") / "reference.safetensors")


@pytest.fixture
def judged(native: Path, whole: Path, tmp_path: Path) -> Callable[..., ParityReport]:
    return lambda *runs: check_parity(
        native, subset(whole, tmp_path / "some.safetensors")(*runs), dtypes=[torch.float32]
    )


def permute(*dims: int) -> Callable[[torch.nn.Module], None]:
    return lambda module: module.weight.copy_(module.weight.permute(dims).clone())


def reverse_colours(module: torch.nn.Module) -> None:
    module.weight.copy_(module.weight.flip(1).clone())


def interleave_heads(module: torch.nn.Module) -> None:
    """Rows of all heads by turns, as rotary halves of other models are stored."""
    weight = module.weight.view(HEADS, HEAD_WIDTH, WIDTH).transpose(0, 1).reshape(HEADS * HEAD_WIDTH, WIDTH)
    module.weight.copy_(weight.clone())


def add_one(module: torch.nn.Module) -> None:
    module.weight.add_(1.0)


def fill_scale(module: torch.nn.Module) -> None:
    module.embed_scale.fill_(1.0)


def short_window(model: torch.nn.Module) -> None:
    """The window of every other layer, shorter than the text: what 896 px make of the published configuration."""
    text = model.config.text_config
    text.sliding_window, text.layer_types = 8, ["sliding_attention", "full_attention"] * 2
    for layer in model.model.language_model.layers:
        layer.self_attn.sliding_window = 8


MISTAKES = [
    Mistake("patch_kernel_transposed", on(f"{TOWER}.embeddings.patch_embedding", permute(0, 1, 3, 2)),
            "vision.embeddings", module=f"{TOWER}.embeddings.patch_embedding"),
    Mistake("colours_reversed", on(f"{TOWER}.embeddings.patch_embedding", reverse_colours), "vision.embeddings",
            module=f"{TOWER}.embeddings.patch_embedding"),
    Mistake("exact_gelu_in_the_tower", every(SiglipMLP, lambda m: setattr(m, "activation_fn", torch.nn.GELU())),
            "vision.layers.0", module=f"{TOWER}.encoder.layers.0.mlp.activation_fn"),
    Mistake("tower_epsilon_of_torch", every(torch.nn.LayerNorm, lambda m: setattr(m, "eps", 1e-5)),
            "vision.layers.0", module=f"{TOWER}.encoder.layers.0.layer_norm1"),
    Mistake("last_norm_of_the_tower_skipped", attribute(TOWER, "post_layernorm", torch.nn.Identity()), "vision"),
    Mistake("image_tokens_divided_by_the_root_of_the_width", on(f"{PROJECTOR}.linear", scale(WIDTH**-0.5)),
            "projector", module=PROJECTOR),
    Mistake("embedding_factor_missing", on(f"{TEXT}.embed_tokens", fill_scale), "decoder.embeddings"),
    Mistake("norms_stored_with_their_one", every(Gemma2RMSNorm, add_one), "decoder.layers.0",
            module=f"{LAYERS}.0.input_layernorm"),
    Mistake("norms_around_the_mlp_swapped",
            swap(f"{LAYERS}.1.post_attention_layernorm", f"{LAYERS}.1.pre_feedforward_layernorm"),
            "decoder.layers.1", module=f"{LAYERS}.1.pre_feedforward_layernorm"),
    Mistake("gate_and_up_swapped", swap(f"{LAYERS}.2.mlp.gate_proj", f"{LAYERS}.2.mlp.up_proj"),
            "decoder.layers.2", module=f"{LAYERS}.2.mlp.gate_proj"),
    Mistake("key_and_value_swapped", swap(f"{LAYERS}.0.self_attn.k_proj", f"{LAYERS}.0.self_attn.v_proj"),
            "decoder.layers.0", module=f"{LAYERS}.0.self_attn.k_proj"),
    Mistake("query_heads_interleaved", on(f"{LAYERS}.1.self_attn.q_proj", interleave_heads),
            "decoder.layers.1", module=f"{LAYERS}.1.self_attn.q_proj"),
    Mistake("query_scale_of_the_other_convention",
            every(Gemma2Attention, lambda m: setattr(m, "scaling", (WIDTH // HEADS) ** -0.5)),
            "decoder.layers.0", module=f"{LAYERS}.0.self_attn.q_proj"),
    Mistake("attention_softcap_missing",
            every(Gemma2Attention, lambda m: setattr(m, "attn_logit_softcapping", None)),
            "decoder.layers.0", module=f"{LAYERS}.0.self_attn.q_proj"),
    Mistake("exact_gelu_in_the_text", every(Gemma2MLP, lambda m: setattr(m, "act_fn", torch.nn.GELU())),
            "decoder.layers.0", module=f"{LAYERS}.0.mlp.act_fn"),
    Mistake("norm_epsilon", every(Gemma2RMSNorm, lambda m: setattr(m, "eps", 1e-5)), "decoder.layers.0",
            module=f"{LAYERS}.0.input_layernorm"),
    Mistake("window_shorter_than_the_text", short_window, "decoder.layers.0", module=f"{LAYERS}.0.self_attn.q_proj"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_found_where_it_begins(mistake: Mistake, judged, plant) -> None:
    plant(mistake.plant)
    report = judged(*RUNS)
    assert not report.passed
    assert report.first_departure.seam == mistake.first and mistake.first in report.verdict
    place = report.localisation
    assert place.input_error is None or place.input_error < 1e-5
    if mistake.module:
        assert mistake.module in (*place.modules, *place.inside), place.sentence


def test_the_same_runs_agree_without_a_mistake(judged) -> None:
    report = judged(*RUNS, *TRAINING, "greedy")
    assert report.passed, report.departures
    assert report.localisation is None


def test_samples_compute_the_same_alone_behind_padding_and_step_by_step(native: Path, whole: Path) -> None:
    report = check_parity(native, whole, invariance=True)
    assert report.passed, report.departures
    found = {each.seam for each in report.comparisons if each.seam.startswith("invariance.")}
    assert found == {"invariance.batch", "invariance.padding", "invariance.cache"}


def test_rows_that_padding_adds_are_not_compared(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "padded"
    convert(CASE.materialize(tmp_path / "original"), out, "paligemma2", pad_vocab=True, final_softcap="30")
    report = check_parity(out, whole)
    assert report.passed, report.departures
    assert not report.not_compared


@pytest.mark.skipif(
    "final_logit_softcapping" not in inspect.getsource(modeling_paligemma),
    reason="this transformers has no final softcap in PaliGemma: there is nothing to plant",
)
def test_final_softcap_shows_in_the_loss(judged, plant) -> None:
    plant(lambda model: setattr(model.config.text_config, "final_logit_softcapping", 30.0))
    report = judged(*TRAINING)
    assert report.first_departure.seam == "loss"


def changed(monkeypatch: pytest.MonkeyPatch, **changes: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Make the family's arguments wrong; None leaves one out."""
    family = registry()["paligemma2"].parity

    def complete(*args):
        arguments = family.complete(*args)
        made = arguments | {name: change(arguments[name]) for name, change in changes.items() if name in arguments}
        return {name: value for name, value in made.items() if value is not None}

    monkeypatch.setattr("weightport.families.paligemma2.parity.PALIGEMMA2", replace(family, complete=complete))


@pytest.mark.parametrize("wrong", [lambda types: None, torch.zeros_like], ids=["causal prefix", "suffix seen by all"])
def test_wrong_token_types_show_in_the_first_layer(judged, monkeypatch, wrong) -> None:
    changed(monkeypatch, token_type_ids=wrong)
    report = judged(*RUNS)
    assert report.first_departure.seam == "decoder.layers.0"
    assert f"{LAYERS}.0" in report.localisation.modules


def test_prompts_without_token_types_get_other_answers(judged, monkeypatch) -> None:
    changed(monkeypatch, token_type_ids=lambda types: None)
    assert judged("greedy").first_departure.seam == "sequences"


def test_unmasked_padding_gives_other_answers(judged, monkeypatch) -> None:
    changed(monkeypatch, attention_mask=torch.ones_like)
    assert judged("greedy").first_departure.seam == "sequences"


def test_mean_over_the_wrong_tokens_shows_in_the_loss(judged, monkeypatch) -> None:
    family = registry()["paligemma2"].parity
    same = replace(family, training_loss=lambda output, arguments, options, config: None)
    monkeypatch.setattr("weightport.families.paligemma2.parity.PALIGEMMA2", same)
    assert judged("train.token_mean").passed
    assert judged("train.trainer").first_departure.seam == "loss"
