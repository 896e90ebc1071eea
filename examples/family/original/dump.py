"""Writes the golden case in cases/tiny: a checkpoint with weights that are a formula of their names, and what the
original computes on it in float32 and float64. `python original/dump.py` needs torch and safetensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tellit import Tellit

SIZES = {
    "side": 24, "patch": 8, "image_width": 16, "image_layers": 2, "image_heads": 2, "vocabulary": 40, "positions": 24,
    "width": 24, "layers": 3, "heads": 4,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", "red", "blue", "disk", "box", "on", "the",
         "of", "two", ".", ","]  # fmt: skip


def formula(name: str, shape: torch.Size) -> torch.Tensor:
    """Normal values that depend on the name alone; scales of norms about 1."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % 2**62
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    if "norm" in name and name.endswith("weight"):
        values += 1
    if name.endswith("_norms"):
        values[:, 0] += 1
    return values


def main() -> None:
    assert len(WORDS) == SIZES["vocabulary"]
    folder = Path(__file__).resolve().parents[1] / "cases" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    model = Tellit(SIZES)
    model.load_state_dict({name: formula(name, tensor.shape) for name, tensor in model.state_dict().items()})
    torch.save({"sizes": SIZES, "words": WORDS, "model": model.state_dict()}, folder / "tellit.pt")

    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixels": torch.randn(2, 3, SIZES["side"], SIZES["side"], generator=generator),
        "ids": torch.randint(4, SIZES["vocabulary"], (2, 7), generator=generator),
    }
    tensors = {f"{run}/in/{name}": value for run in ("forward", "train") for name, value in inputs.items()}
    for suffix, dtype in (("", torch.float32), ("@float64", torch.float64)):
        model = model.to(dtype)
        model.zero_grad()
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        found = model(**given)
        found["loss"].backward()
        for seam in ("vision", "projector", "decoder", "logits"):
            tensors[f"forward/out/{seam}{suffix}"] = found[seam].detach()
        tensors[f"train/out/loss{suffix}"] = found["loss"].detach()
        for name, parameter in model.named_parameters():
            tensors[f"train/out/grad_norm.{name}{suffix}"] = parameter.grad.norm()
    runs = {"forward": {"kind": "forward", "options": {}}, "train": {"kind": "train", "options": {}}}
    source = {"project": "Tellit", "commit": "1", "torch": torch.__version__.partition("+")[0]}
    header = {"format": 1, "family": "tellit", "source": source, "runs": runs}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "reference.safetensors", {"weightport.reference": json.dumps(header)})


if __name__ == "__main__":
    main()
