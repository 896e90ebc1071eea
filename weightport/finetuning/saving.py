"""What a run leaves: a whole model directory, or an adapter that knows its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters.base_record import record_base
from ..adapters.companions import companions
from ..checkpoints.sharded import read_json
from ..converters.output import whole_directory

TRAINING, METRICS = "training.json", "metrics.json"
_REWRITTEN = frozenset({"config.json", "generation_config.json", TRAINING, METRICS})


def save_model(
    model: Any,
    processor: Any,
    base: Path,
    out: Path,
    training: Mapping[str, Any],
    metrics: Mapping[str, float],
    weights: Path | None = None,
) -> list[str]:
    """Write the model directory `out`: what stands beside the base's weights, the trained weights in the base's dtype,
    the records. `weights`: a folder that already holds them, where several processes wrote them. Returns notes."""
    notes = []
    wanted = base_dtype(base)
    if weights is None and wanted is not None and wanted != model.dtype:
        largest = max((float(p.detach().abs().max()) for p in model.parameters() if p.numel()), default=0.0)
        if largest <= torch.finfo(wanted).max:
            model = model.to(wanted)
        else:
            notes.append(f"the weights grew beyond {wanted}, so that they stay in {model.dtype}")
    with whole_directory(out, overwrite=True) as work:
        for path in companions(base):
            if path.name not in _REWRITTEN:
                shutil.copyfile(path, work / path.name)
        processor.save_pretrained(work)
        if weights is None:
            model.save_pretrained(work)
        else:
            for path in weights.iterdir():
                if path.suffix in (".json", ".safetensors"):
                    shutil.copyfile(path, work / path.name)
        _write_records(work, training, metrics)
    return notes


def save_adapter(
    model: Any,
    processor: Any,
    base: Path,
    out: Path,
    training: Mapping[str, Any],
    metrics: Mapping[str, float],
    weights: Path | None = None,
) -> None:
    """Write the adapter folder `out`: peft's files, the processor, and which base it belongs to."""
    with whole_directory(out, overwrite=True) as work:
        if weights is None:
            model.save_pretrained(work)
        else:
            for path in weights.iterdir():
                if path.name.startswith("adapter_"):
                    shutil.copyfile(path, work / path.name)
        # peft's own card says nothing of this adapter.
        (work / "README.md").unlink(missing_ok=True)
        processor.save_pretrained(work)
        record_base(work, base)
        _write_records(work, training, metrics)


def base_dtype(base: Path) -> torch.dtype | None:
    """The floating-point type that the base's config.json names; None when it names none."""
    config = read_json(base / "config.json")
    name = (config.get("dtype") or config.get("torch_dtype")) if isinstance(config, dict) else None
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def write_json(path: Path, content: Any) -> None:
    """UTF-8 JSON for people and programs."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_records(folder: Path, training: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    write_json(folder / TRAINING, training)
    if metrics:
        write_json(folder / METRICS, metrics)
