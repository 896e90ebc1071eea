"""Florence-2's golden cases in the reference format: what their tensors and figures are called, and what they hold.

A case's tensors are `in.<argument>`, `<seam>[.f64]`, `alone<i>.<seam>` (row i without padding) and
`gen.<name>.<value>`; losses and gradient norms stand in case.json. Pixels are a formula.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import golden
import torch
from golden_case import Case
from reference_builder import Builder

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.families.florence2.layouts import locate
from weightport.families.florence2.parity import complete
from weightport.families.florence2.parity import exact_loss as exact_loss
from weightport.families.florence2.rules import florence2_rules

FAMILY = "florence2"
KINDS = ("forward", "generate", "train")
PAD, START = 1, 2

SEAMS = {"image_features": "projector", "encoder_out": "encoder", "logits": "logits", "logits_argmax": "logits.argmax"}
STAGE = re.compile(r"vision\.stage(\d+)")
HIDDEN = re.compile(r"(encoder|decoder)\.h(\d+)")
NAME = re.compile(r"(?:alone(?P<row>\d+)\.)?(?P<value>.+?)(?P<f64>\.f64)?")
GENERATED = re.compile(r"gen\.(?P<run>.+)\.(?P<what>ids|scores)")
SHAPE = re.compile(r"\[([\d, ]+)\]")
STEPS = re.compile(r"(?:sliced )?\[((?::{1,2}\d*,? ?)+)\]")


def settings(case: Case) -> dict[str, Any]:
    """What a conversion of the case has to be told: nothing, files of this family tell everything."""
    return {}


def has_ema(case: Case) -> bool:
    """No case of this family has averaged weights."""
    return False


def is_generated(name: str) -> bool:
    """Whether the tensor of this name is of a generation run."""
    found = NAME.fullmatch(name)
    return found is not None and GENERATED.fullmatch(found["value"]) is not None


def model_parts(checkpoint: Checkpoint) -> dict[str, dict[str, TensorRef]]:
    """The model's tensors by the original's names, whatever stands before them in the file."""
    return {"model": dict(locate(checkpoint, ema=False).tensors)}


def write_case(case: Case, path: Path, *, ema: bool = False, kinds: Collection[str] = KINDS) -> Path:
    """The case's reference as a file of the product's own format, of runs of `kinds`."""
    builder = Builder(case)
    unknown = [name for name in case.tensors if not name.startswith("in.") and not _place(builder, name)]
    if unknown:
        warnings.warn(f"{case.name}: no table says what these are: {', '.join(unknown)}", stacklevel=2)
    if "adapter" not in case.spec:
        _training(builder)
    return builder.write(path, kinds)


def inputs(case: Case, row: int | None = None) -> dict[str, torch.Tensor]:
    """The padded batch's prompt, decoder ids and pixels, or those of one row without its padding."""
    batch = {name: case.tensors[f"in.{name}"] for name in ("input_ids", "decoder_input_ids")}
    batch["pixel_values"] = pixels(case)
    if row is None:
        return batch
    prompt = int(case.tensors["in.attention_mask"][row].sum())
    return {
        "input_ids": batch["input_ids"][row : row + 1, :prompt],
        "decoder_input_ids": batch["decoder_input_ids"][row : row + 1, : _length(case, row)],
        "pixel_values": batch["pixel_values"][row : row + 1],
    }


def pixels(case: Case) -> torch.Tensor:
    """`in.pixel_values`, by the formula that every case of the family names."""
    shape = _pixel_shape(case)
    return 4 * (torch.from_numpy(golden.fill("input.pixel_values", (prod(shape),))) - 1).reshape(shape)


def _pixel_shape(case: Case) -> tuple[int, ...]:
    if "in.pixel_values" in case.tensors:
        return tuple(case.tensors["in.pixel_values"].shape)
    if stated := case.spec.get("pixel_values"):
        return tuple(stated["shape"])
    text = case.texts.get("in.pixel_values") or case.spec["notes"]["in.pixel_values"]
    return tuple(int(side) for side in SHAPE.findall(text)[-1].split(","))


def _length(case: Case, row: int) -> int:
    """Decoder ids of a row without its padding."""
    ids = case.tensors["in.decoder_input_ids"][row]
    return int((ids != PAD).nonzero().max()) + 1


