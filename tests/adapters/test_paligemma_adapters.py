"""Adapters of PaliGemma on disk: those of transformers 4 and of today are one adapter, carried and merged."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from weightport import cli
from weightport.api import convert, merge_lora, port_adapter
from weightport.errors import AdapterError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The guide's names, which match the vision tower's q, k and v too."""

ERAS: dict[str, Callable[[str], str]] = {
    "today": lambda name: name,
    "until 4.51": lambda name: name.replace("model.language_model.", "language_model.model.").replace(
        "model.vision_tower.", "vision_tower.vision_model."
    ),
    "from 4.52": lambda name: name.replace("model.vision_tower.", "model.vision_tower.vision_model."),
}
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted golden case."""
    sys.path.insert(0, str(GOLDEN))
    from golden_case import Case

    folder = tmp_path_factory.mktemp("paligemma")
    (folder / "original").mkdir()
    case = Case(GOLDEN / "cases" / "paligemma2" / "tiny-gemma2", "tiny-gemma2")
    convert(case.materialize(folder / "original"), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter under the names of each era."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned = get_peft_model(load(base), LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(folder / "today")
    today = load_file(folder / "today" / "adapter_model.safetensors")
    for era, earlier in ERAS.items():
        if era != "today":
            shutil.copytree(folder / "today", folder / era)
            renamed = {PREFIX + earlier(name.removeprefix(PREFIX)): tensor for name, tensor in today.items()}
            assert set(renamed) != set(today)
            save_file(renamed, folder / era / "adapter_model.safetensors")
    return {era: folder / era for era in ERAS}


def load(directory: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(directory).eval()


def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    text = torch.tensor([[2, 428, 284, 9, 284, 286]])
    ids = torch.cat([torch.full((1, 9), model.config.image_token_index), text], dim=1)
    types = torch.cat([torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 2, dtype=torch.long)], dim=1)
    with torch.no_grad():
        return model(
            input_ids=ids, token_type_ids=types, pixel_values=torch.randn(1, 3, 42, 42, generator=generator)
        ).logits


@pytest.mark.parametrize("era", ERAS)
def test_adapter_of_any_era_is_carried_to_the_names_that_peft_loads_today(
    era: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        cli.main, ["port-adapter", str(adapters[era]), str(tmp_path / "out"), "--base", str(base), "--json"]
    )
    assert result.exit_code == 0, result.output
    modules = json.loads(result.stdout)["modules"]
    assert len(modules) == 4 * 7 + 3 * 3, "the tower's q, k and v are among the guide's names"
    with warnings.catch_warnings():
        # peft says by a warning alone that it loaded nothing.
        warnings.simplefilter("error", UserWarning)
        found = logits(PeftModel.from_pretrained(load(base), str(tmp_path / "out")))
    expected = logits(PeftModel.from_pretrained(load(base), str(adapters["today"])))
    assert torch.equal(found, expected)
    assert (found - logits(load(base))).abs().max() > 1e-2


@pytest.mark.parametrize("era", ERAS)
def test_adapter_of_any_era_is_the_same_merge(era: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    expected = merge_lora(base, [(adapters["today"], 1.0)], tmp_path / "expected").directory / "model.safetensors"
    found = merge_lora(base, [(adapters[era], 1.0)], tmp_path / "found").directory / "model.safetensors"
    assert found.read_bytes() == expected.read_bytes()
    merged, tuned = load(tmp_path / "found"), PeftModel.from_pretrained(load(base), str(adapters["today"]))
    torch.testing.assert_close(logits(merged), logits(tuned), rtol=0, atol=2e-5)


def test_adapter_of_another_base_is_not_carried(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def spoiled(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
        folder = Path(shutil.copytree(adapters["until 4.51"], tmp_path / name))
        save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
        return folder

    deeper = spoiled("deeper", lambda tensors: {k.replace("layers.3.", "layers.7."): v for k, v in tensors.items()})
    with pytest.raises(AdapterError, match=r"language_model\.model\.layers\.7\.\S+: is no module of the base"):
        port_adapter(deeper, tmp_path / "out", base)
    wider = spoiled(
        "wider", lambda tensors: {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in tensors.items()}
    )
    with pytest.raises(AdapterError, match=r"the pair gives \[\d+, 80\], the base's weight is \[\d+, 40\]"):
        port_adapter(wider, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_trained_norm_is_carried_with_the_pairs(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapters["until 4.51"], tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.language_model.model.norm.weight"] = torch.full((40,), 0.25)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": ["norm"]}))
    ported = port_adapter(folder, tmp_path / "out", base)
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(kept["base_model.model.model.language_model.norm.weight"], torch.full((40,), 0.25))
    assert ported.saved == {"language_model.model.norm": ("model.language_model.norm",)}
