"""What a Florence-2 checkpoint can be wrong in: each gets one error that names it, and leaves nothing behind."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from florence2_checkpoints import BIAS, HEAD, SHARED, originals

from weightport.api import convert
from weightport.errors import (
    AdapterError,
    CheckpointError,
    ConfigurationError,
    CoverageError,
    UnknownFamilyError,
    VocabularyError,
    WeightportError,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return originals(tmp_path_factory)("tiny-main")


def refused(folder, tmp_path, error: type[WeightportError], text: str, **options) -> None:
    with pytest.raises(error, match=text):
        convert(folder, tmp_path / "out", "florence2", **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def changed(config, path: str, value):
    """`config` with the entry at a dotted path replaced; a value of ... removes it."""
    config = copy.deepcopy(config)
    *sections, last = path.split(".")
    place = config
    for section in sections:
        place = place[section]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return config


BAD_CONFIGS = {
    "text_config.scale_embedding": (True, "scale_embedding is true"),
    "vision_config.image_pos_embed.type": ("sinusoidal_abs_2d", "image_pos_embed.type is 'sinusoidal_abs_2d'"),
    "vision_config.visual_temporal_embedding.type": ("LEARNED", "visual_temporal_embedding.type is 'LEARNED'"),
    "vision_config.image_feature_source": (["temporal_avg_pool", "spatial_avg_pool"], "image_feature_source"),
    "vision_config.model_type": ("vit", "vision_config.model_type is 'vit'"),
    "text_config.model_type": ("t5", "text_config.model_type is 't5'"),
    "text_config.activation_function": ("swiglu9", "activation_function is 'swiglu9'"),
    "vision_config.dim_embed": ([8, 16, 24, 32], r"dim_embed is \[8, 16, 24, 32\], but the tensors show"),
    "vision_config.depths": ([1, 1, 9, 1], "depths is"),
    "vision_config.image_pos_embed.max_pos_embeddings": (51, "max_pos_embeddings is 51, but the tensors show 50"),
    "text_config.max_position_embeddings": (1024, "max_position_embeddings is 1024, but the tensors show 64"),
    "text_config.vocab_size": (51289, "vocab_size is 51289, but the tensors show 1381"),
    "text_config.d_model": (768, "d_model is 768"),
    "text_config.encoder_layers": (6, "encoder_layers is 6"),
    "text_config.decoder_attention_heads": (5, "decoder_attention_heads is 5, which does not divide"),
    "text_config.eos_token_id": (99999, "eos_token_id is 99999"),
    "text_config.bos_token_id": ("0", "bos_token_id is '0'"),
    "vision_config.num_groups": ([4, 2, 6, 7], r"num_groups\[3\] is 7, which does not divide"),
    "vision_config.num_heads": ([2, 4, 3], "num_heads is .* expected 4 values"),
    "vision_config.patch_prenorm": ([True, True, True, True], r"patch_prenorm\[0\] is True; the norm's width shows"),
    "vision_config.window_size": ("12", "window_size is '12'"),
    "model_type": ("llava", "of a 'llava' model"),
    "vision_config": (None, "lacks vision_config"),
    "text_config.dropout": ("much", "values that transformers does not accept"),
}


@pytest.mark.parametrize("path", BAD_CONFIGS, ids=str)
def test_configuration_that_the_model_cannot_hold_is_refused_by_name(source, tmp_path, path):
    value, text = BAD_CONFIGS[path]
    folder = source.write(tmp_path / "in", source.state(), changed(source.config, path, value))
    refused(folder, tmp_path, ConfigurationError, text)


@pytest.mark.parametrize(
    "field", ["num_heads", "num_groups", "window_size", "patch_stride", "patch_padding", "patch_prenorm"]
)
def test_missing_vision_fields_never_fall_back_to_the_base_size(source, tmp_path, field):
    folder = source.write(tmp_path / "in", source.state(), changed(source.config, f"vision_config.{field}", ...))
    refused(folder, tmp_path, ConfigurationError, f"vision_config.{field} is missing")


@pytest.mark.parametrize("field", ["dim_embed", "depths", "patch_size", "projection_dim"])
def test_missing_vision_fields_that_tensors_tell_are_read_from_them(source, tmp_path, field):
    folder = source.write(tmp_path / "in", source.state(), changed(source.config, f"vision_config.{field}", ...))
    made = convert(folder, tmp_path / "out").model.config.vision_config
    native = "embed_dim" if field == "dim_embed" else field
    assert getattr(made, native) == source.config["vision_config"][field]


def edited(source, name, change):
    state = source.state()
    state[name] = change(state[name].clone())
    return state


def test_nonzero_logits_bias_is_refused(source, tmp_path):
    def shift(bias):
        bias[0, 17] = 0.5
        return bias

    folder = source.write(tmp_path / "in", edited(source, BIAS, shift))
    refused(folder, tmp_path, ConfigurationError, "final_logits_bias is not zero")


def test_head_with_other_rows_than_the_embedding_is_refused(source, tmp_path):
    folder = source.write(tmp_path / "in", edited(source, HEAD, lambda head: head[:-3]))
    refused(folder, tmp_path, CoverageError, re.escape(f"{HEAD} is [1378, 32], but {SHARED} is [1381, 32]"))


def test_embeddings_that_should_be_one_and_are_not_are_refused(source, tmp_path):
    folder = source.write(
        tmp_path / "in", edited(source, "language_model.model.decoder.embed_tokens.weight", lambda t: t + 1)
    )
    refused(folder, tmp_path, CoverageError, "one matrix in the model, but the checkpoint holds different values")


def test_every_missing_and_unknown_tensor_is_named(source, tmp_path):
    state = source.state()
    gone = "vision_tower.blocks.2.1.channel_block.conv1.fn.dw.weight"
    del state[gone]
    state["language_model.model.encoder.extra"] = torch.zeros(3)
    folder = source.write(tmp_path / "in", state)
    with pytest.raises(CoverageError, match="native model's do not meet") as error:
        convert(folder, tmp_path / "out")
    assert gone in str(error.value) and "language_model.model.encoder.extra [3]" in str(error.value)


def test_unknown_tensor_is_left_out_on_request_and_recorded(source, tmp_path):
    state = {**source.state(), "language_model.extra": torch.zeros(3)}
    record = convert(
        source.write(tmp_path / "in", state), tmp_path / "out", None, drop=("language_model.extra",)
    ).record
    assert any(item["name"] == "language_model.extra" for item in record["dropped"])


def test_reshaped_tensor_is_refused(source, tmp_path):
    folder = source.write(tmp_path / "in", edited(source, "image_proj_norm.weight", lambda t: t[:-1]))
    refused(folder, tmp_path, CoverageError, "image_proj_norm")


def test_checkpoint_without_configuration_is_refused_with_advice(source, tmp_path):
    folder = source.write(tmp_path / "in", source.state())
    (folder / "config.json").unlink()
    refused(folder / "pytorch_model.bin", tmp_path, ConfigurationError, "No config.json beside")


def test_configuration_that_is_no_json_is_refused(source, tmp_path):
    folder = source.write(tmp_path / "in", source.state())
    (folder / "config.json").write_text("{not json")
    refused(folder / "pytorch_model.bin", tmp_path, CheckpointError, "config.json should be a JSON file")


def test_checkpoint_without_tokenizer_is_refused_with_advice_and_converted_without_on_request(source, tmp_path):
    folder = source.write(tmp_path / "in", source.state())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").unlink()
    refused(folder, tmp_path, VocabularyError, "holds no tokenizer.json(.|\\n)*--vocab")
    out = convert(folder, tmp_path / "out", None, vocabulary="none", image_token="append").directory
    assert not (out / "tokenizer.json").exists()


def test_tokenizer_of_another_checkpoint_is_refused(source, tmp_path):
    folder = source.write(tmp_path / "in", source.state())
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["another"] = len(data["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(data))
    refused(folder, tmp_path, VocabularyError, "1 tokens would have none")


def test_image_size_that_gives_no_square_of_features_is_refused(source, tmp_path):
    folder = source.write(tmp_path / "in", source.state())
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"height": 64, "width": 256}}))
    refused(folder, tmp_path, ConfigurationError, "64 × 256 pixels give 2 × 8 features")


def test_dump_with_an_adapter_in_it_is_merged_or_refused_but_never_stripped(source, tmp_path):
    state = source.state()
    module = "language_model.model.decoder.layers.0.self_attn.q_proj"
    weight = state.pop(f"{module}.weight").float()
    a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    dump = {f"base_model.model.{name}": tensor.float() for name, tensor in state.items()}
    bias = dump.pop(f"base_model.model.{module}.bias")
    dump |= {
        f"base_model.model.{module}.base_layer.weight": weight,
        f"base_model.model.{module}.base_layer.bias": bias,
        f"base_model.model.{module}.lora_A.default.weight": a,
        f"base_model.model.{module}.lora_B.default.weight": b,
    }
    folder = source.write(tmp_path / "in", dump)
    refused(folder, tmp_path, AdapterError, "no adapter_config.json stands beside it")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    from safetensors.torch import load_file

    convert(folder, tmp_path / "merged")
    native = "model.language_model.decoder.layers.0.self_attn.q_proj.weight"
    found = load_file(tmp_path / "merged/model.safetensors")[native]
    torch.testing.assert_close(found, weight + 6 / 4**0.5 * b @ a)
    # Where peft had merged it already, the base layers are the model.
    convert(folder, tmp_path / "kept", None, drop=("**.lora_{A,B}.default.weight",))
    assert torch.equal(load_file(tmp_path / "kept/model.safetensors")[native], weight)


def test_native_directory_is_told_apart_from_an_original(source, tmp_path):
    out = convert(source.folder, tmp_path / "native").directory
    refused(out, tmp_path, UnknownFamilyError, "a native Florence-2 model")


@pytest.mark.parametrize(
    ("file", "path", "value", "error"),
    [
        ("tokenizer.json", "added_tokens", "<s>", VocabularyError),
        ("tokenizer.json", "added_tokens", [{"content": "<s>"}], VocabularyError),
        ("tokenizer.json", "model.vocab", {"<s>": "0"}, VocabularyError),
        ("tokenizer.json", "model", None, VocabularyError),
        ("tokenizer.json", "pre_tokenizer", {"type": "Unknown"}, VocabularyError),
        ("preprocessor_config.json", "crop_size", [], ConfigurationError),
        ("preprocessor_config.json", "size", 96, ConfigurationError),
        ("preprocessor_config.json", "image_seq_length", 577, ConfigurationError),
    ],
)
def test_malformed_companions_are_refused(source, tmp_path, file, path, value, error):
    folder = source.write(tmp_path / "in", source.state())
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(changed(data, path, value)))
    refused(folder, tmp_path, error, r"tokenizer|preprocessor_config\.json")