def _place(builder: Builder, name: str) -> bool:
    """Put one tensor of the case where it belongs; False when no rule knows it."""
    case, found = builder.case, NAME.fullmatch(name)
    assert found is not None
    value, f64, tensor = found["value"], bool(found["f64"]), case.tensors[name]
    row = None if found["row"] is None else int(found["row"])
    if generated := GENERATED.fullmatch(value):
        _generation(builder, generated["run"], generated["what"], row, tensor, f64)
        return True
    seam = seam_of(value)
    if seam is None:
        return False
    text = case.texts.get(name, "")
    if row is None:
        builder.run("batch", "forward", inputs(case))
        builder.expect("batch", seam, tensor, f64, kept(text))
        return True
    builder.run(f"alone{row}", "forward", inputs(case, row))
    builder.expect(f"alone{row}", seam, tensor, f64, kept(text))
    # A model that honours the mask gives the same for the row of the padded batch.
    if kept(text) is None:
        mask = case.tensors["in.attention_mask"]
        builder.run(f"masked{row}", "forward", {**inputs(case), "attention_mask": mask})
        builder.expect(f"masked{row}", seam, tensor, f64, [[row, row + 1], [0, tensor.shape[1]]])
    return True


def _generation(builder: Builder, run: str, what: str, row: int | None, tensor: torch.Tensor, f64: bool) -> None:
    case = builder.case
    name = f"gen.{run}" if row is None else f"alone{row}.gen.{run}"
    given = inputs(case, row)
    settings = case.spec["generation"]["settings"][run]
    builder.run(name, "generate", {key: given[key] for key in ("input_ids", "pixel_values")}, **settings)
    if what == "ids":
        # The original's ids begin with the decoder's start token.
        builder.expect(name, "sequences", tensor[:, None, 1:], f64)
    else:
        builder.expect(name, "scores", tensor[:, None].double() if f64 else tensor[:, None], f64)


def _training(builder: Builder) -> None:
    """Losses and gradient norms. Where the file's head is tied, those of the tied original count: transformers
    ties."""
    case = builder.case
    figures = case.spec.get("training", {})
    for name, figure in figures.items():
        what, _, run = name.partition(".")
        run, f64 = run.removesuffix(".f64"), run.endswith(".f64")
        if what not in ("loss", "grad_norm", "grad_norm_tied", "grad_norm_total"):
            continue
        tied = f"grad_norm_tied.{run}.f64" in figures
        if run.startswith("row"):
            row, labels = _alone_labels(case, run)
            given = {key: value for key, value in inputs(case, row).items() if key != "decoder_input_ids"}
        else:
            given, labels = inputs(case), case.tensors["in.labels"]
            del given["decoder_input_ids"]
        reference = f"train.{run.removesuffix('_alone_tied_head').removesuffix('_alone')}"
        builder.run(reference, "train", {**given, "labels": labels}, mode="eval", ignore_padding=run == "pad_masked")
        if what == "loss":
            builder.expect(reference, "loss", torch.tensor(figure, dtype=torch.float64 if f64 else torch.float32), f64)
        elif what == "grad_norm_total":
            if not tied:
                builder.expect(reference, "grad_norm", torch.tensor(figure), f64)
        elif (what == "grad_norm_tied") == tied:
            for parameter, norm in figure.items():
                builder.expect(reference, f"grad_norm.{parameter}", torch.tensor(norm, dtype=torch.float64), f64)


def _alone_labels(case: Case, run: str) -> tuple[int, torch.Tensor]:
    found = re.match(r"row(\d+)_alone", run)
    assert found is not None
    row = int(found[1])
    labels = case.tensors["in.labels"][row : row + 1]
    length = int((labels[0] != PAD).nonzero().max()) + 1
    return row, labels[:, :length]


def seam_of(value: str) -> str | None:
    """The seam that the original's value of this name is; None when there is none."""
    if stage := STAGE.fullmatch(value):
        return f"vision.stages.{stage[1]}"
    if hidden := HIDDEN.fullmatch(value):
        layer = int(hidden[2])
        return f"{hidden[1]}.layers.{layer - 1}" if layer else f"{hidden[1]}.embeddings"
    return SEAMS.get(value)


def kept(text: str) -> list[Any] | None:
    """What part of a tensor was kept, from its text: `sliced [:, ::199, ::17]`, `image 0 of the batch only`."""
    if "image 0 of the batch only" in text:
        return [[0, 1]]
    steps = STEPS.search(text)
    if steps is None:
        return None
    return [[0, None, int(part.strip(": ") or 1)] for part in steps[1].split(",")]


def native_arguments(case: Case, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The padded batch as transformers' model takes it, everything attended to."""
    batch = inputs(case)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return complete("forward", batch, {}, config)


def native_parameter(name: str, config: Any) -> str:
    """peft's name, on the native model, of a parameter that it has on the original:
    `<module>.lora_A.default.weight`."""
    found = re.match(r"(.+?)\.((?:lora_[AB]|modules_to_save)\.default\.)(weight|bias)", name)
    assert found is not None, name
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    claim = next(florence2_rules(untied).of_source(f"{found[1]}.{found[3]}"))
    module = claim.rule.target_names(claim.captures)[0].rpartition(".")[0]
    return f"base_model.model.{module}.{found[2]}{found[3]}"
