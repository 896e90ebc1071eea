"""Forms of an OFA checkpoint that the golden cases do not hold, made from one by what each form is known for."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from weightport.api import convert, export
from weightport.errors import ConfigurationError, CoverageError, UnknownFamilyError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = GOLDEN / "cases" / "ofa"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Case name → (file, what torch loads from it, the converted tensors, the configuration)."""
    sys.path.insert(0, str(GOLDEN))
    import golden

    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            file = golden.materialize(CASES / name, folder)
            convert(file, folder / "out")
            document = torch.load(file, weights_only=False)
            tensors = load_file(folder / "out" / "model.safetensors")
            made[name] = file, document, tensors, json.loads((folder / "out" / "config.json").read_text())
        return made[name]

    return get


def converted(source: Path, out: Path, **options) -> tuple[dict[str, torch.Tensor], dict]:
    convert(source, out, "ofa", **options)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Facts of the ports (OFA-Sys Hub repositories, YeungNLP/ofa-cn-*): fairseq's name → theirs.
PORT_NAMES = (
    (r"(encoder\.layers\.\d+)\.attn_ln\.", r"\1.self_attn_mid_layer_norm."),
    (r"(decoder\.layers\.\d+)\.self_attn_ln\.", r"\1.self_attn_mid_layer_norm."),
    (r"(decoder\.layers\.\d+)\.cross_attn_ln\.", r"\1.cross_attn_mid_layer_norm."),
    (r"\.ffn_layernorm\.", ".ffn_layer_norm."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn_layer_norm."),
)


def port_directory(file: Path, document: dict, folder: Path, *, safetensors: bool) -> Path:
    """The directory of an existing port that holds the same model, with the vocabulary of OFA-Chinese's layout."""
    folder.mkdir()
    pieces = (file.parent / "vocab.txt").read_text(encoding="utf-8")
    (folder / "vocab.txt").write_text("<s>\n<pad>\n</s>\n<unk>\n" + pieces + "<mask>\n", encoding="utf-8")
    first = len(pieces.splitlines()) + 5
    added = [f"<code_{i}>" for i in range(64)] + [f"<bin_{i}>" for i in range(40)]
    (folder / "added_tokens.json").write_text(json.dumps({token: first + i for i, token in enumerate(added)}))
    renamed = {}
    for name, tensor in document["model"].items():
        for pattern, replacement in PORT_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor[:-1] if name == "decoder.image_position_idx" else tensor
    if safetensors:
        save_file({name: tensor.clone() for name, tensor in renamed.items()}, folder / "model.safetensors")
    else:
        torch.save(renamed, folder / "pytorch_model.bin")
    config = {
        "model_type": "ofa",
        "architectures": ["OFAModel"],
        "vocab_size": 418,
        "d_model": 64,
        "normformer": True,
        "resnet_type": "resnet18",
        "attn_scale_factor": 2.0,
        "token_bucket_size": 16,
        "image_bucket_size": 8,
        "code_image_size": 32,
        "entangle_position_embedding": False,
        "encoder_drop_path_rate": 0.1,
        "decoder_drop_path_rate": 0.1,
        "dropout": 0.1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("safetensors", [False, True])
def test_a_directory_of_an_existing_port_gives_the_same_model(originals, tmp_path, safetensors):
    file, document, tensors, config = originals("cn-tiny")
    folder = port_directory(file, document, tmp_path / "port", safetensors=safetensors)
    found, settings = converted(folder, tmp_path / "out")
    assert equal(found, tensors)
    ours = {key for key in config if key not in ("image_size", "num_bins", "code_dict_size")}
    assert {key: settings[key] for key in ours} == {key: config[key] for key in ours}
    # Equal text, equal rows: an unknown character is [UNK], not the <unk> of the port's own tokenizer.
    texts = json.loads((CASES / "cn-tiny" / "tokenization.json").read_text(encoding="utf-8"))["cases"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    for case in texts:
        if case["use_bpe"]:
            assert tokenizer(case["text"])["input_ids"][1:-1] == case["ids"]


def test_a_port_exports_to_the_fairseq_file_it_came_from(originals, tmp_path):
    file, document, _, _ = originals("cn-tiny")
    folder = port_directory(file, document, tmp_path / "port", safetensors=False)
    convert(folder, tmp_path / "out", "ofa", vocabulary="none")
    export(tmp_path / "out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=False)["model"]
    assert equal(back, dict(document["model"]))


@pytest.mark.parametrize("nested", [False, True])
def test_a_stripped_file_without_options_is_read_with_the_released_flags(originals, tmp_path, nested):
    _, document, tensors, config = originals("cn-tiny")
    stripped = {"model": document["model"]} if nested else dict(document["model"])
    torch.save(stripped, tmp_path / "stripped.pt")
    found, settings = converted(tmp_path / "stripped.pt", tmp_path / "out", vocabulary="none")
    assert equal(found, tensors)
    assert settings["disable_entangle"] is config["disable_entangle"] is True
    notes = json.loads((tmp_path / "out" / "conversion.json").read_text())["notes"]
    assert any("no training options" in note for note in notes)


@pytest.mark.parametrize("name", ["m6_unify_base", "ofa_base"])
def test_the_old_name_of_an_architecture_is_accepted(originals, tmp_path, name):
    file, document, tensors, _ = originals("en-tiny-args")
    arguments = Namespace(**{**vars(document["args"]), "arch": name})
    torch.save({**document, "args": arguments, "last_optimizer_state": None}, tmp_path / "old.pt")
    found, _ = converted(tmp_path / "old.pt", tmp_path / "out", vocabulary=str(file.parent))
    assert equal(found, tensors)


def test_options_that_an_old_checkpoint_lacks_take_the_architecture_s_defaults(originals, tmp_path):
    _, document, _, _ = originals("cn-tiny")
    options = {k: v for k, v in vars(document["cfg"]["model"]).items() if k not in ("disable_entangle", "sync_bn")}
    torch.save({"args": Namespace(**options), "model": document["model"]}, tmp_path / "old.pt")
    _, settings = converted(tmp_path / "old.pt", tmp_path / "out", vocabulary="none")
    # The architecture's default of disable_entangle is False, unlike what released training scripts pass.
    assert (settings["disable_entangle"], settings["batch_norm_eps"]) == (False, 1e-5)


def test_args_win_over_cfg_as_in_the_original(originals, tmp_path):
    _, document, _, _ = originals("cn-tiny")
    arguments = Namespace(**{**vars(document["cfg"]["model"]), "attn_scale_factor": 3.0})
    torch.save({"args": arguments, "cfg": document["cfg"], "model": document["model"]}, tmp_path / "both.pt")
    _, settings = converted(tmp_path / "both.pt", tmp_path / "out", vocabulary="none")
    assert settings["attn_scale_factor"] == 3.0


@pytest.mark.parametrize("shared_output", [True, False])
def test_separate_embeddings_stay_separate_and_come_back(originals, tmp_path, shared_output):
    _, document, _, _ = originals("cn-tiny")
    model = dict(document["model"])
    model["decoder.embed_tokens.weight"] = model["decoder.embed_tokens.weight"] * 2
    model["decoder.output_projection.weight"] = model["decoder.embed_tokens.weight"] * (1 if shared_output else 3)
    options = {**vars(document["cfg"]["model"]), "share_all_embeddings": False}
    options["share_decoder_input_output_embed"] = shared_output
    torch.save({"args": Namespace(**options), "model": model}, tmp_path / "untied.pt")
    found, settings = converted(tmp_path / "untied.pt", tmp_path / "out", vocabulary="none")
    assert (settings["share_all_embeddings"], settings["tie_word_embeddings"]) == (False, shared_output)
    assert torch.equal(found["model.encoder.embed_tokens.weight"], model["encoder.embed_tokens.weight"])
    assert torch.equal(found["model.decoder.embed_tokens.weight"], model["decoder.embed_tokens.weight"])
    assert ("lm_head.weight" in found) is not shared_output
    from transformers import AutoModelForImageTextToText

    native, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(native.lm_head.weight, model["decoder.output_projection.weight"])
    export(tmp_path / "out", tmp_path / "back.pt")
    assert equal(torch.load(tmp_path / "back.pt", weights_only=False)["model"], model)


def test_averaged_weights_are_converted_only_when_asked_for(originals, tmp_path):
    file, document, tensors, _ = originals("en-tiny-vqa-ema")
    averaged, _ = converted(file, tmp_path / "ema", ema=True)
    assert not equal(averaged, tensors)
    name = "decoder.layers.0.fc1.weight"
    assert torch.equal(averaged["model." + name], document["extra_state"]["ema"][name])
    assert torch.equal(tensors["model." + name], document["model"][name])
    notes = json.loads((file.parent / "out" / "conversion.json").read_text())["notes"]
    assert any("--ema" in note for note in notes)


@pytest.mark.parametrize(
    ("option", "value"), [("encoder_prompt", True), ("no_cross_attention", True), ("adaptive_softmax_cutoff", "5,9")]
)
def test_an_option_the_native_model_does_not_have_is_refused_by_name(originals, tmp_path, option, value):
    _, document, _, _ = originals("cn-tiny")
    options = Namespace(**{**vars(document["cfg"]["model"]), option: value})
    torch.save({"args": options, "model": document["model"]}, tmp_path / "other.pt")
    with pytest.raises(ConfigurationError, match=option):
        convert(tmp_path / "other.pt", tmp_path / "out")


def test_a_base_file_with_a_large_script_is_refused(originals, tmp_path):
    _, document, _, _ = originals("cn-tiny")
    options = Namespace(**{**vars(document["cfg"]["model"]), "resnet_type": "resnet152", "encoder_layers": 12})
    torch.save({"args": options, "model": document["model"]}, tmp_path / "other.pt")
    with pytest.raises(ConfigurationError, match=r"encoder_layers is 12 in the options, but the tensors show 2"):
        convert(tmp_path / "other.pt", tmp_path / "out")


def test_a_layer_that_lost_its_scale_is_missing_not_ignored(originals, tmp_path):
    _, document, _, _ = originals("cn-tiny")
    model = {k: v for k, v in document["model"].items() if k != "decoder.layers.2.self_attn.c_attn"}
    torch.save({**document, "model": model}, tmp_path / "other.pt")
    with pytest.raises(CoverageError, match=r"decoder\.layers\.2\.self_attn\.c_attn \[4\]"):
        convert(tmp_path / "other.pt", tmp_path / "out")


def test_a_bart_of_fairseq_is_not_taken_for_an_ofa(tmp_path):
    torch.save({"model": {"encoder.layers.0.fc1.weight": torch.zeros(2, 2)}}, tmp_path / "bart.pt")
    with pytest.raises(UnknownFamilyError, match="BART"):
        convert(tmp_path / "bart.pt", tmp_path / "out")


def test_the_vocabulary_of_an_english_port_gives_the_original_s_rows(originals, tmp_path):
    from weightport.families.ofa.tokenizer import build_ofa_tokenizer

    file, _, _, _ = originals("en-tiny-args")
    folder = file.parent
    tokenizer = build_ofa_tokenizer(folder, 489, num_bins=40, code_dict_size=64)
    # A port's vocab.json names each row by its token, as the fast tokenizer of the original's files does too.
    rows = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.json").write_text(json.dumps({token: row for token, row in rows if row <= 384}))
    (tmp_path / "merges.txt").write_text((folder / "vocab.bpe").read_text())
    ported = build_ofa_tokenizer(tmp_path, 489, num_bins=40, code_dict_size=64)
    texts = json.loads((CASES / "en-tiny-args" / "tokenization.json").read_text())["cases"]
    for case in texts:
        if case["use_bpe"]:
            assert ported(case["text"])["input_ids"][1:-1] == case["ids"]


def test_adapter_tuning_is_carried_and_sits_behind_each_feed_forward_layer(originals, tmp_path):
    """The original's Adapter_Layer: x + up(relu(down(x))) on the output of fc2, before the residual is added."""
    from transformers import AutoModelForImageTextToText

    file, document, _, _ = originals("cn-tiny")
    generator = torch.Generator().manual_seed(3)
    adapters = {
        f"{side}.layers.{layer}.adapter.{part}": torch.randn(shape, generator=generator) * 0.3
        for side, layers in (("encoder", 2), ("decoder", 3))
        for layer in range(layers)
        for part, shape in (
            ("down_proj.weight", (5, 64)),
            ("down_proj.bias", (5,)),
            ("up_proj.weight", (64, 5)),
            ("up_proj.bias", (64,)),
        )
    }
    options = Namespace(**{**vars(document["cfg"]["model"]), "adapter": True, "adapter_dim": 5})
    torch.save({"args": options, "model": {**document["model"], **adapters}}, tmp_path / "adapted.pt")
    _, settings = converted(tmp_path / "adapted.pt", tmp_path / "out", vocabulary="none")
    assert settings["adapter_dim"] == 5
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    plain = AutoModelForImageTextToText.from_pretrained(file.parent / "out").eval()

    def behind(side: str, layer: int):
        get = {
            name: adapters[f"{side}.layers.{layer}.adapter.{name}"] for name in ("down_proj.weight", "down_proj.bias")
        }
        up = [adapters[f"{side}.layers.{layer}.adapter.up_proj.{part}"] for part in ("weight", "bias")]

        def hook(module, inputs, output):
            hidden = torch.relu(output @ get["down_proj.weight"].T + get["down_proj.bias"])
            return output + hidden @ up[0].T + up[1]

        return hook

    for side in ("encoder", "decoder"):
        for number, layer in enumerate(getattr(plain.model, side).layers):
            layer.fc2.register_forward_hook(behind(side, number))
    inputs = {"input_ids": torch.tensor([[0, 20, 30, 2]]), "decoder_input_ids": torch.tensor([[0, 40, 50]])}
    pixels = torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        found, expected = (each(**inputs, pixel_values=pixels).logits for each in (model, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    export(tmp_path / "out", tmp_path / "back.pt")
    assert equal(torch.load(tmp_path / "back.pt", weights_only=False)["model"], {**document["model"], **adapters})
