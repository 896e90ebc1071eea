"""What a report shows beside figures: where the model came from, what it looked at, and what both sides wrote."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel

from weightport.converters.record import read_record, versions
from weightport.panics import panics_as_errors
from weightport.parity.family import Family
from weightport.parity.reference import Reference

IMAGES, SIDE = 12, 256
"""At most so many images, and pixels along their longer side: a report is sent around."""

RECORDED = ("title", "family", "layout", "dtype", "parameters", "notes", "versions")


@dataclass(frozen=True)
class Hypotheses:
    """The best hypothesis of each sample of a run, of both sides: as text where the directory has a tokenizer, else as
    ids."""

    run: str
    original: tuple[str, ...]
    native: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """`provenance` and `dropped` are conversion.json's, empty without one; `environment` is this machine's.

    `images` are data URIs of PNG files, by the run they belong to, scaled to the full range: what a model takes is
    normalised.
    """

    provenance: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[Mapping[str, Any], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    images: tuple[tuple[str, str], ...] = ()
    texts: tuple[Hypotheses, ...] = ()


def evidence_of(directory: Path, reference: Reference, family: Family, model: PreTrainedModel) -> Evidence:
    """Read from the directory and the reference; `model` says on what device it ran."""
    record = read_record(directory) or {}
    provenance = {name: record[name] for name in RECORDED if record.get(name)}
    provenance["sources"] = {
        name: {key: value for key, value in source.items() if key != "tensors"}
        for name, source in record.get("sources", {}).items()
    }
    environment = {**versions(), "platform": platform.platform(), "device": device_name(model.device)}
    return Evidence(provenance, tuple(record.get("dropped", ())), environment, images_of(reference, family))


def device_name(device: torch.device) -> str:
    """`cpu (2 threads)`, or the accelerator's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def images_of(reference: Reference, family: Family) -> tuple[tuple[str, str], ...]:
    """The images of the reference's runs, each once, under the first run that has it."""
    names = {argument.original for argument in family.arguments if argument.content == "images"}
    shown: dict[str, str] = {}
    for run in reference.runs:
        for name, ref in run.inputs.items():
            if name not in names or len(shown) >= IMAGES:
                continue
            for image in ref.read().flatten(0, -4):
                shown.setdefault(png(image), run.name)
    return tuple((run, uri) for uri, run in list(shown.items())[:IMAGES])


def png(image: torch.Tensor) -> str:
    """An image [3, height, width] as a data URI, its values spread over 0 to 255."""
    values = image.double().nan_to_num()
    low, high = float(values.min()), float(values.max())
    if image.dtype != torch.uint8:
        values = (values - low) / (high - low or 1.0) * 255
    picture = Image.fromarray(values.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def hypotheses(run: str, original: torch.Tensor, native: torch.Tensor, tokenizer: Any | None) -> Hypotheses:
    """Both sides' ids [batch, returned, length], best first, as text."""
    return Hypotheses(run, _texts(original, tokenizer), _texts(native, tokenizer))


def _texts(ids: torch.Tensor, tokenizer: Any | None) -> tuple[str, ...]:
    best = [row[0].tolist() for row in ids.cpu()]
    if tokenizer is not None:
        best = [[each for each in row if each != tokenizer.pad_token_id] for row in best]
    if tokenizer is None:
        return tuple(" ".join(map(str, row)) for row in best)
    return tuple(tokenizer.decode(row, skip_special_tokens=False) for row in best)


def tokenizer_of(directory: Path) -> Any | None:
    """The directory's tokenizer; None when it has none that loads without its code."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        with panics_as_errors():
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
