"""Revisions that no golden case was dumped of, against the original's computations written down plainly, and against
the cases of revisions that compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moondream2_checkpoints import CASES, Original
from PIL import Image
from plain_moondream import image_vectors_of_2024, logits_of_2025
from safetensors.torch import load_file
from transformers import AutoProcessor

from weightport.api import convert, load_native
from weightport.families.moondream2.revisions import revision_named
from weightport.modeling.moondream.image_processing_moondream import MoondreamImageProcessor

VISION_HEADS = 16


def reference(case: str) -> dict[str, torch.Tensor]:
    return load_file(CASES / case / "reference.safetensors")


def converted(folder: Path, out: Path, revision: str | None = None) -> Any:
    """The native model, in float32."""
    convert(folder, out, revision=revision)
    return load_native(out, torch.float32)


def in_float32(original: Original) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in original.state().items()}


@pytest.fixture(scope="module")
def one_view(tmp_path_factory) -> Original:
    return Original.of("tiny-2024-04-02", tmp_path_factory.mktemp("one_view"))


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Original:
    return Original.of("tiny-2024-08-26", tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Original:
    return Original.of("tiny-2025-06-21", tmp_path_factory.mktemp("tiles"))


# One view: 2024-03-04 to 2024-05-08.


def test_plain_computation_is_the_originals(one_view) -> None:
    dumped, state = reference("tiny-2024-04-02"), in_float32(one_view)
    for pixels, wanted in zip(dumped["pixel_values"], dumped["image_embeds"]):
        found = image_vectors_of_2024(state, pixels, heads=VISION_HEADS, exact=False, epsilon=1e-5)
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("revision", ["2024-03-04", "2024-03-13"])
def test_pictures_of_march_2024_go_through_the_exact_gelu(one_view, tmp_path: Path, revision: str) -> None:
    pixels, state = reference("tiny-2024-04-02")["pixel_values"], in_float32(one_view)
    model = converted(one_view.folder, tmp_path / "out", revision)
    with torch.no_grad():
        found = model.get_image_features(pixels).pooler_output
    wanted = torch.stack([
        image_vectors_of_2024(state, each, heads=VISION_HEADS, exact=True, epsilon=1e-6) for each in pixels
    ])  # fmt: skip
    assert float((found - wanted).abs().max()) <= 1e-5
    # What the later revisions compute lies 7e-4 away, and the later epsilon 8e-5: neither would pass.
    later = reference("tiny-2024-04-02")["image_embeds"]
    epsilon = image_vectors_of_2024(state, pixels[0], heads=VISION_HEADS, exact=True, epsilon=1e-5)
    assert float((found - later).abs().max()) > 2e-4 and float((found[0] - epsilon).abs().max()) > 2e-5


def test_may_2024_computes_what_april_did(one_view, tmp_path: Path) -> None:
    config = dict(one_view.config)
    config["text_config"] = config.pop("phi_config")
    dumped = reference("tiny-2024-04-02")
    model = converted(one_view.write(tmp_path / "in", config=config), tmp_path / "out")
    assert json.loads((tmp_path / "out/conversion.json").read_text())["options"]["revision"] == "2024-05-08"
    with torch.no_grad():
        found = model.get_image_features(dumped["pixel_values"]).pooler_output
    assert torch.allclose(found, dumped["image_embeds"], atol=1e-5)


# A whole view and crops: 2024-05-20 to 2024-08-26.


@pytest.mark.pillow13
@pytest.mark.parametrize("revision", ["2024-05-20", "2024-07-23"])
def test_pictures_of_may_and_july_are_seen_as_in_august(crops, tmp_path: Path, revision: str) -> None:
    """Only August has a region head; tiles, merging and pixels are the same."""
    state = {name: each for name, each in crops.state().items() if not name.startswith("region_model.")}
    folder = crops.write(tmp_path / "in", state)
    # Nothing tells May from July, and nothing need: they compute the same.
    model = converted(folder, tmp_path / "out", None if revision == "2024-07-23" else revision)
    assert json.loads((tmp_path / "out/conversion.json").read_text())["options"]["revision"] == revision
    processor, dumped = AutoProcessor.from_pretrained(tmp_path / "out"), reference("tiny-2024-08-26")
    modes = {2: "L", 3: "RGB", 4: "RGBA"}
    stored = [dumped[f"image.{row}"] for row in range(4)]
    pictures = [Image.fromarray(each.numpy(), modes[each.shape[2] if each.ndim == 3 else 2]) for each in stored]
    inputs = processor.image_processor(pictures, return_tensors="pt")
    assert inputs["image_grids"].tolist() == [[1, 2], [2, 1], [2, 2], [0, 0]]
    with torch.no_grad():
        found = model.get_image_features(**inputs).pooler_output
    assert torch.allclose(found, dumped["image_embeds"], atol=1e-5)


# Overlapping tiles: 2025.


@pytest.mark.parametrize("revision", ["2025-01-09", "2025-03-27", "2025-04-14"])
def test_pixels_of_early_2025_are_rounded_to_float16_at_every_step(tiles, tmp_path: Path, revision: str) -> None:
    config = tiles.config
    # Of the released tokenizer: its ids of start and end.
    config["config"]["tokenizer"] = {"bos_id": 0, "eos_id": 0}
    folder = tiles.write(tmp_path / "in", config=config, without=("tokenizer.json",))
    convert(folder, tmp_path / "out", revision=revision, vocabulary="none")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["region_config"]["size_scale"] == ("linear" if revision == "2025-01-09" else "log")
    assert config["answer_token_id"] is None and config["reasoning_config"] is None
    images = MoondreamImageProcessor(
        size={"height": 20, "width": 20}, views="tiles", resample=1, patch_size=4, overlap_margin=1, max_tiles=6,
        normalize_dtype=revision_named(revision).normalize_dtype,
    )  # fmt: skip
    dumped = reference("tiny-2025-06-21")
    found = images(Image.fromarray(dumped["image.0"].numpy()), return_tensors="np")["pixel_values"][0]
    half = np.float16
    steps = (dumped["crops.0"].numpy().astype(half) / half(255) - half(0.5)) / half(0.5)
    assert np.array_equal(found, steps.transpose(0, 3, 1, 2).astype(np.float32))


def test_fewer_key_heads_compute_what_the_original_would(tiles, tmp_path: Path) -> None:
    state, config = tiles.state(), tiles.config
    for name in [name for name in state if "text.blocks" in name and ".attn.qkv." in name]:
        state[name] = torch.cat([state[name][:128], state[name][128:192], state[name][256:320]])
    config["config"]["text"]["n_kv_heads"] = 1
    model = converted(tiles.write(tmp_path / "in", state, config), tmp_path / "out")
    plain = {name.removeprefix("model."): each.float() for name, each in state.items()}
    embeds = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, 40), 11)
    ids[:, 1:26] = model.config.image_token_id
    with torch.no_grad():
        found = model(input_ids=ids, inputs_embeds=embeds).logits[0]
    wanted = logits_of_2025(plain, embeds[0], heads=2, key_heads=1, prefix=26)
    assert float((found - wanted).abs().max()) <= 2e-5
    whole = {name.removeprefix("model."): each for name, each in in_float32(tiles).items()}
    native = converted(tiles.folder, tmp_path / "whole")
    with torch.no_grad():
        found = native(input_ids=ids, inputs_embeds=embeds).logits[0]
    assert float((found - logits_of_2025(whole, embeds[0], heads=2, key_heads=2, prefix=26)).abs().max()) <= 2e-5
