"""Our BLIP-2 of transformers' parts: with CLIP's ViT-L, and with an epsilon of its own behind EVA's ViT-g."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2ForConditionalGeneration,
    GenerationConfig,
    T5Config,
    pipeline,
)
from transformers.utils import logging

from weightport.api import check_parity, convert, release, verify
from weightport.errors import UsageError
from weightport.modeling.blip2_lavis.configuration_blip2_lavis import Blip2LavisConfig
from weightport.modeling.blip2_lavis.modeling_blip2_lavis import (
    Blip2LavisForConditionalGeneration,
    Blip2LavisForImageTextRetrieval,
)
from weightport.release import ReleaseOptions

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.append(str(GOLDEN))

import blip2_cases  # noqa: E402 - found beside the cases
from golden_case import Case  # noqa: E402


def converted(name: str, folder: Path, **settings) -> tuple[Case, Path]:
    case = Case(GOLDEN / "cases/blip2" / name, name)
    sources = blip2_cases.sources(case, case.materialize(folder / f"{name} original"))
    convert(sources, folder / name, "blip2", **blip2_cases.settings(case), **settings)
    return case, folder / name


@pytest.fixture(scope="module")
def vit_l(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("t5-vitL-tiny", tmp_path_factory.mktemp("clip"))[1]


def tiny(language: str = "opt", tower: str = "clip_vision_model", **changes) -> Blip2LavisConfig:
    text = {
        "opt": {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 20, "vocab_size": 40,
                "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40, "dropout": 0.0},
        "t5": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 20, "vocab_size": 40, "num_layers": 2,
               "num_decoder_layers": 3, "num_heads": 2, "tie_word_embeddings": False, "decoder_start_token_id": 0,
               "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "dropout_rate": 0.0},
    }[language]  # fmt: skip
    torch.manual_seed(0)
    return Blip2LavisConfig(
        vision_config={"model_type": tower, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        qformer_config={"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
                        "vocab_size": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        text_config=text, num_query_tokens=3, image_token_index=39, **changes,
    )  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[39, 39, 39, 2, 5, 6, 7], [39, 39, 39, 2, 8, 9, 4]])
    return {"pixel_values": torch.rand(2, 3, 28, 28), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", ["opt-tiny", "t5-coco-tiny", "itm-tiny"])
def test_exact_directories_are_lavis_without_a_correction(name: str, tmp_path: Path) -> None:
    case, directory = converted(name, tmp_path, exact=True)
    reference = blip2_cases.write_case(case, tmp_path / "reference.safetensors", kinds=("forward",))
    report = check_parity(directory, reference)
    assert report.passed, report.departures
    assert not any("corrected while measured" in note for note in report.notes)


def test_exact_and_native_directories_hold_the_same_tensors_under_the_same_names(tmp_path: Path) -> None:
    _, exact = converted("t5-coco-tiny", tmp_path / "exact", exact=True)
    _, native = converted("t5-coco-tiny", tmp_path / "native")
    a, b = (load_file(folder / "model.safetensors") for folder in (exact, native))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert type(AutoModelForImageTextToText.from_pretrained(native)) is Blip2ForConditionalGeneration
    assert type(AutoModelForImageTextToText.from_pretrained(exact)) is Blip2LavisForConditionalGeneration


@pytest.fixture(scope="module")
def native_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("opt-tiny", tmp_path_factory.mktemp("opt"))[1]


@pytest.mark.parametrize("made", ["vit_l", "native_opt"])
def test_a_directory_loads_answers_and_saves_without_a_word(
    made: str, request: pytest.FixtureRequest, tmp_path: Path, caplog
) -> None:
    directory: Path = request.getfixturevalue(made)
    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            model = AutoModelForImageTextToText.from_pretrained(directory)
            processor = AutoProcessor.from_pretrained(directory)
            picture = torch.randint(0, 255, (30, 40, 3), dtype=torch.uint8).numpy()
            ids = model.generate(**processor(images=picture, text="a photo of", return_tensors="pt"), max_new_tokens=4)
            pipe = pipeline("image-text-to-text", model=str(directory))
            said = pipe(images=Image.fromarray(picture), text="a photo of", max_new_tokens=2)[0]["generated_text"]
            model.save_pretrained(tmp_path / "again")
    finally:
        logging.disable_propagation()
    assert ids.shape[0] == 1 and said
    assert not caplog.records, [record.getMessage() for record in caplog.records]
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", directory))
    # A directory of float16 with norms in float32 is loaded in one of them.
    same = [torch.equal(again[key], first[key].to(again[key].dtype)) for key in first]
    assert again.keys() == first.keys() and all(same)


def test_transformers_t5_has_one_switch_for_three_ties_so_that_its_word_at_loading_stays(
    tmp_path: Path, caplog
) -> None:
    _, directory = converted("t5-coco-tiny", tmp_path)
    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING", logger="transformers"):
            AutoModelForImageTextToText.from_pretrained(directory)
    finally:
        logging.disable_propagation()
    (message,) = {record.getMessage() for record in caplog.records}
    assert "so we will NOT tie them" in message
    # The configuration forces the switch on. Where it is off by a detour, the stacks' embeddings are not the shared
    # one, and begin with random numbers.
    config = json.loads((directory / "config.json").read_text())
    names = {**T5Config.attribute_map, "scale_decoder_outputs": "tie_word_embeddings"}
    config["text_config"]["attribute_map"] = names
    config["text_config"]["scale_decoder_outputs"] = False
    (directory / "config.json").write_text(json.dumps(config))
    _, found = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    stacks = {f"language_model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    assert set(found["missing_keys"]) == stacks


def test_flan_t5s_head_is_no_embedding_even_when_rows_are_added(vit_l: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(vit_l)
    head = model.language_model.lm_head.weight.clone()
    assert "language_model.lm_head.weight" not in model.all_tied_weights_keys
    model.language_model.resize_token_embeddings(260)
    assert torch.equal(model.language_model.lm_head.weight[: len(head)], head)


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize("tower", ["clip_vision_model", "blip_2_vision_model"])
def test_a_configuration_comes_back_from_disk_and_builds_the_same_model(language, tower, tmp_path: Path) -> None:
    config = tiny(language, tower, ln_vision_eps=3e-4)
    Blip2LavisForConditionalGeneration(config).save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert type(found) is Blip2LavisConfig and found.vision_config.model_type == tower
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.vision_model.post_layernorm.eps == 3e-4
    assert model.vision_model.encoder.layers[0].layer_norm1.eps != 3e-4


@pytest.mark.parametrize("tower", ["clip_vision_model", "blip_2_vision_model"])
def test_attention_implementations_agree(tower: str) -> None:
    config, given = tiny("opt", tower), inputs()
    outputs = []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = Blip2LavisForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            outputs.append(model(**given).logits)
    assert torch.allclose(*outputs, atol=1e-5)


def test_every_trained_parameter_gets_a_gradient_with_and_without_checkpoints() -> None:
    torch.manual_seed(0)
    model, given = Blip2LavisForConditionalGeneration(tiny()).train(), inputs()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        lacking = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not lacking, lacking
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_a_decoder_deeper_than_its_encoder_generates_with_and_without_a_cache() -> None:
    torch.manual_seed(0)
    model, given = Blip2LavisForConditionalGeneration(tiny("t5")).eval(), inputs()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            # Large enough that every token depends on those before it.
            parameter.copy_(torch.randn_like(parameter))
    for beams in (1, 3):
        settings = {"max_new_tokens": 8, "num_beams": beams}
        cached = model.generate(**given, **settings)
        by_config = GenerationConfig(**settings, use_cache=False, eos_token_id=1, pad_token_id=0)
        by_config.decoder_start_token_id = 0
        assert torch.equal(cached, model.generate(**given, **settings, use_cache=False))
        assert torch.equal(cached, model.generate(**given, generation_config=by_config))


def test_pictures_of_another_size_are_taken_on_request() -> None:
    model = Blip2LavisForConditionalGeneration(tiny()).eval()
    given = {**inputs(), "pixel_values": torch.rand(2, 3, 56, 56)}
    with pytest.raises(ValueError, match="doesn't match"):
        model(**given)
    assert model(**given, interpolate_pos_encoding=True).logits.isfinite().all()


def test_retrieval_takes_vit_l_too() -> None:
    config = tiny()
    config.qformer_config.use_qformer_text_input = True
    config.image_token_index = 40
    model, given = Blip2LavisForImageTextRetrieval(config).eval(), inputs()
    for matching in (True, False):
        output = model(**given, use_image_text_matching_head=matching)
        assert output.logits_per_image.shape == (2, 2)


ELSEWHERE = """
import json, sys
sys.modules["weightport"] = None  # any import of it fails
sys.meta_path = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("weightport")]
import torch, transformers
from PIL import Image

