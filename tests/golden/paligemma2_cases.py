"""PaliGemma's golden cases in the reference format: what their tensors are called, and what they hold.

A case's tensors are `in.<argument>`, `<seam>[.f64]`, `grad_norm.<mean>/<key>` and `generate.<name>`; the forward run
saw `in.text` without its last position. The large case holds parts of its tensors, of which its texts tell.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from golden_case import Case
from reference_builder import Builder

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.families.paligemma2.layouts import locate

FAMILY = "paligemma2"
KINDS = ("forward", "generate", "train")
END, PAD = 1, 0

SEAMS = {
    "vision.with_posemb": "vision.embeddings",
    "vision.encoded": "vision",
    "vision.zimg": "projector",
    "llm.pre_logits": "decoder",
    "text_logits": "logits",
    "text_logits.logsumexp": "logits.lse",
    "text_logits.top5_ids": "logits.argmax",
}
BLOCK, HIDDEN = re.compile(r"vision\.block(\d+)"), re.compile(r"llm\.hidden\.(\d+)")
LOSS = re.compile(r"(?:loss\.|grad_norm\.)(token_mean|trainer)(?:/(.+))?")
RUNS = {"token_mean": "tokens", "trainer": "examples"}
NOT_PORTED = re.compile(
    # Derived from others that are; of a beam search of the original's own; of parameters kept in bfloat16. The copies
    # in this repository hold none of these.
    r"in\..+|.*softcapped|loss\.(nll_per_token|per_example)|generate\.(alt_eos|beam3.*|greedy_logp.*|"
    r"greedy_bf16cache)|.+\.bf16params|generate\.prefill_last_logits|text_logits\.top5_values"
)


def has_ema(case: Case) -> bool:
    """No case of this family has averaged weights."""
    return False


def is_generated(name: str) -> bool:
    """Whether the tensor of this name is of a generation run."""
    return name == "generate.greedy"


def settings(case: Case) -> dict[str, Any]:
    """What a conversion of the case has to be told: settings that no shape tells, where they are not the default."""
    text = case.spec["config"]["llm"]
    chosen: dict[str, Any] = {}
    if text["query_pre_attn_norm"] == "rsqrt_emb_per_head":
        chosen["query_scale"] = "width"
    if text.get("post_norms") and text["attn_logits_softcap"] != 50.0:
        chosen["attention_softcap"] = str(text["attn_logits_softcap"])
    return chosen


def model_parts(checkpoint: Checkpoint) -> dict[str, dict[str, TensorRef]]:
    """The model's tensors by the original's names, whatever stands before them in the file."""
    return {"model": dict(locate(checkpoint).tensors)}


def referred(case: Case) -> Case:
    """The case whose outputs are those of `case`."""
    beside = case.spec.get("reference", {}).get("same_as")
    if beside is None:
        return case
    folder = (case.path / beside).resolve().parent
    return Case(folder, folder.name)


def write_case(case: Case, path: Path, *, ema: bool = False, kinds: Collection[str] = KINDS) -> Path:
    """The case's reference as a file of the product's own format, of runs of `kinds`."""
    builder = Builder(referred(case))
    unknown = [name for name in builder.case.tensors if not _place(builder, name)]
    if unknown:
        warnings.warn(f"{case.name}: no table says what these are: {', '.join(unknown)}", stacklevel=2)
    return builder.write(path, kinds)


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """What the original's training forward was called with, one position more than the model saw."""
    return {name: case.tensors[f"in.{name}"] for name in ("image", "text", "mask_ar", "mask_loss")}


def _place(builder: Builder, name: str) -> bool:
    """Put one tensor of the case where it belongs; False when no rule knows it."""
    case = builder.case
    value, f64, tensor = name.removesuffix(".f64"), name.endswith(".f64"), case.tensors[name]
    if NOT_PORTED.fullmatch(value):
        return True
    if value == "generate.greedy":
        _generation(builder, tensor)
        return True
    if loss := LOSS.fullmatch(value):
        run = f"train.{loss[1]}"
        builder.run(run, "train", inputs(case), mean=RUNS[loss[1]])
        seam = f"grad_norm.{loss[2]}" if loss[2] else "loss"
        # One number is no axis of layers.
        stacked = "/layers/" in value or "/encoderblock/" in value
        builder.expect(run, seam, tensor if stacked else tensor.reshape(()), f64)
        return True
    seam = seam_of(value, case)
    if seam is None:
        return False
    whole = inputs(case)
    seen = {"image": whole["image"], "text": whole["text"][:, :-1], "mask_ar": whole["mask_ar"][:, :-1]}
    builder.run("forward", "forward", seen)
    if value == "text_embedded":
        # Of the text alone, which stands behind the image.
        before = case.spec["config"]["image_tokens"]
        builder.expect("forward", seam, tensor, f64, [[0, None], [before, None]])
        return True
    if seam == "projector":
        # The original has the tokens of all frames behind each other.
        tensor = tensor.reshape(-1, tensor.shape[1] // case.spec["config"]["frames"], tensor.shape[2])
    if seam == "logits.argmax":
        tensor = tensor[..., 0].long()
    builder.expect("forward", seam, tensor, f64, kept(case, case.texts.get(name, "")))
    return True


def _generation(builder: Builder, ids: torch.Tensor) -> None:
    """The original goes on behind an end; what it says there has no meaning."""
    case = builder.case
    prompt = {
        "image": case.tensors["in.image"],
        "text": case.tensors["in.prompt"],
        "mask_ar": case.tensors["in.prompt_mask_ar"],
        "mask_input": case.tensors["in.prompt_mask_input"],
    }
    stated = case.spec["reference"]["generation"]
    options = {"max_decode_len": stated["max_decode_len"], "eos_token": stated["eos_token"]}
    builder.run("greedy", "generate", prompt, **options)
    ended = ((ids == END).cumsum(1) - (ids == END).long()) > 0
    builder.expect("greedy", "sequences", ids.masked_fill(ended, PAD)[:, None].long(), False)


def seam_of(value: str, case: Case) -> str | None:
    """The seam that the original's value of this name is; None when there is none."""
    if block := BLOCK.fullmatch(value):
        return f"vision.layers.{int(block[1])}"
    if hidden := HIDDEN.fullmatch(value):
        return f"decoder.layers.{int(hidden[1]) - 1}"
    if value == "llm.hidden.last":
        return f"decoder.layers.{case.spec['config']['llm']['depth'] - 1}"
    return "decoder.embeddings" if value == "text_embedded" else SEAMS.get(value)


TOKENS = re.compile(r"tokens 0, (\d+), \d+ \.\.\., first (\d+) channels")
COLUMNS = re.compile(r"(\d+):(\d+)")


def kept(case: Case, text: str) -> list[Any] | None:
    """What part of a tensor was kept, from its text; None where all of it was."""
    if tokens := TOKENS.match(text):
        return [[0, None], [0, None, int(tokens[1])], [0, int(tokens[2])]]
    if text == "text positions only":
        return [[0, None], [case.spec["config"]["image_tokens"], None]]
    if text.startswith("columns "):
        ranges = COLUMNS.findall(text.partition(" of ")[0])
        return [[0, None], [0, None], {"indices": [i for a, b in ranges for i in range(int(a), int(b))]}]
    return None
