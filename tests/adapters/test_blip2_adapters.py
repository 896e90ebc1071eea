"""Adapters of BLIP-2: on transformers' names, which are those of every version, and on LAVIS's own modules."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from weightport import cli
from weightport.api import merge_lora, port_adapter
from weightport.errors import AdapterError

sys.path.append(str(Path(__file__).parents[1] / "converters"))

from blip2_checkpoints import Lavis

CASES = {"opt-tiny": (["q_proj", "v_proj"], "opt_model."), "t5-coco-tiny": (["q", "v"], "t5_model.")}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, adapter on it, the same adapter under LAVIS's names)."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    modules, lavis = CASES[name]
    Lavis(name, folder / "original").convert(folder / "base")
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False)
    get_peft_model(AutoModelForImageTextToText.from_pretrained(folder / "base"), settings).save_pretrained(
        folder / "adapter"
    )
    shutil.copytree(folder / "adapter", folder / "lavis")
    file = folder / "lavis" / "adapter_model.safetensors"
    renamed = {key.replace("language_model.", lavis): value for key, value in load_file(file).items()}
    assert all(lavis in key for key in renamed)
    save_file(renamed, file)
    return folder / "base", folder / "adapter", folder / "lavis"


def merged(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    merge_lora(base, [(adapter, 1.0)], out)
    return load_file(out / "model.safetensors")


def test_an_adapter_on_lavis_modules_is_that_on_the_native_ones(made, tmp_path: Path) -> None:
    base, adapter, lavis = made
    native, before = merged(base, adapter, tmp_path / "native"), load_file(base / "model.safetensors")
    ported = port_adapter(lavis, tmp_path / "ported", base)
    assert len(ported.modules) == len(load_file(adapter / "adapter_model.safetensors")) // 2
    for source in (lavis, tmp_path / "ported"):
        found = merged(base, source, tmp_path / f"of {source.name}")
        assert found.keys() == native.keys() and all(torch.equal(found[name], native[name]) for name in native)
    assert sum(not torch.equal(native[name], before[name]) for name in native) == len(ported.modules)


def test_a_module_that_lavis_does_not_have_is_named(made, tmp_path: Path) -> None:
    base, _, lavis = made
    wrong = Path(shutil.copytree(lavis, tmp_path / "wrong"))
    file = wrong / "adapter_model.safetensors"
    save_file({key.replace(".0.", ".7."): value for key, value in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="which the base does not have: another base"):
        port_adapter(wrong, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_an_adapter_merges_into_a_released_directory_of_an_earlier_transformers_and_is_released(
    made, tmp_path: Path
) -> None:
    base, adapter, _ = made
    earlier = Path(shutil.copytree(base, tmp_path / "earlier"))
    (earlier / "conversion.json").unlink()
    config = json.loads((earlier / "config.json").read_text())
    # As transformers 4.27 wrote it: no token for the image, whose places the model put before the text by itself.
    for name in ("image_token_index", "dtype", "image_text_hidden_size"):
        config.pop(name, None)
    config |= {"torch_dtype": "float32", "transformers_version": None, "use_decoder_only_language_model": True}
    (earlier / "config.json").write_text(json.dumps(config))
    found, native = merged(earlier, adapter, tmp_path / "out"), merged(base, adapter, tmp_path / "native")
    assert found.keys() == native.keys() and all(torch.equal(found[name], native[name]) for name in native)
    command = [str(tmp_path / "out"), "--repo", "somebody/captions", "--dry-run", "--licence", "other"]
    result = CliRunner().invoke(cli.port_release, command)
    assert result.exit_code == 0, result.output
    assert "OPT-175B" in result.output and "Flan-T5's Apache 2.0" in result.output
