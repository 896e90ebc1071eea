"""Florence-2 checkpoints of every form, made from the golden cases by what each form is known for."""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = GOLDEN / "cases" / "florence2"
sys.path.insert(0, str(GOLDEN))

import golden  # noqa: E402 - found beside the cases

SHARED, HEAD = "language_model.model.shared.weight", "language_model.lm_head.weight"
ENCODER, DECODER = (f"language_model.model.{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
BIAS, TEMPORAL = "language_model.final_logits_bias", "visual_temporal_embed.pos_idx_to_embed"
NOT_COMPANIONS = (".bin", ".pt", ".safetensors")


class Original:
    """One golden case's original folder, to be written again in another form."""

    def __init__(self, name: str, folder: Path) -> None:
        self.file = golden.materialize(CASES / name, folder)
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())

    def state(self) -> dict[str, torch.Tensor]:
        """The state dict under the original's names; each call gives its own."""
        if self.file.suffix == ".safetensors":
            return load_file(self.file)
        document = torch.load(self.file, weights_only=True)
        found = document.get("model_state_dict", document)
        return {name.removeprefix("module._orig_mod."): tensor for name, tensor in found.items()}

    def write(self, folder: Path, weights: Any, config: Any = None, *, name: str = "pytorch_model.bin") -> Path:
        """The case's companions with other weights (a state dict or what torch.save takes) and configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix not in NOT_COMPANIONS:
                shutil.copy(path, folder / path.name)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if name.endswith(".safetensors"):
            save_file({key: tensor.contiguous().clone() for key, tensor in weights.items()}, folder / name)
        else:
            torch.save(weights, folder / name)
        return folder


def originals(factory: Any) -> Any:
    """name → Original, rebuilt once."""

    @cache
    def get(name: str) -> Original:
        return Original(name, factory.mktemp(name))

    return get
