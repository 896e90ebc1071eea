"""Every form a Florence-2 checkpoint comes in gives the same model; what a form says of the head is kept."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from florence2_checkpoints import BIAS, DECODER, ENCODER, HEAD, SHARED, TEMPORAL, originals
from safetensors.torch import load_file, save_file

from weightport.api import convert, export
from weightport.checkpoints import open_checkpoint
from weightport.errors import CheckpointError

NATIVE_SHARED = "model.language_model.shared.weight"
NATIVE_TEMPORAL = f"model.multi_modal_projector.{TEMPORAL}"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return originals(tmp_path_factory)


def converted(source, out, **options):
    convert(source, out, None, **options)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


@pytest.fixture(scope="module")
def released(original, tmp_path_factory):
    """(tensors, configuration) of the released form of tiny-main."""
    return converted(original("tiny-main").folder, tmp_path_factory.mktemp("released") / "out")


def assert_equal(found, expected):
    tensors, config = found
    assert tensors.keys() == expected[0].keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected[0].items())
    assert config == expected[1]


PREFIXES = {
    "DDP of a compiled model": "module._orig_mod.",
    "Lightning": "model.",
    "peft without adapter": "base_model.model.",
    "a stack": "module._orig_mod.base_model.model.model.",
}
NESTINGS = (("model",), ("state_dict",), ("model_state_dict",), ("checkpoint", "model"), ())


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("nesting", NESTINGS, ids=lambda keys: ".".join(keys) or "flat")
def test_prefixes_and_nesting_of_training_loops_change_nothing(original, released, tmp_path, prefix, nesting):
    source = original("tiny-main")
    document = {prefix + name: tensor for name, tensor in source.state().items()}
    for key in reversed(nesting):
        optimizer = {
            "state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4.0)}},
            "param_groups": [{"lr": 1e-6}],
        }
        document = {"epoch": 3, key: document, "optimizer_state_dict": optimizer, "val_loss": torch.tensor(1.5)}
    folder = source.write(tmp_path / "in", document, name="checkpoint.pt")
    assert_equal(converted(folder / "checkpoint.pt", tmp_path / "out"), released)


def test_wrappers_inside_the_model_change_nothing(original, released, tmp_path):
    source = original("tiny-main")
    wrapped = {
        name.replace("language_model.", "language_model._orig_mod.").replace(
            "encoder.layers.", "encoder._fsdp_wrapped_module.layers."
        ): tensor
        for name, tensor in source.state().items()
    }
    assert_equal(converted(source.write(tmp_path / "in", wrapped), tmp_path / "out"), released)


@pytest.mark.parametrize(
    "absent",
    [(HEAD,), (ENCODER, DECODER), (ENCODER, DECODER, HEAD), (SHARED, ENCODER, DECODER), (SHARED, HEAD)],
    ids=["since August 2025", "safetensors", "resized fork", "head alone", "encoder and decoder"],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_tied_embedding_is_found_under_whatever_names_it_has(original, released, tmp_path, absent, name):
    source = original("tiny-main")
    state = {key: tensor for key, tensor in source.state().items() if key not in absent}
    folder = source.write(tmp_path / "in", state, name=name)
    assert_equal(converted(folder, tmp_path / "out"), released)
    exported = open_checkpoint(export(tmp_path / "out", tmp_path / "back").path)
    assert list(exported) == list(open_checkpoint(folder)), "an export has the source's names, no more"


def test_independent_head_is_kept_whatever_the_file_says_of_its_tying(original, tmp_path):
    source = original("tiny-main")
    state = source.state()
    state[HEAD] = state[HEAD].clone()
    state[HEAD][7, 3] += 1
    tensors, config = converted(source.write(tmp_path / "in", state), tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert torch.equal(tensors["lm_head.weight"], state[HEAD])
    assert torch.equal(tensors[NATIVE_SHARED], state[SHARED])


def test_shards_and_halves_and_doubles_are_read(original, released, tmp_path):
    source = original("tiny-main")
    state = {name: tensor.clone() for name, tensor in source.state().items()}
    folder = source.write(tmp_path / "in", {}, name="unused.bin")
    (folder / "unused.bin").unlink()
    names = sorted(state)
    files = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_equal(converted(folder, tmp_path / "out"), released)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_of_the_file_is_kept_and_another_can_be_asked_for(original, tmp_path, dtype):
    source = original("tiny-main")
    state = {name: tensor.to(dtype) for name, tensor in source.state().items()}
    tensors, config = converted(source.write(tmp_path / "in", state), tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    narrowed, _ = converted(tmp_path / "in", tmp_path / "narrow", dtype=torch.float16)
    assert {tensor.dtype for tensor in narrowed.values()} == {torch.float16}


def test_temporal_embedding_is_computed_where_the_file_lacks_it(original, tmp_path):
    source = original("tiny-main")
    state = {name: tensor.float() for name, tensor in source.state().items()}
    constant = state.pop(TEMPORAL)
    tensors, _ = converted(source.write(tmp_path / "in", state), tmp_path / "out")
    # The file has it rounded to float16.
    torch.testing.assert_close(tensors[NATIVE_TEMPORAL], constant, atol=5e-4, rtol=0)
    assert TEMPORAL not in open_checkpoint(export(tmp_path / "out", tmp_path / "back").path)


def test_logits_bias_of_zeros_is_dropped_and_comes_back(original, tmp_path):
    source = original("tiny-main")
    out = convert(source.folder, tmp_path / "out").directory
    exported = open_checkpoint(export(out, tmp_path / "back").path)
    assert torch.equal(exported[BIAS].read(), source.state()[BIAS])
    assert BIAS not in load_file(out / "model.safetensors")


def test_wrong_ids_at_the_top_of_early_configurations_are_ignored(original, released, tmp_path):
    source = original("tiny-main")
    config = {**source.config, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    conversion = convert(source.write(tmp_path / "in", source.state(), config), tmp_path / "out")
    assert_equal((load_file(tmp_path / "out/model.safetensors"), conversion.model.config.to_dict()), (released[0], {
        **conversion.model.config.to_dict(), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }))  # fmt: skip
    assert any("text_config's ids were taken" in note for note in conversion.record["notes"])


def test_duplicate_keys_of_a_hand_edited_configuration_are_read_as_json_reads_them(original, released, tmp_path):
    source = original("tiny-main")
    folder = source.write(tmp_path / "in", source.state())
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "torch_dtype": "float32", "torch_dtype": "float16"}')
    assert_equal(converted(folder, tmp_path / "out"), released)


def test_two_models_in_one_file_are_refused_and_averages_are_chosen_on_request(original, released, tmp_path):
    source = original("tiny-main")
    state = source.state()
    average = {name: tensor.clone() for name, tensor in state.items()}
    average["image_proj_norm.bias"] += 1
    folder = source.write(tmp_path / "in", {"model": state, "ema_model": average}, name="both.pt")
    assert_equal(converted(folder / "both.pt", tmp_path / "own"), released)
    averaged, _ = converted(folder / "both.pt", tmp_path / "ema", ema=True)
    name = "model.multi_modal_projector.image_proj_norm.bias"
    assert torch.equal(averaged[name], released[0][name] + 1)
    source.write(tmp_path / "two", {"model": state, "teacher": average}, name="two.pt")
    with pytest.raises(CheckpointError, match="2 Florence-2 models: model, teacher"):
        convert(tmp_path / "two/two.pt", tmp_path / "none")


def test_export_without_a_record_is_the_released_layout(original, tmp_path):
    source = original("tiny-main")
    out = convert(source.folder, tmp_path / "out").directory
    (out / "conversion.json").unlink()
    back = export(out, tmp_path / "back").path
    assert set(open_checkpoint(back)) == set(source.state())
    tensors, config = converted(back, tmp_path / "again")
    assert torch.equal(tensors[NATIVE_SHARED], source.state()[SHARED])
    first = json.loads((out / "config.json").read_text())
    assert config["vision_config"] == first["vision_config"] and config["text_config"] == first["text_config"]


def test_appended_image_token_adds_rows_of_zeros_and_export_takes_them_off(original, tmp_path):
    source = original("tiny-ft-untied")
    out = convert(source.folder, tmp_path / "out", None, image_token="append").directory
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    rows = source.config["text_config"]["vocab_size"]
    assert config["image_token_id"] == rows
    assert config["text_config"]["vocab_size"] % 64 == 0
    for name in ("lm_head.weight", NATIVE_SHARED):
        assert tensors[name].shape[0] == config["text_config"]["vocab_size"]
        assert not tensors[name][rows:].any()
    exported = open_checkpoint(export(out, tmp_path / "back").path)
    state = source.state()
    assert all(torch.equal(exported[name].read(), tensor) for name, tensor in state.items())
    again = copy.deepcopy(json.loads((tmp_path / "back/config.json").read_text()))
    assert again == source.config
