"""Heads tied to embeddings, and vocabularies that grew: never a change in a place that was not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from matrix import write_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_merge_proof import merged
from tiny_models import V, applied, load, logits, write_adapter, write_base

from weightport.adapters.merging.merge import MergeOptions
from weightport.api import merge_lora
from weightport.errors import AdapterError, CoverageError

HEADS = {"opt": "lm_head", "gemma": "lm_head", "t5": "lm_head", "gpt2": "lm_head", "bart": "lm_head"}
EMBEDDINGS = {"opt": "embed_tokens", "gemma": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}


def adapter_on(base: Path, folder: Path, *modules: str, **settings: Any) -> Path:
    return write_adapter(base, folder, LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), **settings))


def assert_same_logits(base: Path, adapter: Path, merged: Path, *, change: Any = None) -> None:
    expected = logits(applied(base, adapter, change=change))
    torch.testing.assert_close(logits(load(merged).double()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_adapter_on_a_tied_head_is_refused_and_merged_when_untied(name: str, tmp_path: Path) -> None:
    base = write_base(name, tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", HEADS[name])
    with pytest.raises(AdapterError, match="--untie"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged = merge_lora(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(untie=True))
    assert_same_logits(base, adapter, merged.directory)
    if name != "t5":
        assert json.loads((merged.directory / "config.json").read_text())["tie_word_embeddings"] is False
    embedding = {"opt": "model.decoder.embed_tokens.weight", "t5": "shared.weight"}.get(name)
    if embedding:
        before, after = (load_file(folder / "model.safetensors")[embedding] for folder in (base, merged.directory))
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_adapter_on_a_tied_embedding_is_refused_and_merged_when_untied(name: str, tmp_path: Path) -> None:
    base = write_base(name, tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", EMBEDDINGS[name])
    with pytest.raises(AdapterError, match="--untie"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    merged = merge_lora(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(untie=True))
    assert_same_logits(base, adapter, merged.directory)


def test_adapter_on_both_tied_places_is_merged_when_untied(tmp_path: Path) -> None:
    base = write_base("gemma", tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", "embed_tokens", "lm_head", "q_proj")
    merged = merge_lora(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(untie=True))
    assert_same_logits(base, adapter, merged.directory)


def test_adapter_trained_in_both_places_at_once_stays_tied(tmp_path: Path) -> None:
    base = write_base("gemma", tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", "embed_tokens", "lm_head", ensure_weight_tying=True)
    merged = merge_lora(base, [(adapter, 1.0)], tmp_path / "out").directory
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    assert_same_logits(base, adapter, merged)


def test_head_saved_as_a_whole_is_written_apart(tmp_path: Path) -> None:
    base = write_base("gemma", tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", "q_proj", modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match="--untie"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    merged = merge_lora(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(untie=True))
    assert_same_logits(base, adapter, merged.directory)


def test_head_and_embedding_stored_twice_with_equal_values_are_one_matrix(tmp_path: Path) -> None:
    base = write_base("gemma", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = adapter_on(base, tmp_path / "adapter", "lm_head")
    with pytest.raises(AdapterError, match="--untie"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    merged = merge_lora(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(untie=True))
    assert_same_logits(base, adapter, merged.directory)


def grown(model: Any) -> None:
    torch.manual_seed(5)
    model.resize_token_embeddings(V + 6)


@pytest.mark.parametrize("name", ["llama", "gemma", "bart"])
def test_resized_vocabulary_comes_with_the_adapter(name: str, tmp_path: Path) -> None:
    base = write_base(name, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]), change=grown)
    merged = merge_lora(base, [(adapter, 1.0)], tmp_path / "out").directory
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == V + 6
    assert_same_logits(base, adapter, merged, change=grown)


def test_resized_embedding_without_the_head_is_refused(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]), change=grown)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CoverageError, match="one number of rows"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")


def write_tokenizer(folder: Path, size: int) -> None:
    vocabulary = {f"t{index}": index for index in range(size)}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def test_tokenizer_of_the_adapter_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    write_tokenizer(base, V)
    (base / "special_tokens_map.json").write_text("{}")
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]), change=grown)
    write_tokenizer(adapter, V + 6)
    merged = merge_lora(base, [(adapter, 1.0)], tmp_path / "out").directory
    assert (merged / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert not (merged / "special_tokens_map.json").exists()


def test_tokenizer_with_ids_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", "q_proj")
    write_tokenizer(adapter, V + 1)
    with pytest.raises(AdapterError, match=f"ids up to {V}"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gemma", "opt", "llama", "paligemma", "blip2"])
def test_pair_on_the_head_beside_trained_rows_of_the_tied_embedding(name: str, tmp_path: Path) -> None:
    """The rows are the head's too, and the pair is added to them; peft merges it otherwise than it trains it."""
    base = write_model(name, tmp_path / "base")
    rows = {"trainable_token_indices": {"embed_tokens": [5, 7, 90]}}
    adapter = adapter_on(base, tmp_path / "adapter", "lm_head", "q_proj", **rows)
    weights, model = merged(base, adapter, tmp_path / "out", MergeOptions(untie=True))
    assert model.seams and weights.compared == weights.changed
    if name in ("gemma", "opt", "llama"):
        assert_same_logits(base, adapter, tmp_path / "out")
    assert all("both of two tied places" in reason for reason in model.unchecked.values())
    assert len(model.unchecked) == (2 if name in ("gemma", "opt", "paligemma") else 0)


def test_one_row_trained_by_two_adapters_is_refused(tmp_path: Path) -> None:
    base = write_base("llama", tmp_path / "base")
    folders = [
        adapter_on(base, tmp_path / str(rows), "q_proj", trainable_token_indices={"embed_tokens": rows})
        for rows in ([3, 8], [8, 9], [4])
    ]
    with pytest.raises(AdapterError, match=r"row 8 is trained by adapter 1 of the command and by 2; .* have no sum"):
        merge_lora(base, [(folder, 1.0) for folder in folders[:2]], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = merge_lora(base, [(folders[0], 0.5), (folders[2], 1.0)], tmp_path / "out")
    assert any("3 rows of embeddings take the place" in note for note in result.record["notes"])
    out = result.directory
    before, after = (load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (base, out))
    assert (before != after).any(1).nonzero().flatten().tolist() == [3, 4, 8]
