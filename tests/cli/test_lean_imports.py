"""What commands must not import: importing torch takes longer than what `inspect` does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from weightport.checkpoints.dtypes import ELEMENT_TYPES, element_type
from weightport.families.registry import registry

OFA = {
    f"encoder.{name}": torch.zeros(2, 2)
    for name in ("embed_image_positions.weight", "image_proj.weight", "image_rel_pos_table_list.0.weight")
} | {"decoder.embed_image_positions.weight": torch.zeros(2, 2)}
LOADED = """
import sys
from weightport.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
found = {name.partition(".")[0] for name in sys.modules}
print("loaded:", *sorted(found & {"torch", "transformers", "safetensors", "tokenizers", "huggingface_hub"}))
"""


def torch_zip(path: Path) -> None:
    torch.save({"model": OFA, "args": {"size": 3}, "half": torch.zeros(2, dtype=torch.bfloat16)}, path)


def torch_legacy(path: Path) -> None:
    torch.save({"model": OFA}, path, _use_new_zipfile_serialization=False)


def safetensors(path: Path) -> None:
    save_file({"text_model.norm.weight": torch.zeros(3), "eighth": torch.zeros(3, dtype=torch.float8_e4m3fn)}, path)


def sharded(path: Path) -> None:
    path.mkdir()
    safetensors(path / "one.safetensors")
    names = {"text_model.norm.weight": "one.safetensors", "eighth": "one.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{"params/llm/layers/attn/q_einsum/w": np.zeros((2, 2), "<V2"), "step": np.arange(2)})


@pytest.mark.parametrize("write", [torch_zip, torch_legacy, safetensors, sharded, npz])
def test_inspect_imports_neither_torch_nor_transformers(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "source")
    command = [sys.executable, "-c", LOADED, "inspect", str(tmp_path / "source"), "--tensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:", done.stdout


def test_a_family_is_recognised_without_its_conversion() -> None:
    for family in registry():
        assert family.recognition is not None, family.name
        assert not family.recognises({"stranger": None})
        assert not family.conversion.recognises({"stranger": None})
    assert registry()["ofa"].recognises(OFA) and registry()["ofa"].conversion.recognises(OFA)


@pytest.mark.parametrize("element", ELEMENT_TYPES.values(), ids=str)
def test_element_types_are_those_of_torch(element) -> None:
    assert isinstance(element.dtype, torch.dtype)
    assert element_type(element.dtype) == element
