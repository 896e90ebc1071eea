"""BLIP-2 checkpoints in their further forms, and what a converted directory holds and does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from blip2_checkpoints import Lavis, without
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Blip2ForImageTextRetrieval

from weightport.api import check_parity, export, plan_conversion
from weightport.checkpoints import open_checkpoint
from weightport.converters.record import read_record
from weightport.converters.side_file import SIDE_FILE
from weightport.errors import UsageError


@pytest.fixture
def opt(tmp_path: Path) -> Lavis:
    return Lavis("opt-tiny", tmp_path / "opt")


@pytest.fixture
def t5(tmp_path: Path) -> Lavis:
    return Lavis("t5-coco-tiny", tmp_path / "t5")


@pytest.fixture
def itm(tmp_path: Path) -> Lavis:
    return Lavis("itm-tiny", tmp_path / "itm")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_bare_state_dict_gives_the_same_model(opt, tmp_path):
    opt.convert(tmp_path / "whole")
    opt.edit("checkpoint", lambda document: document["model"])
    opt.convert(tmp_path / "bare", image_size=56)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "bare"))


def test_strays_may_be_absent_and_the_head_of_opt_may_be_in_its_file(opt, tmp_path):
    opt.convert(tmp_path / "whole")
    opt.edit("checkpoint", without("opt_model.lm_head.weight"))

    def with_head(document):
        key = next(name for name in document if name.endswith("decoder.embed_tokens.weight"))
        document["lm_head.weight"] = document[key]

    opt.edit("llm", with_head)
    opt.convert(tmp_path / "other")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "other"))


def test_every_source_is_hashed_and_every_tensor_accounted_for(opt, tmp_path):
    opt.convert(tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert {name: len(source["files"]) for name, source in record["sources"].items()} == {
        "checkpoint": 1, "vision": 1, "llm": 1,
    }  # fmt: skip
    accounted = {name for source in record["sources"].values() for name in source["tensors"]} | set(record["unused"])
    assert {"opt_model.lm_head.weight", "visual_encoder.blocks.3.norm1.weight"} <= set(record["unused"])
    opened = sum(len(open_checkpoint(path).section("")) for path in (opt.sources["vision"], opt.sources["llm"]))
    trained = open_checkpoint(opt.sources["checkpoint"]).section("model")
    # The stray head has the name that the language model's own file may have.
    assert len(accounted) == opened + len(trained) - ("lm_head.weight" in open_checkpoint(opt.sources["llm"]))


def test_a_dry_run_says_which_file_gives_what(opt, tmp_path):
    planned = plan_conversion(opt.sources, "blip2", **opt.settings)
    model = planned.model
    assert {name.partition(".")[0] for name in model.tensors_of("vision")} == {"visual_encoder"}
    assert {name.partition(".")[0] for name in model.tensors_of("llm")} == {"opt_model"}
    assert {name.partition(".")[0] for name in model.tensors_of("checkpoint")} == {
        "query_tokens", "ln_vision", "Qformer", "opt_proj",
    }  # fmt: skip


def test_flan_t5s_head_stays_its_own_through_loading_and_saving(t5, tmp_path):
    t5.convert(tmp_path / "out")
    written = weights(tmp_path / "out")
    head, shared = "language_model.lm_head.weight", "language_model.shared.weight"
    assert not torch.equal(written[head], written[shared])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(model.language_model.lm_head.weight, written[head])
    assert torch.equal(model.language_model.encoder.embed_tokens.weight, written[shared])
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(weights(tmp_path / "again")[head], written[head])
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert again.config.text_config.dense_act_fn == "gelu" and not again.config.text_config.scale_decoder_outputs
    assert not json.loads((tmp_path / "out/config.json").read_text())["text_config"]["tie_word_embeddings"]


def test_names_on_disk_are_those_that_transformers_writes(opt, tmp_path):
    opt.convert(tmp_path / "out")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again").keys() == weights(tmp_path / "out").keys()


def test_t5_rounded_as_lavis_does_gives_its_logits(t5, tmp_path):
    t5.convert(tmp_path / "out", llm_dtype="bf16-as-lavis")
    written = weights(tmp_path / "out")
    assert {tensor.dtype for name, tensor in written.items() if name.startswith("language_model.")} == {torch.bfloat16}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    model.vision_model.post_layernorm.eps = 1e-5
    given, queries = t5.case.tensors, model.config.num_query_tokens
    places = torch.full((len(given["input_ids"]), queries), model.config.image_token_id)
    with torch.no_grad():
        output = model(
            pixel_values=given["pixel_values"],
            input_ids=torch.cat([places, given["input_ids"]], 1),
            attention_mask=given["lm_attention_mask"],
            labels=given["labels"],
            decoder_attention_mask=given["decoder_attention_mask"],
        )
    expected = given["logits.bf16_weights"]
    assert (output.logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert abs(float(output.loss - given["loss.bf16_weights"])) < 1e-5


def test_what_stage_1_has_no_place_for_stands_in_a_side_file_and_comes_back(itm, tmp_path):
    itm.convert(tmp_path / "out")
    beside = open_checkpoint(tmp_path / "out" / SIDE_FILE)
    assert set(beside) == {
        "temp", "Qformer.cls.predictions.bias", "Qformer.cls.predictions.decoder.bias",
        *(f"Qformer.cls.predictions.transform.{layer}.{kind}" for layer in ("dense", "LayerNorm")
          for kind in ("weight", "bias")),
    }  # fmt: skip
    dropped = {item["name"]: item["because"] for item in read_record(tmp_path / "out")["dropped"]}
    assert "temperature" in dropped["temp"]
    Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out")
    back = torch.load(export(tmp_path / "out", tmp_path / "back.pth").path, weights_only=True)["model"]
    original = torch.load(itm.sources["checkpoint"], weights_only=True)["model"]
    assert list(back) == list(original) and all(torch.equal(back[name], original[name]) for name in original)


def test_a_directory_without_a_record_exports_what_lavis_may_have_trained(opt, tmp_path):
    opt.convert(tmp_path / "out")
    (tmp_path / "out/conversion.json").unlink()
    made = export(tmp_path / "out", tmp_path / "back.pth")
    back = torch.load(made.path, weights_only=True)["model"]
    trained = torch.load(opt.sources["checkpoint"], weights_only=True)["model"]
    assert {name.partition(".")[0] for name in back} == {
        "Qformer", "query_tokens", "ln_vision", "opt_proj", "visual_encoder",
    }  # fmt: skip
    assert made.left_out.keys() == {"opt_model."} and "takes from its own folder" in made.left_out["opt_model."]
    for name in set(trained) & set(back):
        assert torch.equal(trained[name], back[name]), name


def test_every_source_may_be_exported_into_one_file_that_converts_again(opt, tmp_path):
    opt.convert(tmp_path / "out")
    with_record = torch.load(export(tmp_path / "out", tmp_path / "one.pth", part="all").path, weights_only=True)
    (tmp_path / "out/conversion.json").unlink()
    back = torch.load(export(tmp_path / "out", tmp_path / "two.pth", part="all").path, weights_only=True)["model"]
    assert with_record["model"].keys() - back.keys() == {"Qformer.bert.embeddings.position_ids"}
    assert {"visual_encoder.blocks.0.attn.q_bias", "opt_model.model.decoder.embed_tokens.weight"} <= set(back)
    # LAVIS's own checkpoint again, which now holds everything but the folder's configuration and tokenizer.
    torch.save({"model": back}, opt.sources["checkpoint"])
    opt.convert(tmp_path / "again", image_size=0)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "again"))


def test_an_unknown_part_is_refused_with_those_that_there_are(opt, tmp_path):
    opt.convert(tmp_path / "out")
    with pytest.raises(UsageError, match=r"not made of a source 'vit'; it was made of checkpoint, .* \(or say all\)"):
        export(tmp_path / "out", tmp_path / "back.pth", part="vit")
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.pillow13
@pytest.mark.parametrize("name", ["opt-tiny", "opt-interp-tiny", "t5-coco-tiny"])
def test_prompts_and_pictures_are_the_originals(name, tmp_path):
    given = Lavis(name, tmp_path / "in")
    given.convert(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    special = {"<image>", "a<image>b"}
    cases = [case for case in given.case.spec["reference"]["tokenizer_cases"] if case["text"] not in special]
    assert len(cases) >= 34
    for case in cases:
        assert processor.tokenizer(case["text"]).input_ids == case["ids"], case["text"]
    for number in range(len(given.case.tensors["pixel_values"])):
        picture = given.case.tensors[f"image.{number}"].numpy()
        made = processor(images=picture, text="a", return_tensors="pt")
        assert torch.equal(made.pixel_values[0], given.case.tensors["pixel_values"][number])
        queries = processor.num_query_tokens
        assert made.input_ids[0, :queries].eq(len(processor.tokenizer) - 1).all()
        assert not made.input_ids[0, queries:].eq(len(processor.tokenizer) - 1).any()


def test_opt_is_asked_behind_padding_on_the_left_and_stops_at_a_line_end(opt, tmp_path):
    opt.convert(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.padding_side == "left"
    config = json.loads((tmp_path / "out/config.json").read_text())
    line_end = processor.tokenizer("\n", add_special_tokens=False).input_ids
    assert [config["text_config"]["eos_token_id"]] == line_end
    assert [json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]] == line_end


def test_stage_1s_tokenizer_is_berts_with_one_more_token(itm, tmp_path):
    itm.convert(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.bos_token == "[DEC]" and processor.tokenizer.bos_token_id == 179
    cases = itm.case.spec["reference"]["tokenizer_cases"]
    assert all(
        processor.tokenizer(case["text"]).input_ids == case["ids"] for case in cases if "<image>" not in case["text"]
    )


def test_positions_are_resized_in_float32_and_kept_so(tmp_path):
    given = Lavis("opt-interp-tiny", tmp_path / "in")
    made = given.convert(tmp_path / "out")
    table = weights(tmp_path / "out")["vision_model.embeddings.position_embedding"]
    assert table.dtype == torch.float32 and table.shape[1] == 50
    assert any("resized from 4² to 7²" in note for note in made.record["notes"])
    report = check_parity(tmp_path / "out", blip2_reference(given, tmp_path), dtypes=[torch.float64])
    assert report.passed


def blip2_reference(given: Lavis, folder: Path) -> Path:
    import blip2_cases

    return blip2_cases.write_case(given.case, folder / "reference.safetensors", kinds=("forward",))


def test_a_language_model_may_be_named_by_its_hub_id(opt, tmp_path, monkeypatch):
    asked = []

    def download(repository, names):
        asked.append((repository, tuple(names)))
        return opt.sources["llm"]

    monkeypatch.setattr("weightport.hub.download_folder", download)
    given = {**opt.sources, "llm": "facebook/opt-tiny"}
    planned = plan_conversion(given, "blip2", **opt.settings)
    assert len(planned.model.tensors_of("llm")) > 30
    ((repository, names),) = asked
    assert repository == "facebook/opt-tiny" and "*.json" in names and not any(".py" in name for name in names)


def test_an_early_opt_files_format_number_is_dropped_with_its_reason(opt, tmp_path):
    def with_version(document):
        document["decoder.version" if "decoder.embed_tokens.weight" in document else "model.decoder.version"] = (
            torch.tensor([3.0])
        )

    opt.edit("llm", with_version)
    made = opt.convert(tmp_path / "out")
    assert {item["name"] for item in made.record["dropped"]} >= {"opt_model.model.decoder.version"}
