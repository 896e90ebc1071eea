"""The check of a merge on models without a processor beside them, and where it cannot be run at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from click.testing import CliRunner, Result
from peft import LoraConfig
from tiny_models import write_adapter, write_base

from weightport import cli
from weightport.adapters.verification import verify
from weightport.converters import lora_patterns


def merged(base: Path, adapter: Path, *options: str) -> Result:
    out = base.parent / "out"
    return CliRunner().invoke(cli.port_merge_lora, [str(base), str(adapter), str(out), *options])


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    base = write_base("llama", tmp_path / "base")
    return base, write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def change(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("blip2", {"pixel_values", "input_ids", "attention_mask"}), ("clip", {"pixel_values", "input_ids"})],
)
def test_model_of_images_without_a_processor_is_checked_with_an_image(
    name: str, inputs: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(name, tmp_path / "base", torch.float32)
    adapter = write_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    done = merged(base, adapter, "--verify")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert set(record["verification"]["inputs"]) == inputs


def test_model_that_takes_none_of_the_inputs_is_merged_and_named_as_not_checked(
    llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise TypeError("forward() missing 1 required argument: 'audio'")

    monkeypatch.setattr(verify, "_outputs", refuse)
    done = merged(*llama, "--verify")
    assert done.exit_code == 1 and "does not run on sample inputs (TypeError: forward() missing" in done.output
    assert not (llama[0].parent / "out").exists()
    done = merged(*llama)
    assert done.exit_code == 0, done.output
    assert "verify   not run: LlamaForCausalLM does not run on sample inputs" in done.output
    assert "verification" not in json.loads((llama[0].parent / "out" / "merge.json").read_text())


@pytest.mark.parametrize("fields", [{"lora_dropout": []}, {"runtime_config": 3}, {"loftq_config": "x"}])
def test_settings_that_only_peft_reads_are_one_error_and_no_defect(
    fields: dict[str, Any], llama: tuple[Path, Path]
) -> None:
    change(llama[1], **fields)
    done = merged(*llama, "--verify")
    assert "defect" not in done.output and "Traceback" not in done.output
    assert done.exit_code == 0 or str(llama[1]) in done.output


def test_pattern_that_is_slow_on_module_names_alone_does_not_hang_peft(
    llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's own names and the base's are matched at once; `act_fn` holds no weight and is peft's alone."""
    monkeypatch.setattr(lora_patterns, "SECONDS", 1)
    change(llama[1], target_modules=r".*(q|v)_proj|model.*mlp\.act_(.?|.?){40}!")
    done = merged(*llama, "--no-verify", "--overwrite")
    assert done.exit_code == 0, done.output
    done = merged(*llama, "--verify", "--overwrite")
    assert done.exit_code == 1 and "which is the limit" in done.output
