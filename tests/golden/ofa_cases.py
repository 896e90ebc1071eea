"""OFA's golden cases in the reference format: one table of names, and what the texts beside the tensors say.

A case's tensors are `<run>.input.<argument>`, `<run>.output.<value>[_sub|_lse|_argmax][.f64]`, the same as
`ema_output` for the averaged weights, `generate.<run>.<value>` and `train.<run>[.f64].<value>`. The texts say which
settings a run had, whose inputs it shares, and what part of a large tensor was kept.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import reference_builder
import torch
from golden_case import Case

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.parity import Selection
from weightport.parity.reference import FLOAT64_SUFFIX
from weightport.parity.selection import parse_selection

FAMILY = "ofa"
KINDS = ("forward", "generate", "train")

SEAMS = {
    "image_features": "vision",
    "image_proj": "projector",
    "encoder_padding_mask": "encoder.mask",
    "position_embeddings": "encoder.positions",
    "encoder_hidden_states.0": "encoder.embeddings",
    "encoder_last_hidden_state": "encoder",
    "decoder_hidden_states.0": "decoder.embeddings",
    "logits": "logits",
    "ids": "sequences",
    "scores": "scores",
    "positional_scores": "positional_scores",
    "loss": "loss",
    "nll": "nll",
    "sample_size": "sample_size",
    "grad_norm_total": "grad_norm",
}
HIDDEN = re.compile(r"(encoder|decoder)_hidden_states\.([1-9]\d*)")
DERIVED = {"_sub": "", "_lse": ".lse", "_argmax": ".argmax", "": ""}
SPECIAL_IDS = 4
TOWER = "encoder.embed_images."

FORWARD = re.compile(
    r"(?P<run>.+)\.(?P<side>output|ema_output)\.(?P<value>.+?)(?P<derived>_sub|_lse|_argmax)?(?P<f64>\.f64)?"
)
GENERATE = re.compile(r"generate\.(?P<run>.+)\.(?P<value>ids|scores|positional_scores)(?P<f64>\.f64)?")
TRAIN = re.compile(
    r"train\.(?P<run>.+?)(?P<f64>\.f64)?\.(?P<value>loss|nll|sample_size|grad_norms|grad_norm_total|grad\..+|after\..+)"
)
INPUT = re.compile(r"(?P<run>.+)\.input\.(?P<argument>.+)")
SHARED = re.compile(r"inputs (?:are )?(\S+)\.input\.\*|for (\S+)\.input\.\*")


class Builder(reference_builder.Builder):
    """Runs share inputs, and a text says what part of a tensor was kept."""

    def run(self, name: str, kind: str, inputs: str, options: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Open a run with the inputs `<inputs>.input.*`, once."""
        if name in self.runs:
            return
        self.runs[name] = {"kind": kind, "options": dict(options())}
        for key, tensor in self.case.tensors.items():
            found = INPUT.fullmatch(key)
            if (
                found
                and found["run"] == inputs
                and not (kind == "generate" and found["argument"] in DECODER_ARGUMENTS)
            ):
                self.give(name, found["argument"], tensor)

    def give(self, run: str, argument: str, tensor: torch.Tensor) -> None:
        self.tensors[f"{run}/in/{argument}"] = tensor.clone()

    def expect(self, run: str, seam: str, tensor: torch.Tensor, f64: bool, text: str = "") -> None:
        key = f"{run}/out/{seam}{FLOAT64_SUFFIX if f64 else ''}"
        self.tensors[key] = tensor.clone()
        selection = selection_of(text, seam, tuple(tensor.shape))
        if selection is not None:
            self.slices[key] = selection


DECODER_ARGUMENTS = ("prev_output_tokens", "code_masks")


def settings(case: Case) -> dict[str, Any]:
    """What a conversion of the case has to be told: nothing, files of this family tell everything."""
    return {}


def has_ema(case: Case) -> bool:
    """Whether the case has a reference of the averaged weights."""
    return any(".ema_output." in name for name in case.tensor_names)


def is_generated(name: str) -> bool:
    """Whether the tensor of this name is of a generation run."""
    return GENERATE.fullmatch(name) is not None


def write_case(case: Case, path: Path, *, ema: bool = False, kinds: Collection[str] = KINDS) -> Path:
    """The case's reference as a file of the product's own format; with `ema`, what the averaged weights gave.

    `kinds`: the runs to take.
    """
    builder = Builder(case)
    unknown = [name for name in case.tensors if not _place(builder, name, ema)]
    if unknown:
        warnings.warn(f"{case.name}: no table says what these are: {', '.join(unknown)}", stacklevel=2)
    return builder.write(path, kinds)


def model_parts(checkpoint: Checkpoint) -> dict[str, dict[str, TensorRef]]:
    """The model's tensors by the original's names."""
    return {"model": section} if (section := checkpoint.section("model")) else {}


def _place(builder: Builder, name: str, ema: bool) -> bool:
    """Put one tensor of the case where it belongs; False when no rule knows it."""
    case = builder.case
    tensor, text = case.tensors[name], case.texts.get(name, "")
    if found := TRAIN.fullmatch(name):
        return ema or _training(builder, found, tensor, text)
    if found := GENERATE.fullmatch(name):
        return ema or _generation(builder, found, tensor, text)
    if found := FORWARD.fullmatch(name):
        if (found["side"] == "ema_output") != ema:
            return True
        seam = seam_of(found["value"])
        if seam is None:
            return False
        builder.run(found["run"], "forward", found["run"])
        builder.expect(found["run"], seam + DERIVED[found["derived"] or ""], tensor, bool(found["f64"]), text)
        return True
    return bool(INPUT.fullmatch(name)) or name == "train.target" or name.endswith(".prefix_tokens")


