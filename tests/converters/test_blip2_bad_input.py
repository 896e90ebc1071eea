"""What the sources of a BLIP-2 can be wrong in: each gets one error that names it, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blip2_checkpoints import Lavis, without

from weightport.errors import (
    CheckpointError,
    ConfigurationError,
    CoverageError,
    UnsafeCheckpointError,
    UsageError,
    VocabularyError,
    WeightportError,
)


@pytest.fixture
def opt(tmp_path: Path) -> Lavis:
    return Lavis("opt-tiny", tmp_path / "opt")


@pytest.fixture
def t5(tmp_path: Path) -> Lavis:
    return Lavis("t5-coco-tiny", tmp_path / "t5")


@pytest.fixture
def itm(tmp_path: Path) -> Lavis:
    return Lavis("itm-tiny", tmp_path / "itm")


def refused(given: Lavis, tmp_path: Path, error: type[WeightportError], text: str, **settings) -> None:
    with pytest.raises(error, match=text):
        given.convert(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_missing_vision_encoder_is_named_with_its_option(opt, tmp_path):
    del opt.sources["vision"]
    refused(opt, tmp_path, UsageError, r"--vision \(eva_vit_g\.pth")


def test_missing_language_model_is_named_with_its_option_and_the_stray_head_is_no_language_model(opt, tmp_path):
    del opt.sources["llm"]
    refused(
        opt,
        tmp_path,
        UsageError,
        r"opt_model\.lm_head\.weight is but a tied copy .* with --llm .*names facebook/opt-2\.7b",
    )


def test_a_fine_tuned_vision_encoder_needs_no_file(t5, tmp_path):
    del t5.sources["vision"]
    assert t5.convert(tmp_path / "out").model.config.vision_config.image_size == 84


def test_language_model_of_another_width_is_refused_with_both_widths(opt, tmp_path):
    opt.edit("checkpoint", lambda document: document["model"].update({"opt_proj.weight": torch.zeros(2560, 32)}))
    refused(opt, tmp_path, ConfigurationError, r"2560 values, but .* is 40 wide\.\n.*facebook/opt-2\.7b")


def test_another_language_model_of_the_same_width_is_noticed_by_the_embedding_left_in_the_checkpoint(opt, tmp_path):
    def other(document):
        document["model"]["opt_model.lm_head.weight"][3] += 1

    opt.edit("checkpoint", other)
    refused(opt, tmp_path, ConfigurationError, r"opt_model\.lm_head\.weight in .* of other values")


def test_language_model_of_the_other_kind_is_refused(opt, t5, tmp_path):
    opt.sources["llm"] = t5.sources["llm"]
    refused(opt, tmp_path, CheckpointError, "model_type 't5'; the checkpoint has a projection to OPT")


def test_stage_1_takes_no_language_model(itm, opt, tmp_path):
    itm.sources["llm"] = opt.sources["llm"]
    refused(itm, tmp_path, UsageError, "stage-1 checkpoint, which has no language model")


def test_stage_1_without_a_tokenizer_names_the_option(itm, tmp_path):
    refused(itm, tmp_path, VocabularyError, "--qformer-tokenizer", qformer_tokenizer=None)


def test_vision_file_of_the_other_kind_is_refused_by_name(opt, tmp_path):
    clip = {"class_embedding": torch.zeros(48), "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(144, 48)}
    torch.save(clip, opt.sources["vision"])
    refused(opt, tmp_path, CheckpointError, r"names eva_clip_g, which is eva_vit_g\.pth")
    opt.edit("checkpoint", lambda document: document["model"])
    refused(opt, tmp_path, ConfigurationError, "positional_embedding|cannot be told", image_size=56)


def test_a_file_that_is_no_vision_encoder_is_refused(opt, tmp_path):
    opt.sources["vision"] = opt.sources["llm"]
    refused(opt, tmp_path, CheckpointError, "is no vision encoder of LAVIS")


def test_vision_encoder_of_another_width_is_refused(opt, t5, tmp_path):
    opt.sources["vision"] = t5.sources["vision"]
    refused(opt, tmp_path, ConfigurationError, r"is 56 wide, but the checkpoint's ln_vision\.weight 48")


def test_flan_t5_without_its_head_is_refused(t5, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = t5.sources["llm"]
    whole = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(
        {name: tensor for name, tensor in whole.items() if name != "lm_head.weight"}, folder / "model.safetensors"
    )
    refused(t5, tmp_path, CheckpointError, r"has no lm_head\.weight")


def test_language_model_in_a_pickle_that_would_execute_something_is_not_read(opt, tmp_path):
    import pickle
    import zipfile

    class Command:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    file = opt.sources["llm"] / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickle.dumps(Command(), 2) if name.endswith("data.pkl") else content)
    refused(opt, tmp_path, UnsafeCheckpointError, r"pytorch_model\.bin: its data\.pkl .* Nothing was executed")
    assert not (tmp_path / "executed").exists()


def test_language_model_without_a_configuration_is_refused(opt, tmp_path):
    (opt.sources["llm"] / "config.json").unlink()
    refused(opt, tmp_path, CheckpointError, r"has no config\.json")


def test_instruct_blip_is_refused_by_name(opt, tmp_path):
    opt.edit("checkpoint", lambda document: document["model"].update({"llm_proj.weight": torch.zeros(8, 8)}))
    refused(opt, tmp_path, CheckpointError, "is an InstructBLIP")


def test_instruct_blip_with_t5_is_told_by_its_word_embeddings(t5, tmp_path):
    words = {"Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(8, 24)}
    t5.edit("checkpoint", lambda document: document["model"].update(words))
    refused(t5, tmp_path, CheckpointError, "is an InstructBLIP")


def test_image_size_that_contradicts_a_fine_tuned_vision_encoder_is_refused(t5, tmp_path):
    refused(t5, tmp_path, UsageError, "--image-size 56: the checkpoint's vision encoder is of 84 px", image_size=56)


def test_head_counts_that_do_not_divide_are_refused_with_their_options(opt, tmp_path):
    refused(opt, tmp_path, UsageError, "say --vision-heads", vision_heads=5)
    refused(opt, tmp_path, UsageError, "say --qformer-heads", qformer_heads=5)


def test_more_layers_than_the_vision_encoder_has_are_refused(opt, tmp_path):
    refused(opt, tmp_path, UsageError, "--vision-layers 9: the vision encoder has 4 blocks", vision_layers=9)


def test_missing_and_unknown_tensors_of_every_source_are_named(opt, tmp_path):
    opt.edit("checkpoint", lambda document: document["model"].update({"extra.weight": torch.zeros(2)}))
    opt.edit("vision", without("blocks.1.mlp.fc1.bias"))
    with pytest.raises(CoverageError) as error:
        opt.convert(tmp_path / "out")
    assert "extra.weight [2]" in str(error.value) and "visual_encoder.blocks.1.mlp.fc1.bias" in str(error.value)


def cut_embedding(document):
    name = next(name for name in document if name.endswith("embed_tokens.weight"))
    document[name] = document[name][:349].clone()


def test_configuration_without_sizes_means_the_classs_own(opt, tmp_path):
    opt.edit_config(lambda config: [config.pop(name) for name in ("vocab_size", "word_embed_proj_dim")])
    refused(opt, tmp_path, CoverageError, r"embed_tokens\.weight: the model has \[50272, 40\], the file .*\[360, 40\]")


def test_language_model_without_its_embedding_is_refused(opt, tmp_path):
    opt.edit("llm", without("model.decoder.embed_tokens.weight"))
    refused(opt, tmp_path, CheckpointError, r"has no matrix model\.decoder\.embed_tokens\.weight")


def test_tokenizer_with_no_room_for_the_image_token_is_refused(opt, tmp_path):
    opt.edit("checkpoint", without("opt_model.lm_head.weight"))
    opt.edit("llm", cut_embedding)
    refused(opt, tmp_path, VocabularyError, "has 349 tokens, and the embedding 349 rows: there is none for <image>")


def test_tokenizer_that_puts_nothing_before_a_text_is_not_opts(opt, t5, tmp_path):
    refused(opt, tmp_path, VocabularyError, "OPT's puts", vocabulary=str(t5.sources["llm"]))


def test_without_a_tokenizer_ids_of_an_unreleased_vocabulary_are_not_guessed(opt, tmp_path):
    refused(opt, tmp_path, ConfigurationError, "360 rows is of no release", vocabulary="none")
