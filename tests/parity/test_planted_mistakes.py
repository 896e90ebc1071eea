"""A check that cannot fail proves nothing: mistakes that ports have made, planted and found where they begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from weightport.api import check_parity, load_native
from weightport.families.registry import registry
from weightport.modeling.ofa import modeling_ofa
from weightport.parity import read_reference
from weightport.parity.runner import native_arguments


@dataclass(frozen=True)
class Mistake:
    """What is done to the model, in which runs it shows, and the first seam that has to name it."""

    name: str
    plant: Callable[[torch.nn.Module], None]
    first: str
    runs: tuple[str, ...] = ("image_text",)
    module: str = ""


def on(path: str, change: Callable[[torch.nn.Module], None]) -> Callable[[torch.nn.Module], None]:
    return lambda model: change(model.get_submodule(path))


def transpose(module: torch.nn.Module) -> None:
    module.weight.copy_(module.weight.T.clone())


def roll(module: torch.nn.Module) -> None:
    module.weight.copy_(module.weight.roll(1, 0))


def without_head_scale(attention: torch.nn.Module) -> None:
    attention.c_attn.fill_(1.0)


def swap_rows(module: torch.nn.Module) -> None:
    module.weight.copy_(module.weight.flip(0).clone())


def scale(factor: float) -> Callable[[torch.nn.Module], None]:
    return lambda module: module.weight.mul_(factor).data


def epsilon(value: float) -> Callable[[torch.nn.Module], None]:
    def change(module: torch.nn.Module) -> None:
        module.eps = value

    return change


def every(kind: type, change: Callable[[torch.nn.Module], None]) -> Callable[[torch.nn.Module], None]:
    def apply(model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                change(module)

    return apply


def attribute(path: str, name: str, value: object) -> Callable[[torch.nn.Module], None]:
    return on(path, lambda module: setattr(module, name, value))


def swap(a: str, b: str) -> Callable[[torch.nn.Module], None]:
    def change(model: torch.nn.Module) -> None:
        first, second = model.get_submodule(a), model.get_submodule(b)
        kept = first.weight.clone()
        first.weight.copy_(second.weight)
        second.weight.copy_(kept)

    return change


ENCODER, DECODER = "model.encoder", "model.decoder"
HEAD_DIM_SCALE = 2**0.5

MISTAKES = [
    Mistake("batch_norm_epsilon_of_another_option", every(torch.nn.BatchNorm2d, epsilon(1e-3)), "vision",
            module=f"{ENCODER}.vision_tower"),
    Mistake("layer_norm_epsilon_of_bert", every(torch.nn.LayerNorm, epsilon(1e-12)), "encoder.positions"),
    Mistake("image_projection_scaled", on(f"{ENCODER}.image_proj", scale(1.001)), "projector",
            module=f"{ENCODER}.image_proj"),
    Mistake("type_rows_swapped", on(f"{ENCODER}.type_embedding", swap_rows), "encoder.embeddings",
            module=f"{ENCODER}.type_embedding"),
    Mistake("query_transposed", on(f"{ENCODER}.layers.1.self_attn.q_proj", transpose), "encoder.layers.1",
            module=f"{ENCODER}.layers.1.self_attn.q_proj"),
    Mistake("query_and_key_swapped",
            swap(f"{DECODER}.layers.1.self_attn.q_proj", f"{DECODER}.layers.1.self_attn.k_proj"),
            "decoder.layers.1", module=f"{DECODER}.layers.1.self_attn.k_proj"),
    Mistake("positions_offset_by_one", on(f"{ENCODER}.embed_positions", roll),
            "encoder.positions", module=f"{ENCODER}.embed_positions"),
    Mistake("head_scale_missing", on(f"{ENCODER}.layers.0.self_attn", without_head_scale),
            "encoder.layers.0", module=f"{ENCODER}.layers.0.self_attn.out_proj"),
    Mistake(
        "attention_scaled_as_usual",
        every(modeling_ofa.OFAAttention, lambda m: setattr(m, "scaling", m.scaling * HEAD_DIM_SCALE)),
        "encoder.layers.0",
        module=f"{ENCODER}.layers.0.self_attn.out_proj",
    ),
    Mistake("tanh_gelu", every(modeling_ofa.OFALayer, lambda m: setattr(m, "activation_fn", torch.nn.GELU("tanh"))),
            "encoder.layers.0", module=f"{ENCODER}.layers.0.activation_fn"),
    Mistake("final_norm_missing", attribute(ENCODER, "layer_norm", None), "encoder"),
    Mistake("decoder_relative_table_missing", on(f"{DECODER}.token_rel_pos_tables.1", scale(0.0)), "decoder.layers.1",
            module=f"{DECODER}.token_rel_pos_tables.1"),
    Mistake(
        "cross_and_self_norm_swapped",
        swap(f"{DECODER}.layers.0.self_attn_output_norm", f"{DECODER}.layers.0.cross_attn_output_norm"),
        "decoder.layers.0",
        module=f"{DECODER}.layers.0.cross_attn_output_norm",
    ),
    Mistake("code_norm_taken_from_text", swap(f"{DECODER}.layernorm_embedding", f"{DECODER}.code_layernorm_embedding"),
            "logits", ("code_all",)),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_found_where_it_begins(mistake: Mistake, native, reference, plant) -> None:
    plant(mistake.plant)
    report = check_parity(native, reference(*mistake.runs), dtypes=[torch.float32])
    assert not report.passed
    assert report.first_departure.seam == mistake.first
    assert mistake.first in report.verdict
    place = report.localisation
    assert place.seam == mistake.first and place.sentence.startswith(f"{mistake.first}: ")
    assert place.input_error is None or place.input_error < 1e-5
    assert not mistake.module or mistake.module in (*place.modules, *place.inside)


def test_the_same_runs_agree_without_a_mistake(native, reference) -> None:
    runs = {run for mistake in MISTAKES for run in mistake.runs}
    report = check_parity(native, reference(*sorted(runs)), dtypes=[torch.float32])
    assert report.passed, report.departures


def test_error_below_float32_noise_is_found_in_float64(native, reference, plant) -> None:
    plant(on(f"{DECODER}.layer_norm", scale(1 + 1e-9)))
    report = check_parity(native, reference("text"))
    assert {each.dtype for each in report.departures} == {"float64"}
    assert report.first_departure.seam == "logits"


def test_dropped_patch_masks_show_in_the_source_mask(native, reference, monkeypatch) -> None:
    family = registry()["ofa"].parity

    def without_masks(*args):
        arguments = family.complete(*args)
        arguments.pop("patch_masks", None)
        return arguments

    monkeypatch.setattr("weightport.families.ofa.parity.OFA", replace(family, complete=without_masks))
    report = check_parity(native, reference("patch_masks"), dtypes=[torch.float32])
    assert report.first_departure.seam == "encoder.mask"


def test_inverted_padding_mask_shows_in_the_source_mask(native, reference, monkeypatch) -> None:
    family = registry()["ofa"].parity

    def inverted(*args):
        arguments = family.complete(*args)
        return {**arguments, "attention_mask": 1 - arguments["attention_mask"]}

    monkeypatch.setattr("weightport.families.ofa.parity.OFA", replace(family, complete=inverted))
    report = check_parity(native, reference("patch_masks"), dtypes=[torch.float32])
    assert report.first_departure.seam == "encoder.mask"
    assert report.localisation.modules == ("model.encoder (masks)",)


FINER = ("encoder.layers.1.self_attn", "encoder.layers.1.fc1", "encoder.layers.1.fc2", "decoder.layers.0.encoder_attn")


def test_finer_seams_narrow_the_place_down(native, reference, plant) -> None:
    """What the original gives inside its layers stands in no golden case: the model that agrees with it stands in."""
    family, model = registry()["ofa"].parity, load_native(native, torch.float32)
    run = next(run for run in read_reference(reference("image_text")).runs)
    values: dict[str, torch.Tensor] = {}
    for name in FINER:
        seam, layer = next((s, n) for s in family.seams if (n := s.layer_of(name)) is not None)

        def keep(module, args, output, name=name, seam=seam) -> None:
            values[f"image_text/out/{name}"] = seam.pick(output).clone()

        model.get_submodule(seam.module.replace("*", layer)).register_forward_hook(keep)
    with torch.no_grad():
        model(**native_arguments(family, run, model), use_cache=False)
    finer = reference("image_text", change=lambda runs, tensors, slices: tensors.update(values))
    plant(on(f"{ENCODER}.layers.1", lambda module: setattr(module, "activation_fn", torch.nn.GELU("tanh"))))
    report = check_parity(native, finer, dtypes=[torch.float32])
    assert report.first_departure.seam == "encoder.layers.1.fc2"
    place = report.localisation
    assert place.input_seam == "encoder.layers.1.fc1" and place.input_error < 1e-6 < place.output_error
    assert place.modules == tuple(f"{ENCODER}.layers.1.{each}" for each in ("activation_fn", "ffn_layer_norm", "fc2"))
    assert "encoder.layers.1.fc2: input (encoder.layers.1.fc1) equal" in place.sentence


def test_missing_label_smoothing_shows_in_the_loss_and_not_before(native, reference, monkeypatch) -> None:
    def unsmoothed(logits, labels, *args, **kwargs):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    monkeypatch.setattr(modeling_ofa, "ofa_label_smoothed_loss", unsmoothed)
    report = check_parity(native, reference("image_text", "train.eval_eps0.1"), dtypes=[torch.float32])
    assert report.first_departure.seam == "loss"


def test_label_smoothing_of_the_library_shows_in_the_gradients(native, reference, monkeypatch) -> None:
    def smoothed(logits, labels, label_smoothing=0.0, **kwargs):
        # Spread over V entries in place of V - 1: the loss itself hardly changes.
        targets = labels.flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=label_smoothing)

    monkeypatch.setattr(modeling_ofa, "ofa_label_smoothed_loss", smoothed)
    report = check_parity(native, reference("train.eval_eps0.1"), dtypes=[torch.float32])
    assert not report.passed
    assert all(each.seam.startswith(("loss", "grad")) for each in report.departures)


def test_wrong_gradient_shows_under_the_original_parameter_name(native, reference, plant) -> None:
    plant(
        lambda model: model.model.encoder.image_proj.weight.register_hook(lambda gradient: gradient * 1.001) and None
    )
    report = check_parity(native, reference("train.eval_eps0.1"), dtypes=[torch.float32])
    wrong = {each.seam for each in report.departures}
    assert {"grad.encoder.image_proj.weight", "grad_norm.encoder.image_proj.weight"} <= wrong
    assert not any("pos_q_linear" in seam or "layers" in seam for seam in wrong)


def test_batch_statistics_in_evaluation_show_in_the_loss(native, reference, plant) -> None:
    plant(lambda model: setattr(model, "eval", model.train) or model.train())
    report = check_parity(native, reference("image_text"), dtypes=[torch.float32])
    assert report.first_departure.seam == "vision"


def test_free_end_token_shows_in_the_scores_of_beams(native, reference, plant) -> None:
    def free(model: torch.nn.Module) -> None:
        model.generation_config.ofa_eos_at_max_length = False
        model.generation_config.forced_eos_token_id = model.config.eos_token_id

    plant(free)
    report = check_parity(native, reference("generate.beam5"), dtypes=[torch.float32])
    assert not report.passed
    assert {each.seam for each in report.departures} >= {"scores"}


def test_nan_departs_and_is_named(native, reference, plant) -> None:
    plant(on(f"{DECODER}.layers.0.fc1", lambda module: module.bias.fill_(torch.nan).data))
    report = check_parity(native, reference("image_text"), dtypes=[torch.float32])
    assert report.first_departure.seam == "decoder.layers.0"
    assert "NaN" in report.verdict
