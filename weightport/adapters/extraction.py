"""extract_lora(): a fully fine-tuned model as an adapter of its base.

Each change of a matrix is cut to its `rank` largest singular values, the best approximation of that rank there is
(Eckart and Young); what cannot be low rank (norms, biases, embeddings on request) is saved as a whole or left out, and
every tensor's share of the change that is kept is reported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..checkpoints import TensorRef
from ..converters.output import check_absent, whole_directory
from ..converters.writing import same_bits
from ..errors import CoverageError, NonFiniteError, UsageError
from .base_model import Base, open_base
from .base_record import record_base
from .changes import is_conv1d
from .lora_tensors import is_finite
from .ties import is_head_module, tied_head

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "extraction.json"
_PREFIX = "base_model.model."

_FULL_SVD = 1 << 22
"""Matrices with more elements than this get a randomised decomposition (arXiv:0909.4061) of the wanted rank."""


@dataclass(frozen=True)
class Extraction:
    """A finished extraction. `kept` is the share of the squared change that the adapter holds, by tensor."""

    directory: Path
    kept: Mapping[str, float]
    whole: tuple[str, ...]
    share: float


def extract_lora(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    rank: int,
    *,
    overwrite: bool = False,
    announce: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Extraction:
    """Write the difference of the model directories `tuned` and `base` to the folder `out` as a LoRA adapter.

    Linear and convolutional weights get pairs of `rank` (less where the weight is smaller); changed biases, norms and
    embeddings are saved as whole tensors (modules_to_save). Raises CoverageError when the two are not of one
    architecture, UsageError when nothing differs, NonFiniteError, OutputError.
    """
    tuned, base, out = Path(tuned), Path(base), Path(out)
    check_absent(out, overwrite=overwrite)
    if rank < 1:
        raise UsageError(f"The rank is {rank}; expected at least 1.")
    before, after = open_base(base), open_base(tuned)
    names = _require_same_model(before, after)
    announce(sum(before.checkpoint[name].nbytes for name in names))
    tensors: dict[str, torch.Tensor] = {}
    kept: dict[str, float] = {}
    ranks: dict[str, int] = {}
    saved: list[str] = []
    change = lost = 0.0
    for name in names:
        old, new = before.checkpoint[name], after.checkpoint[name]
        advance(old.nbytes)
        if same_bits(old.read(), new.read()):
            continue
        if not is_finite(new.read()) or not is_finite(old.read()):
            raise NonFiniteError(f"{name} holds NaN or infinity in {tuned} or {base}.")
        if _is_factorable(name, new, before):
            module = name.removesuffix(".weight")
            a, b, total, left = _factors(new.read(), old.read(), rank, flipped=is_conv1d(module, before.model_type))
            tensors[f"{_PREFIX}{module}.lora_A.weight"], tensors[f"{_PREFIX}{module}.lora_B.weight"] = a, b
            ranks[module] = a.shape[0]
            change, lost = change + total, lost + left
            kept[name] = 1 - left / total if total else 1.0
        else:
            saved.append(name)
    if not tensors and not saved:
        raise UsageError(f"{tuned} and {base} hold the same weights: there is nothing to extract.")
    share = 1 - lost / change if change else 1.0
    modules = _save_whole(saved, ranks, tensors, after)
    modules += _save_tied(saved, tensors, after)
    config = _config(before, base, rank, ranks, modules)
    with whole_directory(out, overwrite=overwrite) as folder:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        record = {"rank": rank, "share": share, "kept": kept, "whole": saved}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        record_base(folder, base)
    return Extraction(out, kept, tuple(saved), share)


def _require_same_model(base: Base, tuned: Base) -> list[str]:
    """The tensors of both, floating-point ones. Raises CoverageError listing what only one has, or has otherwise."""
    old, new = base.checkpoint.tensors, tuned.checkpoint.tensors
    different = [
        *(f"{name}: only in {base.path}" for name in old if name not in new),
        *(f"{name}: only in {tuned.path}" for name in new if name not in old),
        *(
            f"{name}: {list(old[name].shape)} and {list(new[name].shape)}"
            for name in old
            if name in new and old[name].shape != new[name].shape
        ),
    ]
    if different:
        shown = "\n      ".join(different[:10]) + (
            f"\n      … and {len(different) - 10} more" if different[10:] else ""
        )
        raise CoverageError(f"{tuned.path} is no fine-tuning of {base.path}:\n      {shown}")
    return [name for name, ref in old.items() if ref.dtype.is_floating_point]


def _is_factorable(name: str, ref: TensorRef, base: Base) -> bool:
    """Whether a change of this tensor becomes a pair: a linear or plain convolutional layer's weight, not one that the
    model looks rows up in."""
    if not name.endswith(".weight") or len(ref.shape) not in (2, 4) or min(ref.shape[:2]) < 2:
        return False
    module = name.removesuffix(".weight")
    if re.fullmatch(r"(.*[._])?(\w*embed\w*|shared|wte|wpe|relative_attention_bias)", module):
        return False
    return not (is_head_module(module) and tied_head(base.checkpoint.tensors, base.config) is not None)


def _factors(
    new: torch.Tensor, old: torch.Tensor, rank: int, *, flipped: bool
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """(A [r, in, …], B [out, r, …], squared norm of the change, squared norm of what the rank leaves out), in
    float32."""
    change = new.to(torch.float32) - old.to(torch.float32)
    matrix = change.T if flipped else change.flatten(1)
    rank = min(rank, *matrix.shape)
    if matrix.numel() <= _FULL_SVD:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        v = v[:rank]
    else:
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
        v = v.T[:rank]
    root = s[:rank].sqrt()
    total = float(torch.linalg.vector_norm(matrix)) ** 2
    held = float(s[:rank].double().square().sum())
    a, b = (root.unsqueeze(1) * v).contiguous(), (u[:, :rank] * root).contiguous()
    if len(new.shape) > 2:
        a, b = a.view(rank, *new.shape[1:]), b.view(*b.shape, *[1] * (len(new.shape) - 2))
    return a, b, total, max(total - held, 0.0)


def _save_whole(
    changed: list[str], ranks: Mapping[str, int], tensors: dict[str, torch.Tensor], tuned: Base
) -> list[str]:
    """Add the tensors that are saved as they are, under peft's keys; returns the modules that are saved as a whole.

    peft loads such a module with all its tensors, so unchanged ones come along. A bias beside a pair is saved alone.
    """
    modules = {name.rpartition(".")[0] for name in changed}
    names = tuple(tuned.checkpoint)
    for module in sorted(modules):
        if any(name.startswith(f"{module}.") and name.rpartition(".")[0] != module for name in names):
            raise CoverageError(
                f"{', '.join(name for name in changed if name.rpartition('.')[0] == module)} changed, and is a "
                "parameter of a module that holds other modules: an adapter has no place for it. "
                "Ship the tuned model itself."
            )
        for name in names:
            if name.rpartition(".")[0] == module and name not in changed and module not in ranks:
                tensors[_PREFIX + name] = tuned.checkpoint[name].read().clone()
    for name in changed:
        module, _, leaf = name.rpartition(".")
        key = f"{module}.base_layer.{leaf}" if module in ranks else name
        tensors[_PREFIX + key] = tuned.checkpoint[name].read().clone()
    return sorted(modules)


def _save_tied(changed: list[str], tensors: dict[str, torch.Tensor], tuned: Base) -> list[str]:
    """Add a changed token embedding under every name that it has in the running model, where peft wraps each place."""
    tied = tied_head(tuned.checkpoint.tensors, tuned.config)
    if tied is None or tied.embedding not in changed:
        return []
    places = [tied.head, *tied.places]
    for name in places:
        tensors[_PREFIX + name] = tuned.checkpoint[tied.embedding].read().clone()
    return [name.removesuffix(".weight") for name in places]


def _config(base: Base, path: Path, rank: int, ranks: Mapping[str, int], saved: list[str]) -> dict[str, Any]:
    lowered = {re.escape(name): value for name, value in ranks.items() if value != rank}
    with_pair = [module for module in saved if module in ranks]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(path),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(is_conv1d(name, base.model_type) for name in ranks),
        # Biases of layers that also have a pair are trained beside it; everything else is a module of its own.
        "bias": "lora_only" if with_pair else "none",
        "target_modules": sorted(ranks),
        "rank_pattern": lowered,
        "alpha_pattern": dict(lowered),
        "modules_to_save": [module for module in saved if module not in ranks] or None,
        "inference_mode": True,
    }


def largest_loss(extraction: Extraction) -> tuple[str, float] | None:
    """The tensor of which the rank keeps least, and the share that it keeps."""
    found = min(extraction.kept.items(), key=lambda item: item[1], default=None)
    return found if found is not None and math.isfinite(found[1]) else None
