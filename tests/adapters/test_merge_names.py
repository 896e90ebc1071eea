"""Names on disk are not names in memory: adapters find their tensors through transformers' rules, or are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from matrix import CONFIGURATIONS, REFUSED, merged_by_peft, pairs, run, write_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, HUB_NAMES, rename_stored
from tiny_models import load, write_adapter

from weightport.api import merge_lora
from weightport.converters.name_spaces import name_space
from weightport.errors import AdapterError

NEAREST = 0.55
"""Roundings: half of one is what rounding to the nearest costs."""

FAST = {
    *((name, "all-linear") for name in FAMILIES),
    *((name, "parameters") for name in ("paligemma", "mixtral", "qwen3_moe", "gpt_oss")),
    *((name, "parameters-patterns") for name in ("llava", "mixtral", "gpt_oss", "llama")),
    *((name, "router") for name in ("mixtral", "qwen3_moe")),
    *((name, "tokens-added-saved") for name in ("llama", "paligemma", "blip2", "bart")),
    *((name, "tokens-added-rows") for name in ("llama_tied", "qwen2_vl", "blip2")),
    ("t5", "embedding"),
    ("florence2", "embedding"),
    ("blip2", "embedding"),
}


@pytest.mark.parametrize(
    ("name", "hub"),
    [*((name, False) for name in FAMILIES), *((name, True) for name in HUB_NAMES)],
    ids=[*(f"{name}-fresh" for name in FAMILIES), *(f"{name}-hub" for name in HUB_NAMES)],
)
def test_every_tensor_of_the_model_is_found_in_the_files(name: str, hub: bool, tmp_path: Path) -> None:
    """Blocks of stored tensors, put where the map says, are what transformers loads."""
    write_model(name, tmp_path, hub=hub)
    stored = load_file(tmp_path / "model.safetensors")
    space = name_space(tmp_path, {key: tuple(value.shape) for key, value in stored.items()})
    assert not space.unused and not space.permuted
    for key, expected in load(tmp_path).state_dict().items():
        found = torch.full_like(expected, -1)
        for piece in space.pieces(key):
            block = stored[piece.stored][tuple(slice(*span) for span in piece.source)]
            block = block.permute([axis for axis in piece.axes if axis is not None])
            spans = tuple(slice(start, start + piece.extent(axis)) for axis, start in enumerate(piece.start))
            found[spans] = block.reshape([piece.extent(axis) for axis in range(len(piece.axes))])
        assert torch.equal(found, expected), key


@pytest.mark.parametrize(("name", "configuration"), sorted(FAST))
def test_merge_is_pefts_in_names_and_values(name: str, configuration: str, tmp_path: Path) -> None:
    assert run(name, configuration, tmp_path, torch.float32) < NEAREST


@pytest.mark.parametrize("name", HUB_NAMES)
def test_merge_into_a_directory_with_the_hubs_names_is_pefts(name: str, tmp_path: Path) -> None:
    assert run(name, "all-linear", tmp_path, torch.float32, hub=True) < NEAREST


@pytest.mark.slow
@pytest.mark.parametrize(("name", "configuration"), pairs())
def test_every_architecture_and_configuration(name: str, configuration: str, tmp_path: Path) -> None:
    for dtype in CONFIGURATIONS[configuration].dtypes:
        assert run(name, configuration, tmp_path / str(dtype), dtype) < NEAREST, dtype


@pytest.mark.parametrize(("name", "configuration"), sorted(REFUSED))
def test_pair_that_cannot_be_merged_is_refused(name: str, configuration: str, tmp_path: Path) -> None:
    error, said = REFUSED[name, configuration]
    with pytest.raises(error, match=said):
        run(name, configuration, tmp_path, torch.float32)


def renamed(adapter: Path, folder: Path, rename: Callable[[str], str], **settings: Any) -> Path:
    """A copy of an adapter whose modules have other names."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model."
    save_file(
        {prefix + rename(key.removeprefix(prefix)): value for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


EARLIER: dict[str, Callable[[str], str]] = {
    "qwen2_vl": lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual."),
    "llava": lambda name: re.sub(r"^model\.language_model\.", "language_model.model.", name).replace(
        "model.vision_tower.", "vision_tower.vision_model."
    ),
    "paligemma": lambda name: name.replace("model.vision_tower.", "model.vision_tower.vision_model."),
}


@pytest.mark.parametrize("name", EARLIER)
def test_adapter_with_the_names_of_an_earlier_transformers_is_the_same_merge(name: str, tmp_path: Path) -> None:
    base = write_model(name, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules="all-linear"))
    earlier = renamed(adapter, tmp_path / "earlier", EARLIER[name], target_modules=["q_proj"])
    assert set(load_file(earlier / "adapter_model.safetensors")) != set(
        load_file(adapter / "adapter_model.safetensors")
    )
    expected = merge_lora(base, [(adapter, 1.0)], tmp_path / "a").directory / "model.safetensors"
    found = merge_lora(base, [(earlier, 1.0)], tmp_path / "b").directory / "model.safetensors"
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("name", ["qwen2_vl", "paligemma", "llava"])
@pytest.mark.parametrize("says", ["class", "folder", "nothing"])
def test_adapter_of_a_language_model_does_not_enter_a_vision_language_model(
    name: str, says: str, tmp_path: Path
) -> None:
    other = write_model("llama", tmp_path / "llama")
    adapter = write_adapter(other, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    if says != "class":
        config["auto_mapping"] = None
    if says == "nothing":
        config["base_model_name_or_path"] = None
    path.write_text(json.dumps(config))
    base = write_model(name, tmp_path / "base")
    # Qwen2-VL's earlier names are Llama's, and these tiny models agree in their shapes.
    known = r"another architecture: found .*llama.*expected|belongs to another base"
    said = (
        r"says nothing of its base, and peft would not load it" if (name, says) == ("qwen2_vl", "nothing") else known
    )
    with pytest.raises(AdapterError, match=said):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapter_of_a_language_model_does_not_enter_files_that_have_its_names(tmp_path: Path) -> None:
    """Qwen2-VL's repositories on the Hub have Llama's names."""
    other = write_model("llama", tmp_path / "llama")
    adapter = write_adapter(other, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), "auto_mapping": None}
    base = write_model("qwen2_vl", tmp_path / "base")
    rename_stored(
        base, lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    )
    for named in (None, ""):
        path.write_text(json.dumps({**config, "base_model_name_or_path": named}))
        with pytest.raises(AdapterError, match="says nothing of its base"):
            merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    assert "its folder" in merge_lora(base, [(adapter, 1.0)], tmp_path / "out").record["notes"][0]


def test_base_that_an_adapter_names_is_looked_up_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_model("llama", tmp_path / "llama")
    adapter = write_adapter(other, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    path = adapter / "adapter_config.json"
    named = {"auto_mapping": None, "base_model_name_or_path": "someone/else"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    base = write_model("gemma", tmp_path / "base")
    cached = tmp_path / "cache" / "models--someone--else"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "abc").symlink_to(other)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AdapterError, match=r"another architecture: found .*llama.*expected GemmaForCausalLM"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")


def tuned(base: Path, folder: Path) -> Path:
    """A fine-tuned copy: linear layers by changes of rank two, norms by whole ones."""
    model = load(base)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
            elif parameter.ndim == 2 and "embed" not in name and "head" not in name:
                parameter.add_(torch.randn(len(parameter), 2) @ torch.randn(2, parameter.shape[1]) * 0.02)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["paligemma", "llava", "qwen2_vl", "internvl"])
def test_extracted_adapter_loads_in_peft_without_a_missing_key(name: str, tmp_path: Path) -> None:
    from weightport.api import extract_lora

    base = write_model(name, tmp_path / "base")
    target = tuned(base, tmp_path / "tuned")
    extract_lora(target, base, tmp_path / "adapter", 2, others="save")
    # merged_by_peft refuses peft's warning of missing keys.
    found = merged_by_peft(base, tmp_path / "adapter")
    expected = load(target, torch.float64).state_dict()
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5, msg=key)


def test_change_of_fused_experts_is_refused_by_name(tmp_path: Path) -> None:
    from weightport.api import extract_lora
    from weightport.errors import CoverageError

    base = write_model("mixtral", tmp_path / "base")
    model = load(base)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(CoverageError, match=r"keeps it within model.layers.0.mlp.experts.down_proj"):
        extract_lora(tmp_path / "tuned", base, tmp_path / "adapter", 2)
