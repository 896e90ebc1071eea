"""moondream2 checkpoints of other layouts and revisions, made from the golden ones."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))

from golden import materialize  # noqa: E402

CASES = GOLDEN / "cases/moondream2"


@dataclass(frozen=True)
class Original:
    """A golden checkpoint: its tensors and the folder with its files."""

    folder: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> Original:
        materialize(CASES / name, folder)
        return cls(folder)

    def state(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def write(
        self,
        folder: Path,
        state: dict[str, torch.Tensor] | None = None,
        config: dict[str, Any] | None = None,
        files: dict[str, str] | None = None,
        without: tuple[str, ...] = (),
    ) -> Path:
        """A folder with this state and config.json, the original's other files but those `without`, and `files`."""
        folder.mkdir()
        for each in self.folder.iterdir():
            if each.suffix in (".json", ".txt") and each.name not in without:
                (folder / each.name).write_bytes(each.read_bytes())
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        tensors = {name: each.contiguous() for name, each in (self.state() if state is None else state).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def of_late_2024(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of 2025 under the names of late 2024, whose frequencies stand the other way round."""
    renamed = {}
    for name, tensor in state.items():
        own = name.removeprefix("model.")
        for old, new in (
            ("vision.pos_emb", "vision_encoder.encoder.model.visual.pos_embed"),
            ("vision.patch_emb.", "vision_encoder.encoder.model.visual.patch_embed.linear."),
            ("vision.blocks.", "vision_encoder.encoder.model.visual.blocks."),
            ("vision.post_ln.", "vision_encoder.encoder.model.visual.norm."),
            ("vision.proj_mlp.", "vision_encoder.projection.mlp."),
            ("text.wte", "text_model.transformer.embd.wte.weight"),
            ("text.blocks.", "text_model.transformer.h."),
            ("text.post_ln.", "text_model.lm_head.ln."),
            ("text.lm_head.", "text_model.lm_head.linear."),
            ("region.coord_", "region_model.coordinate_"),
            ("region.size_", "region_model.size_"),
        ):
            if own.startswith(old):
                own = new + own.removeprefix(old)
                break
        if "visual.blocks" in own:
            own = own.replace(".ln1.", ".norm1.").replace(".ln2.", ".norm2.")
        if "transformer.h." in own:
            own = own.replace(".attn.qkv.", ".mixer.Wqkv.").replace(".attn.proj.", ".mixer.out_proj.")
        if own.endswith("_features"):
            own, tensor = f"{own}.weight", tensor.T
        renamed[own] = tensor
    return renamed
