"""The files beside the weights: nothing from outside the folders is copied, and no local path is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig
from tiny_models import write_adapter, write_base

from weightport.adapters.merging.companions import require_tokenizer_fits
from weightport.api import merge_lora
from weightport.errors import AdapterError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base("llama", tmp_path / "base", torch.float16)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "training.json"])
def test_link_in_an_adapter_is_not_followed_out_of_it(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text('{"secret": 1}')
    (adapter / "tokenizer_config.json").write_text("{}")
    (adapter / name).symlink_to(secret)
    with pytest.raises(AdapterError, match=rf"{name} is a link out of its folder, to .*id_rsa: it is not copied"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_link_in_a_base_is_not_followed_out_of_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    (base / "vocab.txt").symlink_to(Path("..", "id_rsa"))
    with pytest.raises(AdapterError, match="is a link out of its folder"):
        merge_lora(base, [(adapter, 1.0)], tmp_path / "out")


def test_adapter_in_the_hubs_cache_is_made_of_links_and_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "tokenizer_config.json").write_text("{}")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for place, path in enumerate(sorted(adapter.iterdir())):
        path.rename(blobs / str(place))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(place)))
    merge_lora(base, [(snapshot, 1.0)], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer_config.json").is_symlink()


@pytest.mark.parametrize(
    ("named", "recorded"),
    [("/home/me/private/base", "base"), ("org/model", "org/model"), ("~/models/base", "base"), (None, None)],
)
def test_record_of_a_merge_holds_no_local_path(
    named: str | None, recorded: str | None, base: Path, adapter: Path, tmp_path: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    record = merge_lora(base, [(adapter, 1.0)], tmp_path / "out").record
    assert record["adapters"][0]["base_model"] == recorded
    assert str(tmp_path) not in (tmp_path / "out" / "merge.json").read_text()


@pytest.mark.parametrize(
    "content",
    [[], 1, {"model": []}, {"model": {"vocab": {"a": "b"}}}, {"added_tokens": [1]}, {"added_tokens": {"id": "x"}}],
)
def test_tokenizer_that_is_laid_out_otherwise_is_no_defect(content: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    require_tokenizer_fits({"tokenizer.json": tmp_path / "tokenizer.json"}, 10, tmp_path)
