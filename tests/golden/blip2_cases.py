"""BLIP-2's golden cases in the reference format: what their tensors are called, and what they hold.

A case's tensors are `<argument>`, `<seam>[.f64]`, `grad_norm` (of `grad_names`, in order), `grad.<name>` and
`generate.<name>[.prompt_ids|.prompt_mask]`. T5 computes parts in float32 in the original's float64 run too: what comes
behind it is held against as what it is, a float32 value, in a run of its own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import golden
import torch
from golden_case import Case
from reference_builder import Builder

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.families.blip2.layouts import locate

FAMILY = "blip2"
KINDS = ("forward", "generate", "train")

SEAMS = {
    "vit": "vision", "ln_vision": "vision.norm", "qformer": "qformer", "projector": "projector", "encoder": "encoder",
    "logits": "logits", "logits_logsumexp": "logits.lse", "logits_argmax": "logits.argmax",
}  # fmt: skip
STAGE_1 = {
    "vit": ("itc", "vision"), "ln_vision": ("itc", "vision.norm"), "qformer_image": ("itc", "qformer"),
    "image_embeds": ("itc", "image_embeds"), "text_embeds": ("itc", "text_embeds"), "itc": ("itc", "itc"),
    "itc_forward": ("itc", "itc_pairs"), "itm": ("itm", "itm"),
}  # fmt: skip
BEHIND_T5 = ("encoder", "logits", "loss", "grad")
GENERATED = re.compile(r"(generate|vqa)\.\w+")
STEPS = re.compile(r"\[((?::{1,2}\d*,? ?)+)\]")
INPUTS = re.compile(
    r"image\.\d+|pixel_values|input_ids|(lm_|decoder_)?attention_mask|labels|.+\.prompt_(ids|mask)|train_.+"
)
NOT_PORTED = re.compile(
    # Of rounded weights, which another conversion gives. Of pairs, which `itm` and `itc` hold too, and of the text's
    # own pass.
    r".+\.bf16_weights|itm_forward|compute_itm|qformer_text_cls|qformer_multimodal\..+"
)


def has_ema(case: Case) -> bool:
    """No case of this family has averaged weights."""
    return False


def is_generated(name: str) -> bool:
    """Whether the tensor of this name is of a generation run."""
    return GENERATED.fullmatch(name) is not None


def settings(case: Case) -> dict[str, Any]:
    """What a conversion of the case has to be told: head counts, which no shape tells."""
    config = case.spec["config"]
    chosen: dict[str, Any] = {
        "vision_heads": config["vit"]["num_heads"],
        "qformer_heads": config["qformer"]["num_attention_heads"],
    }
    if "llm_dir" not in config:
        chosen["qformer_tokenizer"] = str(case.path / "companions" / config["bert_dir"])
    elif not (case.path / "companions" / config["llm_dir"] / "tokenizer_config.json").is_file():
        chosen["vocabulary"] = "none"
    return chosen


def sources(case: Case, checkpoint: Path) -> dict[str, Path]:
    """The case's source files by the names that a conversion gives them."""
    config, folder = case.spec["config"], checkpoint.parent
    found = {"checkpoint": folder / config["checkpoint"], "vision": folder / config["vision_checkpoint"]}
    return found | ({"llm": folder / config["llm_dir"]} if "llm_dir" in config else {})


def model_parts(checkpoint: Checkpoint) -> dict[str, dict[str, TensorRef]]:
    """The trained tensors by the original's names, without the strays of the frozen language model."""
    return {"model": dict(locate(checkpoint).tensors)}


def write_case(case: Case, path: Path, *, ema: bool = False, kinds: Collection[str] = KINDS) -> Path:
    """The case's reference as a file of the product's own format, of runs of `kinds`."""
    builder = Builder(case)
    place = _place if "llm_dir" in case.spec["config"] else _place_stage_1
    unknown = [name for name in case.tensors if not place(builder, name)]
    if unknown:
        warnings.warn(f"{case.name}: no table says what these are: {', '.join(unknown)}", stacklevel=2)
    return builder.write(path, kinds)


def pixels(case: Case) -> torch.Tensor:
    """What the original was given, stored or by a formula."""
    if "pixel_values" in case.tensors:
        return case.tensors["pixel_values"]
    formula = case.spec["reference"]["pixel_values"]
    return torch.from_numpy(golden.fill(formula["fill"], tuple(formula["shape"])))


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """What the original's forward was given, in terms of the text alone."""
    names = ("input_ids", "attention_mask", "labels", "decoder_attention_mask")
    given = {name: case.tensors[name] for name in names if name in case.tensors}
    return {"image": pixels(case), **given}


def _is_t5(case: Case) -> bool:
    return "t5_model" in case.spec["config"]


