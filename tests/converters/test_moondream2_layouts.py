"""Which revision a moondream2 checkpoint is of, and the same model under every set of names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from moondream2_checkpoints import Original, of_late_2024
from safetensors.torch import load_file

from weightport.api import convert, export, plan_conversion
from weightport.checkpoints import open_checkpoint
from weightport.errors import (
    CheckpointError,
    ConfigurationError,
    UnknownFamilyError,
    VocabularyError,
    WeightportError,
)
from weightport.families.moondream2.companions import TEMPLATES
from weightport.families.moondream2.revisions import REVISIONS, Evidence, decide, revision_named
from weightport.families.registry import registry

TIMM = "import timm\nfrom PIL import Image\n"


@pytest.fixture(scope="module")
def one_view(tmp_path_factory) -> Original:
    return Original.of("tiny-2024-04-02", tmp_path_factory.mktemp("one_view"))


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Original:
    return Original.of("tiny-2024-08-26", tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Original:
    return Original.of("tiny-2025-06-21", tmp_path_factory.mktemp("tiles"))


def revision_of(folder: Path, **options) -> str:
    return plan_conversion(folder, **options).model.options["revision"]


def refused(folder: Path, out: Path, error: type[WeightportError], text: str, **options) -> None:
    with pytest.raises(error, match=text):
        convert(folder, out, **options)
    assert not out.exists()


# Which revision.


def test_one_view_without_files_that_tell_is_asked_about(one_view, tmp_path: Path) -> None:
    refused(one_view.folder, tmp_path / "out", ConfigurationError, r"Pass --revision \(2024-03-05, .* or 2024-04-02\)")


def test_text_config_tells_the_revision_of_may(one_view, tmp_path: Path) -> None:
    config = one_view.config
    config["text_config"] = config.pop("phi_config")
    assert revision_of(one_view.write(tmp_path / "in", config=config)) == "2024-05-08"


def test_code_beside_the_weights_tells_the_revision(one_view, tmp_path: Path) -> None:
    later = one_view.write(
        tmp_path / "later", files={"vision_encoder.py": "import torch\n", "moondream.py": "end = '<|endoftext|>'\n"}
    )
    assert revision_of(later) == "2024-04-02"
    earlier = one_view.write(
        tmp_path / "earlier", files={"vision_encoder.py": TIMM, "moondream.py": "end = '<END>'\n"}
    )
    planned = plan_conversion(earlier).model
    assert planned.options["revision"] == "2024-03-13"
    assert any("vision_encoder.py imports timm, moondream.py has <END>" in note for note in planned.notes)
    assert planned.config.vision_config.hidden_act == planned.config.projector_hidden_act == "gelu"
    assert planned.config.vision_config.layer_norm_eps == 1e-6


def test_code_is_read_and_never_run(one_view, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\n"
    folder = one_view.write(
        tmp_path / "in", files={"moondream.py": code, "vision_encoder.py": code, "configuration_moondream.py": code}
    )
    convert(folder, tmp_path / "out", revision="2024-04-02")
    assert not mark.exists()


def test_crops_need_no_revision(crops, tmp_path: Path) -> None:
    assert revision_of(crops.folder) == "2024-08-26"
    state = {name: each for name, each in crops.state().items() if not name.startswith("region_model.")}
    assert revision_of(crops.write(tmp_path / "older", state)) == "2024-07-23"


def test_revision_that_contradicts_the_tensors_is_refused(crops, tmp_path: Path) -> None:
    refused(crops.folder, tmp_path / "out", ConfigurationError, "2024-04-02 does not fit", revision="2024-04-02")


@pytest.mark.parametrize("name", [revision.name for revision in REVISIONS])
def test_every_revision_is_decided_for_where_it_is_named(name: str) -> None:
    wanted = revision_named(name)
    region = wanted.region if wanted.keys == "2024" else "bins"
    assert decide(Evidence(wanted.keys, wanted.merge, region), name).revision is wanted


def test_model_of_2025_without_files_that_tell_is_asked_about(tiles, tmp_path: Path) -> None:
    folder = tiles.write(tmp_path / "in", without=("tokenizer.json",))
    refused(folder, tmp_path / "out", ConfigurationError, "Pass --revision .*2025-01-09", vocabulary="none")


@pytest.mark.parametrize(
    ("code", "config", "revision"),
    [
        ('Tokenizer.from_pretrained("moondream/starmie-v1")', "", "2025-06-21"),
        ('Tokenizer.from_pretrained("vikhyatk/moondream2")', '"short": [], "normal": []', "2025-01-09"),
        ('Tokenizer.from_pretrained("vikhyatk/moondream2")', '"short": [], "long": []', "2025-04-14"),
    ],
)
def test_code_of_2025_tells_the_revision(tiles, tmp_path: Path, code: str, config: str, revision: str) -> None:
    # Of 2025-03-27 and 2025-04-14, which compute the same, the later is named.
    folder = tiles.write(
        tmp_path / "in", files={"moondream.py": code, "config.py": config}, without=("tokenizer.json",)
    )
    assert revision_of(folder, vocabulary="none") == revision


def test_inspection_names_the_revision_and_why(one_view, tmp_path: Path) -> None:
    family = registry()["moondream2"]
    from weightport.checkpoints.sources import MAIN, Sources

    model = family.conversion.read(Sources({MAIN: open_checkpoint(one_view.folder)}), family.bare_options)
    assert "the projector takes the features of one view" in model.notes[0]


# Other names for the same model.


def native_state(folder: Path, out: Path, **options) -> dict[str, torch.Tensor]:
    convert(folder, out, **options)
    return load_file(out / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


def test_compiled_models_and_old_files_are_the_same_model(one_view, tmp_path: Path) -> None:
    state = {
        name.replace("text_model.transformer.h.0.", "text_model.transformer.h.0._orig_mod."): each
        for name, each in one_view.state().items()
    }
    state["text_model.transformer.h.0.mixer.rotary_emb.inv_freq"] = torch.zeros(4)
    found = native_state(one_view.write(tmp_path / "in", state), tmp_path / "out", revision="2024-04-02")
    assert same(found, native_state(one_view.folder, tmp_path / "plain", revision="2024-04-02"))


def test_what_training_scripts_save_is_the_same_model(tiles, tmp_path: Path) -> None:
    state = {name.removeprefix("model."): each for name, each in tiles.state().items()}
    state |= {f"text.blocks.{n}.kv_cache.{which}_cache": torch.zeros(1, 2, 4, 4) for n in range(3) for which in "kv"}
    found = native_state(tiles.write(tmp_path / "in", state), tmp_path / "out")
    assert same(found, native_state(tiles.folder / "model.safetensors", tmp_path / "plain"))


def test_names_of_late_2024_are_the_same_model(tiles, tmp_path: Path) -> None:
    # Its tiles overlap by four patches, of which the golden case's views have five.
    larger = tiles.state() | {"model.vision.pos_emb": torch.rand(1, 100, 48)}
    config = tiles.config
    config["config"]["text"]["prefix_attn"], config["config"]["vision"]["crop_size"] = 101, 40
    plain = native_state(tiles.write(tmp_path / "2025", larger, config), tmp_path / "plain")
    state = of_late_2024(larger)
    folder = tiles.write(tmp_path / "in", state, {"text_config": {"num_attention_heads": 2}})
    assert same(native_state(folder, tmp_path / "out", vocabulary="none"), plain)
    exported = export(tmp_path / "out", tmp_path / "back").path
    back = open_checkpoint(exported)
    assert all(torch.equal(back[name].read(), each) for name, each in state.items())


def test_grouped_keys_are_split_by_their_own_rows(tiles, tmp_path: Path) -> None:
    state, config = tiles.state(), tiles.config
    for name in [name for name in state if "text.blocks" in name and ".attn.qkv." in name]:
        # One key and value head of 64 for two query heads.
        state[name] = torch.cat([state[name][:128], state[name][128:192], state[name][256:320]])
    config["config"]["text"]["n_kv_heads"] = 1
    found = native_state(tiles.write(tmp_path / "in", state, config), tmp_path / "out")
    attention = "model.language_model.layers.0.self_attn."
    assert found[f"{attention}q_proj.weight"].shape == (128, 128)
    assert found[f"{attention}v_proj.bias"].shape == (64,)
    assert torch.equal(found[f"{attention}v_proj.bias"], state["model.text.blocks.0.attn.qkv.bias"][192:])


def test_released_config_without_sizes_takes_the_originals_defaults(one_view, tmp_path: Path) -> None:
    config = one_view.config | {"phi_config": {"model_type": "phi"}}
    text = plan_conversion(
        one_view.write(tmp_path / "in", config=config), revision="2024-04-02"
    ).model.config.text_config
    assert text.num_attention_heads == 32
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def test_config_of_the_first_revision_has_other_names(one_view, tmp_path: Path) -> None:
    own = one_view.config["phi_config"]
    old = {
        "model_type": "phi-msft", "n_embd": own["hidden_size"], "n_head": 4, "n_layer": 3, "n_inner": None,
        "rotary_dim": 4, "layer_norm_epsilon": 1e-5, "n_positions": 2048, "vocab_size": 512,
    }  # fmt: skip
    folder = one_view.write(tmp_path / "in", config=one_view.config | {"phi_config": old})
    model = plan_conversion(folder).model
    assert model.options["revision"] == "2024-03-04"
    assert model.config.text_config.num_attention_heads == 4
    assert model.config.text_config.rope_parameters["partial_rotary_factor"] == 0.25


# Bad input.


def test_quantised_weights_are_refused_by_name(tiles, tmp_path: Path) -> None:
    state = tiles.state()
    state["model.text.blocks.0.mlp.fc1.weight.packed"] = state.pop("model.text.blocks.0.mlp.fc1.weight")
    refused(tiles.write(tmp_path / "in", state), tmp_path / "out", ConfigurationError, "int4 weights")


def test_moondream3_is_refused_by_name(tiles, tmp_path: Path) -> None:
    state = {**tiles.state(), "model.text.blocks.2.mlp.router.weight": torch.zeros(4, 4)}
    refused(tiles.write(tmp_path / "in", state), tmp_path / "out", ConfigurationError, "is moondream3")


def test_moondream1_is_refused_by_name(one_view, tmp_path: Path) -> None:
    state = {name.replace("projection.mlp.", "projection.mlp1."): each for name, each in one_view.state().items()}
    refused(one_view.write(tmp_path / "in", state), tmp_path / "out", ConfigurationError, "is moondream1")


def test_tensor_stored_twice_is_refused(one_view, tmp_path: Path) -> None:
    state = one_view.state()
    state["text_model._orig_mod.lm_head.ln.bias"] = state["text_model.lm_head.ln.bias"].clone()
    folder = one_view.write(tmp_path / "in", state)
    refused(folder, tmp_path / "out", CheckpointError, "holds text_model.lm_head.ln.bias twice", revision="2024-04-02")


BAD_CONFIGS = {
    "hidden_size": (65, "hidden_size is 65, but the tensors show 64"),
    "num_hidden_layers": (24, "num_hidden_layers is 24, but the tensors show 3"),
    "num_attention_heads": (5, "num_attention_heads is 5, which does not divide"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, "rope_scaling is"),
    "qk_layernorm": (True, "qk_layernorm is True"),
    "tie_word_embeddings": (True, "tie_word_embeddings is True"),
}


@pytest.mark.parametrize("field", BAD_CONFIGS)
def test_config_that_contradicts_the_tensors_is_refused(one_view, tmp_path: Path, field: str) -> None:
    value, text = BAD_CONFIGS[field]
    config = one_view.config
    config["phi_config"][field] = value
    folder = one_view.write(tmp_path / "in", config=config)
    refused(folder, tmp_path / "out", ConfigurationError, text, revision="2024-04-02")


BAD_CONFIGS_2025 = {
    ("text", "dim"): (64, "text.dim is 64, but the tensors show 128"),
    ("text", "n_kv_heads"): (1, "text.n_kv_heads is 1, but the tensors show keys of 128 rows"),
    ("text", "n_heads"): (3, "text.n_heads is 3, which does not divide"),
    ("text", "prefix_attn"): (730, "text.prefix_attn is 730, but the tensors show 26"),
    ("vision", "enc_n_heads"): (5, "48 wide, which is no multiple of its 5 heads"),
    ("vision", "crop_size"): (378, "vision.crop_size is 378, but the tensors show 20"),
}


@pytest.mark.parametrize("place", BAD_CONFIGS_2025, ids=".".join)
def test_config_of_2025_that_contradicts_the_tensors_is_refused(tiles, tmp_path: Path, place: tuple[str, str]) -> None:
    value, text = BAD_CONFIGS_2025[place]
    config = tiles.config
    config["config"][place[0]][place[1]] = value
    refused(tiles.write(tmp_path / "in", config=config), tmp_path / "out", ConfigurationError, text)


def test_stale_tokenizer_is_not_used(tiles, one_view, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = (one_view.folder / "tokenizer.json").read_text()
    code = {"moondream.py": "moondream/starmie-v1", "tokenizer.json": stale}
    folder = tiles.write(tmp_path / "in", files=code)
    right = tiles.folder / "tokenizer.json"
    monkeypatch.setattr("weightport.families.moondream2.tokenizer.download", lambda repository, name: right)
    model = convert(folder, tmp_path / "out").model
    assert any("tokenizer.json beside the weights is stale" in note for note in model.notes)
    assert (tmp_path / "out" / "tokenizer.json").read_text().count("<|md_reserved_0|>")
    named = convert(folder, tmp_path / "named", vocabulary=str(right)).model
    assert not any("stale" in note for note in named.notes)


def test_tokenizer_of_another_time_is_refused(tiles, one_view, tmp_path: Path) -> None:
    refused(
        tiles.folder / "model.safetensors", tmp_path / "out", VocabularyError, "embedding has 352 rows",
        vocabulary=str(one_view.folder / "tokenizer.json"), revision="2025-06-21",
    )  # fmt: skip


def test_no_path_of_this_machine_is_recorded(one_view, tmp_path: Path) -> None:
    vocabulary = str(one_view.folder)
    convert(one_view.folder, tmp_path / "out", revision="2024-04-02", vocabulary=vocabulary)
    assert vocabulary not in (tmp_path / "out" / "conversion.json").read_text()


def test_vocabulary_is_read_from_the_files_of_a_slow_tokenizer(one_view, tmp_path: Path) -> None:
    folder = one_view.write(tmp_path / "in", without=("tokenizer.json",))
    convert(folder, tmp_path / "slow", revision="2024-04-02")
    convert(one_view.folder, tmp_path / "fast", revision="2024-04-02")
    from transformers import AutoProcessor

    slow, fast = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("slow", "fast"))
    for text in ('{\n  "dime": 1\n}<|endoftext|>', "It's 3\t\tcoins,   naïve 你好", "    def f(x):\n        return x"):
        assert slow.tokenizer(text).input_ids == fast.tokenizer(text).input_ids


def test_export_gives_back_the_originals_files(one_view, tmp_path: Path) -> None:
    convert(one_view.folder, tmp_path / "out", revision="2024-04-02")
    back = export(tmp_path / "out", tmp_path / "back").path
    for name in ("config.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json"):
        assert json.loads((back / name).read_text()) == json.loads((one_view.folder / name).read_text()), name
    tokens = [json.loads((folder / "tokenizer.json").read_text()) for folder in (back, one_view.folder)]
    assert tokens[0]["added_tokens"] == tokens[1]["added_tokens"]
    assert tokens[0]["model"]["vocab"] == tokens[1]["model"]["vocab"]
    assert revision_of(back, revision="2024-04-02") == "2024-04-02"


def test_templates_of_2025_are_ids_of_their_words() -> None:
    assert TEMPLATES["2025-06-21"]["query"] == {"prefix": [1, 15381, 2], "suffix": [3]}
    assert "long" not in TEMPLATES["2025-01-09"]["caption"] and "long" in TEMPLATES["2025-03-27"]["caption"]


def test_variant_file_alone_is_no_model(tiles, tmp_path: Path) -> None:
    variant = tiles.folder / "lora_final.pt"
    refused(variant, tmp_path / "out", UnknownFamilyError, "port-moondream2 SOURCE OUT --variant-file FILE merges it")


# Variants of 2025.


def variant_of(tiles: Original, path: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """The golden variant with tensors changed, or left out where None stands."""
    state = torch.load(tiles.folder / "lora_final.pt", weights_only=True) | change
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


def pair(layer: int, module: str, half: str) -> str:
    return f"text_model.transformer.h.{layer}.{module}.parametrizations.weight.0.{half}"


def test_variant_of_a_few_layers_grows_all_alike_and_goes_back_with_its_sizes(tiles, tmp_path: Path) -> None:
    out_proj = {pair(layer, "mixer.out_proj", half): None for layer in (1, 2) for half in "AB"}
    variant = variant_of(tiles, tmp_path / "final.pt", out_proj)
    rank = torch.load(variant, weights_only=True)[pair(0, "mixer.out_proj", "A")].shape[0]
    done = convert({"checkpoint": tiles.folder, "variant": variant}, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["text_config"]["intermediate_size"] == 200 + 2 * rank
    made = load_file(tmp_path / "out/model.safetensors")
    further = made["model.language_model.layers.1.mlp.fc2.weight"][:, 200:]
    assert made["lm_head.weight"].dtype == further.dtype == torch.bfloat16 and not further.any()
    assert "2 * rank" not in done.model.notes[1] and f"{2 * rank} further units" in done.model.notes[1]
    assert done.record["sources"]["variant"]["files"][0]["name"] == "final.pt"
    # The way back is a model of 2025 that is wider, under the original's names, and converts to the same.
    export(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["config"]["text"]["ff_dim"] == 200 + 2 * rank
    convert(tmp_path / "back", tmp_path / "again", revision="2025-06-21")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == made.keys() and all(torch.equal(again[name], made[name]) for name in made)


def test_variant_without_pairs_of_out_proj_keeps_the_models_sizes(tiles, tmp_path: Path) -> None:
    out_proj = {pair(layer, "mixer.out_proj", half): None for layer in range(3) for half in "AB"}
    variant = variant_of(tiles, tmp_path / "final.pt", out_proj)
    convert({"checkpoint": tiles.folder, "variant": variant}, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"]["intermediate_size"] == 200
    a, b = (torch.load(variant, weights_only=True)[pair(2, "mixer.Wqkv", half)].double() for half in "AB")
    fused = tiles.state()["model.text.blocks.2.attn.qkv.weight"].double() + b @ a
    made = load_file(tmp_path / "out/model.safetensors")["model.language_model.layers.2.self_attn.k_proj.weight"]
    assert torch.equal(made, fused[128:256].bfloat16())


BAD_VARIANTS = {
    "no variant": (
        {"lm_head.weight": torch.zeros(2, 2)},
        CheckpointError,
        "is no variant of moondream2: it holds lm_",
    ),
    "half a pair": ({pair(1, "mlp.fc1", "B"): None}, CheckpointError, "layer 1, mlp.fc1 lacks B"),
    "one more layer": (
        {pair(3, "mlp.fc1", "A"): torch.zeros(2, 128), pair(3, "mlp.fc1", "B"): torch.zeros(200, 2)},
        ConfigurationError,
        "layer 3, mlp.fc1: the model has 3 layers",
    ),
    "another width": (
        {pair(0, "mixer.out_proj", "A"): torch.zeros(4, 64)},
        ConfigurationError,
        r"layer 0, mixer.out_proj: A is \[4, 64\] and B .* for a weight of \[128, 128\]",
    ),
}


@pytest.mark.parametrize("kind", BAD_VARIANTS)
def test_variant_that_does_not_fit_is_refused(tiles, tmp_path: Path, kind: str) -> None:
    change, error, said = BAD_VARIANTS[kind]
    variant = variant_of(tiles, tmp_path / "final.pt", change)
    with pytest.raises(error, match=said):
        convert({"checkpoint": tiles.folder, "variant": variant}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_variant_of_a_model_of_2024_is_refused(one_view, tiles, tmp_path: Path) -> None:
    sources = {"checkpoint": one_view.folder, "variant": tiles.folder / "lora_final.pt"}
    with pytest.raises(ConfigurationError, match="is a variant of a model of 2025; this checkpoint's tensors"):
        convert(sources, tmp_path / "out", revision="2024-04-02")
