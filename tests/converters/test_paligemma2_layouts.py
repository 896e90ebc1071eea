"""big_vision's forms of PaliGemma: prefixes, stacked and unstacked towers, element types, and what options decide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from paligemma2_checkpoints import VOCABULARY, arrays, originals, trainer_step, under, unstacked_text, write
from safetensors.torch import load_file

from weightport.api import convert, export, plan_conversion
from weightport.errors import ConfigurationError, UsageError
from weightport.families.paligemma2.variants import VARIANTS


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Callable[[str], Path]:
    return originals(tmp_path_factory)


@pytest.fixture(scope="module")
def plain(original, tmp_path_factory) -> Path:
    """tiny-gemma2, converted as it is."""
    return convert(original("tiny-gemma2"), tmp_path_factory.mktemp("plain") / "out").directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


FORMS = {
    "no prefix": lambda tensors: under("", tensors),
    "of old trainers": lambda tensors: under("opt/target/", tensors) | {"opt/state/step": np.array(3)},
    "unstacked text": unstacked_text,
}


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model_and_comes_back_as_it_was(
    original, plain: Path, tmp_path: Path, form: str, compressed: bool
) -> None:
    given = FORMS[form](arrays(original("tiny-gemma2")))
    out = convert(write(tmp_path / "form.npz", given, compressed=compressed), tmp_path / "out").directory
    assert same(weights(out), weights(plain))
    back = arrays(export(out, tmp_path / "back.npz").path)
    assert list(back) == [name for name in given if name != "opt/state/step"]
    assert all(array.dtype == given[name].dtype and np.array_equal(array, given[name]) for name, array in back.items())


@pytest.mark.parametrize("name", ["tiny-trainstate", "tiny-bf16"])
def test_trainers_folder_gives_the_same_model_and_comes_back_as_an_npz(original, tmp_path: Path, name: str) -> None:
    given = arrays(original(name))
    trainer_step(tmp_path / "work" / "checkpoint.bv-000000100", given)
    (tmp_path / "work" / "checkpoint.bv-LAST").write_text("000000100")
    (tmp_path / "work" / VOCABULARY.name).write_bytes(VOCABULARY.read_bytes())
    made = convert(tmp_path / "work", tmp_path / "out")
    same_file = convert(original(name), tmp_path / "of_file").directory
    assert same(weights(made.directory), weights(same_file))
    assert "The step is checkpoint.bv-000000100." in made.model.notes
    assert made.model.unread == plan_conversion(original(name), vocabulary="none").model.unread
    source = json.loads((made.directory / "conversion.json").read_text())["sources"]["checkpoint"]
    assert source["format"] == "zarr-folder" and source["name"] == "checkpoint.bv-000000100"
    assert "params~img~head~bias/0" in {file["name"] for file in source["files"]}
    assert (made.directory / "processor_config.json").is_file()
    back = arrays(export(made.directory, tmp_path / "back.npz").path)
    wanted = {key: array for key, array in given.items() if key.startswith("params/")}
    assert back.keys() == wanted.keys() and all(
        back[key].tobytes() == array.tobytes() for key, array in wanted.items()
    )


def test_what_stands_beside_the_model_is_named_with_its_size(original) -> None:
    model = plan_conversion(original("tiny-trainstate"), vocabulary="none").model
    skipped = {name: array.nbytes for name, array in arrays(original("tiny-trainstate")).items()}
    assert model.unread == {
        "optimizer state": sum(size for name, size in skipped.items() if name.startswith("opt/")),
        "the trainer's counters": sum(size for name, size in skipped.items() if name.startswith("chrono/")),
    }
    assert model.options["unread"] == model.unread and min(model.unread.values()) > 0


def test_directory_without_a_record_is_exported_stacked_and_bare(original, tmp_path: Path) -> None:
    out = convert(original("tiny-gemma2"), tmp_path / "out").directory
    (out / "conversion.json").unlink()
    back, given = arrays(export(out, tmp_path / "back.npz").path), arrays(original("tiny-gemma2"))
    assert {f"params/{name}" for name in back} == set(given)
    assert all(np.array_equal(array, given[f"params/{name}"]) for name, array in back.items())


def test_float16_stays_float16_and_comes_back(original, tmp_path: Path) -> None:
    given = {name: array.astype(np.float16) for name, array in arrays(original("tiny-gemma2")).items()}
    out = convert(write(tmp_path / "half.npz", given), tmp_path / "out").directory
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float16}
    assert config(out)["dtype"] == "float16"
    back = arrays(export(out, tmp_path / "back.npz").path)
    assert all(np.array_equal(array, given[name]) and array.dtype == np.float16 for name, array in back.items())


def test_raw_bfloat16_keeps_its_bits(original, tmp_path: Path) -> None:
    given = arrays(original("tiny-bf16"))
    assert {array.dtype.str for array in given.values()} == {"|V2"}
    out = convert(original("tiny-bf16"), tmp_path / "out").directory
    found = weights(out)["language_model.model.embed_tokens.weight"]
    assert found.dtype == torch.bfloat16
    table = given["params/llm/embedder/input_embedding"]
    assert found.view(torch.int16).numpy().tobytes() == table.tobytes()


def test_shapes_of_the_names_on_disk_are_the_hubs(plain: Path) -> None:
    """The names that the official repositories have, and that vLLM and MLX read: not those of the running model."""
    towers = {"vision_tower.vision_model.encoder.layers": 3, "language_model.model.layers": 4}
    vision = [f"layer_norm{n}.{p}" for n in (1, 2) for p in ("weight", "bias")]
    vision += [f"mlp.fc{n}.{p}" for n in (1, 2) for p in ("weight", "bias")]
    vision += [f"self_attn.{x}_proj.{p}" for x in ("q", "k", "v", "out") for p in ("weight", "bias")]
    text = [f"self_attn.{x}_proj.weight" for x in "qkvo"] + [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    text += [f"{x}_layernorm.weight" for x in ("input", "post_attention", "pre_feedforward", "post_feedforward")]
    expected = {
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.bias",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "vision_tower.vision_model.post_layernorm.weight",
        "vision_tower.vision_model.post_layernorm.bias",
        "multi_modal_projector.linear.weight",
        "multi_modal_projector.linear.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
    }
    for (stack, layers), inside in zip(towers.items(), (vision, text)):
        expected |= {f"{stack}.{layer}.{name}" for layer in range(layers) for name in inside}
    assert set(weights(plain)) == expected


def test_gemma_1_calls_the_norm_before_its_mlp_by_another_name(original, tmp_path: Path) -> None:
    given = arrays(original("tiny-gemma1"))
    found = weights(convert(original("tiny-gemma1"), tmp_path / "out").directory)
    for layer, values in enumerate(given["params/llm/layers/pre_ffw_norm/scale"]):
        name = f"language_model.model.layers.{layer}.post_attention_layernorm.weight"
        assert np.array_equal(found[name].numpy(), values)
    assert not any("feedforward" in name for name in found)
    text = config(tmp_path / "out")["text_config"]
    assert text["model_type"] == "gemma" and text["num_key_value_heads"] == 1


def test_configuration_is_read_from_the_shapes(plain: Path) -> None:
    found = config(plain)
    assert found["model_type"] == "paligemma" and found["image_token_index"] == 1664
    assert found["vision_config"]["vision_use_head"] is False and found["vision_config"]["image_size"] == 42
    text = found["text_config"]
    assert (text["hidden_size"], text["head_dim"], text["num_key_value_heads"]) == (40, 16, 2)
    assert text["attn_logit_softcapping"] == 50.0 and text["final_logit_softcapping"] is None
    assert text["query_pre_attn_scalar"] == 16 and set(text["layer_types"]) == {"full_attention"}
    assert json.loads((plain / "generation_config.json").read_text())["eos_token_id"] == 1


def test_no_saved_file_tells_where_the_conversion_ran(plain: Path, original) -> None:
    places = (str(original("tiny-gemma2").parent), str(plain.parent))
    for path in plain.glob("*.json"):
        text = path.read_text()
        assert not any(place in text for place in places), path.name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"final_softcap": "30"}, {"final_logit_softcapping": 30.0}),
        ({"attention_softcap": "none"}, {"attn_logit_softcapping": None}),
        ({"query_scale": "width"}, {"query_pre_attn_scalar": 10}),
        ({"query_scale": "144"}, {"query_pre_attn_scalar": 144}),
        (
            {"sliding_window": "4096"},
            {"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
    ],
)
def test_options_decide_what_shapes_do_not_tell_and_are_recorded(original, tmp_path: Path, options, expected) -> None:
    out = convert(original("tiny-gemma2"), tmp_path / "out", **options).directory
    text = config(out)["text_config"]
    assert {name: text[name] for name in expected} == expected
    recorded = json.loads((out / "conversion.json").read_text())["options"]
    names = {"final_softcap": "final_logit_softcapping", "attention_softcap": "attn_logit_softcapping",
             "query_scalar": "query_pre_attn_scalar"}  # fmt: skip
    assert all(recorded[own] == text[name] for own, name in names.items())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each.name)
def test_released_sizes_are_recognised_and_have_their_own_query_scale(variant) -> None:
    from weightport.families.paligemma2.configuration import Sizes, native_config, settings_of
    from weightport.families.paligemma2.options import PaliGemmaOptions

    sizes = Sizes(variant.shape, variant.generation, 257152, 1152, 27, 16, 4304, 14, 4096)
    settings = settings_of(sizes, PaliGemmaOptions())
    assert settings.variant == variant.name and not settings.notes
    made = native_config(sizes, settings, pad_vocab=False)
    assert made.vision_config.image_size == 896 and made.image_token_id == 257152
    if variant.generation == 2:
        assert made.text_config.query_pre_attn_scalar == {"3b": 256, "10b": 256, "28b": 144}[variant.name]
    padded = native_config(sizes, settings, pad_vocab=True)
    assert padded.text_config.vocab_size == 257216 and padded.image_token_id == 257152


@pytest.mark.parametrize(
    ("name", "parameters"), [("3b", 3_032_094_960), ("10b", 9_662_409_456), ("28b", 27_650_192_112)]
)
def test_released_sizes_have_as_many_parameters_as_the_releases(name: str, parameters: int) -> None:
    from math import prod

    from weightport.families.paligemma2.configuration import Sizes, native_config, settings_of
    from weightport.families.paligemma2.conversion import CONVERSION
    from weightport.families.paligemma2.options import PaliGemmaOptions
    from weightport.families.paligemma2.variants import variant_named

    variant = variant_named(name)
    sizes = Sizes(variant.shape, 2, 257152, 1152, 27, 16, 4304, 14, 256)
    made = native_config(sizes, settings_of(sizes, PaliGemmaOptions()), pad_vocab=False)
    assert sum(map(prod, CONVERSION.targets(made).shapes.values())) == parameters


def test_padded_rows_are_zeros_and_are_not_exported(original, tmp_path: Path) -> None:
    out = convert(original("tiny-gemma2"), tmp_path / "out", pad_vocab=True).directory
    table = weights(out)["language_model.model.embed_tokens.weight"]
    assert table.shape[0] == 1728 and not bool(table[1664:].any())
    assert config(out)["text_config"]["vocab_size"] == 1728 and config(out)["image_token_index"] == 1664
    back, given = arrays(export(out, tmp_path / "back.npz").path), arrays(original("tiny-gemma2"))
    assert all(np.array_equal(back[name], array) for name, array in given.items())


def test_variant_that_contradicts_the_shapes_is_refused_with_both_named(original) -> None:
    with pytest.raises(
        ConfigurationError, match=r"--variant 28b has a Gemma 2 of width 4608, 46 layers.*width 40, 4 l"
    ):
        plan_conversion(original("tiny-gemma2"), variant="28b")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"final_softcap": "thirty"}, "--final-softcap is none or a number above 0, not 'thirty'"),
        ({"attention_softcap": "-1"}, "--attention-softcap is none or a number above 0"),
        ({"query_scale": "heads"}, "--query-scale is head, width or a whole number above 0, not 'heads'"),
        ({"sliding_window": "0"}, "--sliding-window is none or a number above 0"),
        ({"variant": "7b"}, "--variant is one of 3b, 10b, 28b, paligemma-3b, not '7b'"),
    ],
)
def test_options_that_mean_nothing_are_usage_errors(original, options, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan_conversion(original("tiny-gemma2"), **options)


def test_options_of_gemma_2_are_not_ignored_for_gemma_1(original) -> None:
    with pytest.raises(UsageError, match=r"--final-softcap: this checkpoint is a PaliGemma 1"):
        plan_conversion(original("tiny-gemma1"), final_softcap="30")


def test_vocabulary_may_stand_elsewhere(original, tmp_path: Path) -> None:
    moved = write(tmp_path / "alone" / "alone.npz", arrays(original("tiny-gemma2")))
    assert plan_conversion(moved).processor is None
    for source in (VOCABULARY, VOCABULARY.parent):
        planned = plan_conversion(moved, vocabulary=str(source))
        assert planned.processor is not None and planned.vocabulary.files[0].name == VOCABULARY.name