def _place(builder: Builder, name: str) -> bool:
    """Put one tensor of the case where it belongs; False when no rule knows it."""
    case = builder.case
    value, f64, tensor = name.removesuffix(".f64"), name.endswith(".f64"), case.tensors[name]
    if INPUTS.fullmatch(value) or NOT_PORTED.fullmatch(value):
        return True
    if GENERATED.fullmatch(value):
        _generation(builder, value, tensor)
        return True
    # What the original's T5 rounds to float32 is that, in whatever type it is stored.
    rounded = f64 and _is_t5(case) and value.startswith(BEHIND_T5)
    suffix, f64 = (".rounded", False) if rounded else ("", f64)
    tensor = tensor.float() if rounded else tensor
    if value == "loss" or value.startswith("grad"):
        run = f"train{suffix}"
        builder.run(run, "train", inputs(case), mode="eval")
        if value == "grad_norm":
            for parameter, norm in zip(case.spec["reference"]["grad_names"], tensor, strict=True):
                builder.expect(run, f"grad_norm.{parameter}", norm, f64)
        else:
            builder.expect(run, value, tensor, f64)
        return True
    seam = SEAMS.get(value.removesuffix(".slice"))
    if seam is None:
        return False
    builder.run(f"forward{suffix}", "forward", inputs(case))
    builder.expect(f"forward{suffix}", seam, tensor, f64, _kept(case.texts, value))
    return True


def _kept(texts: dict[str, str], value: str) -> list[Any] | None:
    """What part of a tensor was kept, from its text: `[:, ::32, ::11]`."""
    text = texts.get(value) or next((text for name, text in texts.items() if value in name.split("/")), "")
    if value == "ln_vision.slice":
        text = texts["vit.slice"]
    found = STEPS.search(text)
    if found is None:
        return None
    return [[0, None, int(step.strip().strip(":") or 1)] for step in found[1].split(",")]


def _place_stage_1(builder: Builder, name: str) -> bool:
    case = builder.case
    value, f64, tensor = name.removesuffix(".f64"), name.endswith(".f64"), case.tensors[name]
    if value.startswith("train.loss") or value == "grad_norm":
        _stage_1_training(builder, value, tensor, f64)
        return True
    if INPUTS.fullmatch(value) or NOT_PORTED.fullmatch(value):
        return True
    if value not in STAGE_1:
        return False
    run, seam = STAGE_1[value]
    given = {"image": pixels(case)} | {name: case.tensors[name] for name in ("input_ids", "attention_mask")}
    if run == "itm":
        # Every picture with every text.
        pictures, texts = len(given["image"]), len(given["input_ids"])
        given = {
            name: each.repeat_interleave(texts, 0) if name == "image" else each.repeat(pictures, 1)
            for name, each in given.items()
        }
        tensor = tensor.flatten(0, 1)
    builder.run(run, "forward", given, head=run)
    builder.expect(run, seam, tensor, f64)
    return True


def _stage_1_training(builder: Builder, value: str, tensor: torch.Tensor, f64: bool) -> None:
    """Losses and gradients of the first two pairs: with two, nothing is drawn by chance."""
    case = builder.case
    given = {
        "image": pixels(case),
        **{name: case.tensors[f"train_{name}"] for name in ("input_ids", "attention_mask")},
    }
    builder.run("train", "train", {name: each[:2] for name, each in given.items()}, mode="eval")
    if value == "grad_norm":
        for parameter, norm in zip(case.spec["reference"]["grad_names"], tensor, strict=True):
            builder.expect("train", f"grad_norm.{parameter}", norm, f64)
    else:
        builder.expect("train", value.removeprefix("train."), tensor, f64)


def _generation(builder: Builder, value: str, ids: torch.Tensor) -> None:
    """A search that transformers 5 cannot repeat is left out: it divides the score of a hypothesis cut at the limit by
    one token less than transformers 4 did."""
    case = builder.case
    stated = case.spec["reference"]["generation"][value]
    if not stated.get("same_ids_with_transformers_5_23_generate", True):
        return
    queries = case.spec["config"]["lavis"]["num_query_token"]
    prompt = {
        "image": pixels(case),
        "input_ids": case.tensors[f"{value}.prompt_ids"],
        "attention_mask": case.tensors[f"{value}.prompt_mask"][:, queries:],
    }
    # Of embeddings alone, transformers 4 puts a token before what it generates; OPT's limit counts it.
    new = stated.get("max_new_tokens") or stated["max_length"] - 1
    names = ("num_beams", "min_length", "eos_token_id", "repetition_penalty", "length_penalty", "num_return_sequences")
    options = {name: stated[name] for name in names if stated.get(name) is not None}
    builder.run(value, "generate", prompt, max_new_tokens=new, **options)
    returned = options.get("num_return_sequences", 1)
    builder.expect(value, "sequences", ids[:, 1:].unflatten(0, (-1, returned)).contiguous().long(), False)