def _generation(builder: Builder, found: re.Match[str], tensor: torch.Tensor, text: str) -> bool:
    run = f"generate.{found['run']}"
    builder.run(run, "generate", shared_inputs(text) or "generate", lambda: generation_options(text))
    prefix = builder.case.tensors.get(f"{run}.prefix_tokens")
    if prefix is not None:
        builder.give(run, "prefix_tokens", prefix)
    if found["value"] == "positional_scores":
        # Beyond a hypothesis' end the original's file holds NaN.
        tensor = tensor.nan_to_num(nan=0.0)
    builder.expect(run, SEAMS[found["value"]], tensor, bool(found["f64"]))
    return True


def _training(builder: Builder, found: re.Match[str], tensor: torch.Tensor, text: str) -> bool:
    run, value, case = f"train.{found['run']}", found["value"], builder.case
    losses = case.texts.get(f"{run}.loss", text)
    builder.run(run, "train", shared_inputs(case.texts.get("train.target", "")), lambda: training_options(losses))
    builder.give(run, "target", case.tensors["train.target"])
    confidence = _literal(losses, r"conf=(None|\[.*?\])")
    if confidence is not None:
        builder.give(run, "conf", torch.tensor(confidence))
    f64 = bool(found["f64"])
    if value == "grad_norms":
        for name, norm in zip(case.spec["reference"]["gradient_parameters"], tensor, strict=True):
            builder.expect(run, f"grad_norm.{name}", norm, f64)
    elif value.startswith("grad."):
        builder.expect(run, value, tensor, f64, text)
    elif value.startswith("after."):
        builder.expect(run, f"after.{TOWER}{value.removeprefix('after.')}", tensor, f64)
    else:
        builder.expect(run, SEAMS[value], tensor, f64)
    return True


def seam_of(value: str) -> str | None:
    """The seam that the original's value of this name is; None when there is none."""
    layer = HIDDEN.fullmatch(value)
    return f"{layer[1]}.layers.{int(layer[2]) - 1}" if layer else SEAMS.get(value)


def shared_inputs(text: str) -> str:
    """Whose inputs a run shares, as its text says; "" when it says nothing."""
    found = SHARED.search(text)
    return (found[1] or found[2]) if found else ""


def generation_options(text: str) -> dict[str, Any]:
    """Settings from a text: `settings {"beam": 5}; only ids 0..15 allowed, others set to -inf after log_softmax`."""
    found = re.search(r"settings (\{.*?\})", text)
    options = json.loads(found[1]) if found else {}
    allowed = re.search(r"only ids (\d+)\.\.(\d+) allowed.*(before|after) log_softmax", text)
    if allowed:
        # The original's range comes on top of the four special ids.
        options["constraint_range"] = [max(int(allowed[1]), SPECIAL_IDS), int(allowed[2]) + 1]
        options["zero_shot"] = allowed[3] == "after"
    return options


def training_options(text: str) -> dict[str, Any]:
    """Settings from a text such as `… epsilon 0.1, train mode (…), conf=None, {'drop_worst_ratio': 0.2}`."""
    epsilon = re.search(r"epsilon ([\d.e-]+\d)", text)
    mode = re.search(r"(eval|train) mode", text)
    criterion = _literal(text, r"(\{[^{}]*\})\s*$") or {}
    options: dict[str, Any] = {
        "label_smoothing": float(epsilon[1]) if epsilon else 0.0,
        "mode": mode[1] if mode else "eval",
    }
    # The original drops from update drop_worst_after + 1 on; the reference is of update 0.
    if criterion.get("drop_worst_ratio") and criterion.get("drop_worst_after", 0) < 0:
        options["drop_worst_ratio"] = criterion["drop_worst_ratio"]
    return options


def _literal(text: str, pattern: str) -> Any:
    found = re.search(pattern, text)
    return ast.literal_eval(found[1]) if found else None


def selection_of(text: str, seam: str, kept: tuple[int, ...]) -> Selection | None:
    """What part of a tensor was kept, from a text: `every 7th source position, every 32nd channel`; None: all of
    it."""
    if re.search(r"first \d+ values of that gradient", text):
        return parse_selection({"flat": [0, kept[0]]})
    channel = 1 if seam == "vision" else len(kept) - 1
    axes: dict[int, Any] = {}
    if listed := re.search(r"at positions (\[[\d, ]*\])", text):
        axes[1] = {"indices": json.loads(listed[1])}
    for step, what in re.findall(r"every (\d+)(?:st|nd|rd|th) (.*?)(?:,|$)", text):
        axes[1 if "position" in what else channel] = [0, None, int(step)]
    if bounds := re.search(r"channels slice\((\d+), (\d+), None\)", text):
        axes[channel] = [int(bounds[1]), int(bounds[2])]
    if not axes:
        return None
    return parse_selection([axes.get(axis) for axis in range(max(axes) + 1)])