for folder, auto_class in json.loads(sys.argv[1]):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    picture = Image.radial_gradient("L").convert("RGB")
    inputs = processor(images=picture, text="a photo of", return_tensors="pt")
    with torch.no_grad():
        generates = hasattr(model, "language_model")
        found = model.generate(**inputs, max_new_tokens=4) if generates else model(**inputs).logits_per_image
    print(json.dumps(found.tolist()))
"""


def test_portable_directories_need_no_weightport(tmp_path: Path) -> None:
    import transformers

    classes = {
        "t5-vitL-tiny": "AutoModelForImageTextToText",
        "itm-tiny": "AutoModelForZeroShotImageClassification",
    }
    made = [(converted(name, tmp_path, exact=True, portable=True)[1], each) for name, each in classes.items()]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE, json.dumps([(str(folder), each) for folder, each in made])]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]

    picture = Image.radial_gradient("L").convert("RGB")
    for (directory, auto_class), line in zip(made, finished.stdout.splitlines(), strict=True):
        model = getattr(transformers, auto_class).from_pretrained(directory).eval()
        inputs = AutoProcessor.from_pretrained(directory)(images=picture, text="a photo of", return_tensors="pt")
        with torch.no_grad():
            generates = hasattr(model, "language_model")
            found = model.generate(**inputs, max_new_tokens=4) if generates else model(**inputs).logits_per_image
        assert torch.tensor(json.loads(line)).allclose(found, atol=1e-6)


def test_only_our_own_class_is_written_with_its_code(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--portable: this model becomes transformers' own class"):
        converted("opt-tiny", tmp_path, portable=True)
    assert not (tmp_path / "opt-tiny").exists()


def test_a_retrieval_directory_of_our_own_class_is_verified_and_released(tmp_path: Path) -> None:
    _, directory = converted("itm-tiny", tmp_path, exact=True)
    found = verify(directory)
    assert not [each for each in found.findings if each.subject == "config.json"], found.findings
    card = release(directory, ReleaseOptions("somebody/matching", licence="bsd-3-clause", dry_run=True)).card
    assert "AutoModelForZeroShotImageClassification" in card and "zero-shot-image-classification" in card
    assert "trust_remote_code=True" in card
