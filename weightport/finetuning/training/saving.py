"""What a run leaves: a whole model directory, or an adapter that knows its base."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weightport.adapters.base.base_record import Quantization, record_base
from weightport.adapters.merging.companions import changed_dtype, companions
from weightport.checkpoints import open_checkpoint
from weightport.checkpoints.formats.sharded import read_json
from weightport.converters.export import changed_by_merges
from weightport.converters.name_spaces import name_space
from weightport.converters.record import note_changes, read_record
from weightport.writing import whole_directory

TRAINING, METRICS, CONFIG = "training.json", "metrics.json", "config.json"
_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "chat_template.jinja")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Result:
    """What is saved. `processor` is None when it is the base's own. `weights`: a folder that holds the trained weights
    already, where several processes had to write them. `config`: fields changed, by dotted name. `trained`: whether
    the run trained the parameter that the model calls so."""

    model: Any
    processor: Any | None
    base: Path
    config: Mapping[str, Any]
    training: Mapping[str, Any]
    metrics: Mapping[str, float]
    weights: Path | None = None
    trained: Callable[[str], bool] = lambda name: True


def save_model(result: Result, out: Path) -> None:
    """Write the model directory `out`: the trained weights, and all else as the base has it, but for what the recipe
    changed."""
    model = result.model
    with whole_directory(out, overwrite=True) as work:
        dtype = model.dtype
        if result.weights is None:
            model.save_pretrained(work)
        else:
            _copy(result.weights, work, lambda name: name.endswith((".safetensors", ".index.json")))
            dtype = _files_in_base_dtype(work, result.base, dtype)
        # Training leaves its own marks in a configuration (use_cache off, label smoothing): the base's is the truth.
        for path in companions(result.base):
            if path.name not in (TRAINING, METRICS):
                shutil.copyfile(path, work / path.name)
        write_json(work / CONFIG, _config(result, dtype), indent=2)
        _write_processor(result, work)
        _write_records(result, work)
        _note_trained(result, work)


def save_adapter(result: Result, out: Path) -> None:
    """Write the adapter folder `out`: peft's files, tokenizer and processor, and which base it belongs to."""
    with whole_directory(out, overwrite=True) as work:
        if result.weights is None:
            result.model.save_pretrained(work)
        else:
            _copy(result.weights, work, lambda name: name.startswith("adapter_"))
        # peft's own card says nothing of this adapter.
        (work / "README.md").unlink(missing_ok=True)
        _copy(result.base, work, lambda name: name in _PROCESSOR or name in _TOKENIZER)
        _write_processor(result, work)
        record_base(work, result.base, _quantization(result.model))
        _write_records(result, work)


def in_base_dtype(model: Any, base: Path) -> tuple[Any, list[str]]:
    """(the model as it is saved, in the base's dtype; notes)."""
    wanted = base_dtype(base)
    if wanted is None or wanted == model.dtype:
        return model, []
    if largest(model) <= torch.finfo(wanted).max:
        return model.to(wanted), []
    return model, [f"the weights grew beyond {wanted}, so that they stay in {model.dtype}"]


def _files_in_base_dtype(folder: Path, base: Path, dtype: torch.dtype) -> torch.dtype:
    """Write the safetensors files of `folder`, whose model is in `dtype`, anew in the base's; the dtype that they have
    then: their own where weights have grown beyond the base's. One file is in memory at a time."""
    wanted = base_dtype(base)
    files = sorted(folder.glob("*.safetensors"))
    if wanted is None or wanted == dtype or any(_largest_in(file) > torch.finfo(wanted).max for file in files):
        return dtype
    for file in files:
        tensors = {name: each.to(wanted) if each.dtype == dtype else each for name, each in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return wanted


def _largest_in(file: Path) -> float:
    with safe_open(file, framework="pt") as tensors:
        return max((_magnitude(tensors.get_tensor(name)) for name in tensors.keys()), default=0.0)  # noqa: SIM118


def base_dtype(base: Path) -> torch.dtype | None:
    """The floating-point type that the base's config.json names; None when it names none."""
    config = read_json(base / CONFIG)
    name = (config.get("dtype") or config.get("torch_dtype")) if isinstance(config, dict) else None
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def largest(model: torch.nn.Module) -> float:
    """The largest magnitude among the parameters."""
    return max((_magnitude(each.detach()) for each in model.parameters()), default=0.0)


def _magnitude(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """UTF-8 JSON for people and programs."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def _quantization(model: Any) -> Quantization | None:
    """Which layers are bitsandbytes' in 4 bits, by the base's names; the kind is that of `loading.four_bits`."""
    layers = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer")
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    return Quantization("nf4-double", frozenset(layers)) if layers else None


def _config(result: Result, dtype: torch.dtype) -> dict[str, Any]:
    config = copy.deepcopy(read_json(result.base / CONFIG))
    for name, value in result.config.items():
        *outer, last = name.split(".")
        inner = config
        for each in outer:
            inner = inner.setdefault(each, {})
        inner[last] = value
    if base_dtype(result.base) != dtype:
        config |= changed_dtype(config, str(dtype).removeprefix("torch."))
    return dict(config)


def _write_processor(result: Result, work: Path) -> None:
    """The processor's own files where the recipe changed it; the tokenizer stays the base's, byte for byte."""
    if result.processor is None:
        return
    folder = work / ".processor"
    result.processor.save_pretrained(folder)
    _copy(folder, work, lambda name: name in _PROCESSOR)
    shutil.rmtree(folder)


def _note_trained(result: Result, work: Path) -> None:
    """Note in the record of a model of several sources what is no longer as they gave it."""
    record = read_record(work)
    if record is None or len(record["sources"]) < 2:
        return
    shapes = {name: ref.shape for name, ref in open_checkpoint(work).items()}
    held = name_space(work, shapes).held()
    trained = {stored for stored, names in held.items() if any(map(result.trained, names))}
    note_changes(work, trained | changed_by_merges(result.base))


def _copy(source: Path, target: Path, wanted: Any) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and wanted(path.name):
            shutil.copyfile(path, target / path.name)


def _write_records(result: Result, work: Path) -> None:
    write_json(work / TRAINING, dict(result.training))
    if result.metrics:
        write_json(work / METRICS, dict(result.metrics))
