"""moondream2's golden cases in the reference format: what their tensors are called, and what they hold.

Cases of 2024 hold one batch, padded on the left for inference and on the right for training; those of 2025 one run a
picture. The large case holds pictures instead of pixels, and parts of its tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import reference_builder
import torch
from golden_case import Case
from PIL import Image

from weightport.checkpoints import Checkpoint, TensorRef
from weightport.families.moondream2.layouts import locate

FAMILY = "moondream2"
KINDS = ("forward", "generate", "train")
IMAGE, IGNORED = -1, -100
TAIL = 8
SLICED = (0, 1, 364, 728)
"""Positions that the large case keeps of an image's vectors."""

VISION_SEAMS = {
    "vision.patch_embed": "vision.patches",
    "vision.norm": "vision",
    "projector_input": "merged",
    "image_embeds": "projector",
}
TEXT_SEAMS = {"infer.inputs_embeds": "decoder.embeddings", "infer.final_norm": "decoder", "infer.logits": "logits"}
BLOCK, HIDDEN = re.compile(r"vision\.block\.(\d+)"), re.compile(r"infer\.hidden\.(\d+)")
NUMBERED = re.compile(r"(.+)\.(\d+)")
BEAMS = re.compile(r"beam(\d+)")
NOT_PORTED = re.compile(
    # Inputs; of preprocessing, of the region head and of the original's own generation loops, which other tests take.
    r"(extra_)?image\.\d+|extra_pixels\.\d+|pixel_values(_slice|_sum|\.\d+)?|infer\.(input_ids|attention_mask|"
    r"position_ids)|train\.(tokens|labels|attention_mask|question_tokens|answer_tokens)|crops\.\d+|tiling\.\d+|"
    r"reconstructed\.\d+|region\..+|lora\..+|query\.tokens\.\d+|generate\.chat|prompt_last|first_token|"
    # Derived from others that are.
    r"train\.top10_(values|indices)|train\.token_losses(_row1)?|logits_prompt_last_row1_slice"
)


def has_ema(case: Case) -> bool:
    """No case of this family has averaged weights."""
    return False


def is_generated(name: str) -> bool:
    """Whether the tensor of this name is of a generation run."""
    return name.startswith(("generate.greedy", "generate.beam", "generate.early_stop", "query.greedy"))


def settings(case: Case) -> dict[str, Any]:
    """What a conversion of the case has to be told: the revision, which its files do not tell."""
    return {"revision": case.spec["source"]["revision"][:10]} if not is_of_2025(case) else {}


def model_parts(checkpoint: Checkpoint) -> dict[str, dict[str, TensorRef]]:
    """The model's tensors by the original's names, whatever stands before them in the file."""
    return {"model": dict(locate(checkpoint).tensors)}


def is_of_2025(case: Case) -> bool:
    return case.spec["source"]["revision"].startswith("2025")


class Builder(reference_builder.Builder):
    """A run's inputs are computed when it is opened."""

    def run(self, name: str, kind: str, inputs: Callable[[], dict[str, torch.Tensor]], **options: Any) -> None:
        super().run(name, kind, {} if name in self.runs else inputs(), **options)


def write_case(case: Case, path: Path, *, ema: bool = False, kinds: Collection[str] = KINDS) -> Path:
    """The case's reference as a file of the product's own format, of runs of `kinds`."""
    builder = Builder(case)
    place = _place_2025 if is_of_2025(case) else _place_large if "prompt_last" in case.tensors else _place_2024
    unknown = [
        name
        for name in case.tensors
        if not NOT_PORTED.fullmatch(name.removesuffix(".f64"))
        and not place(builder, name.removesuffix(".f64"), name.endswith(".f64"), case.tensors[name])
    ]
    if unknown:
        warnings.warn(f"{case.name}: no table says what these are: {', '.join(unknown)}", stacklevel=2)
    return builder.write(path, kinds)


def picture(case: Case, name: str) -> Image.Image:
    """A source picture of the case."""
    return Image.fromarray(case.tensors[name].numpy())


def pixels(case: Case) -> dict[str, torch.Tensor]:
    """`pixel_values` of the batch, and `sizes` where its pictures have several."""
    if "pixel_values" in case.tensors:
        return {"pixel_values": case.tensors["pixel_values"]}
    if "pixel_values_slice" in case.tensors:
        from weightport.modeling.moondream.image_processing_moondream import MoondreamImageProcessor

        images = [picture(case, name) for name in sorted(case.tensors) if re.fullmatch(r"image\.\d+", name)]
        return {"pixel_values": MoondreamImageProcessor()(images, return_tensors="pt")["pixel_values"]}
    pictures = [case.tensors[f"pixel_values.{number}"] for number in _numbers(case, "pixel_values")]
    height, width = (max(each.shape[axis] for each in pictures) for axis in (1, 2))
    batch = torch.zeros(len(pictures), 3, height, width)
    for row, each in zip(batch, pictures):
        row[:, : each.shape[1], : each.shape[2]] = each
    return {"pixel_values": batch, "sizes": torch.tensor([each.shape[1:] for each in pictures])}


def _numbers(case: Case, name: str) -> list[int]:
    return sorted(int(found[2]) for each in case.tensors if (found := NUMBERED.fullmatch(each)) and found[1] == name)


def _row(given: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One sample of a batch, its picture without padding."""
    one = {name: tensor[row : row + 1] for name, tensor in given.items()}
    if "sizes" in one:
        height, width = one["sizes"][0].tolist()
        one["pixel_values"] = one["pixel_values"][:, :, :height, :width]
    return one


# 2024: one batch of pictures and prompts.


def inference(case: Case) -> dict[str, torch.Tensor]:
    """The batch that generates, padded on the left."""
    return pixels(case) | {name: case.tensors[f"infer.{name}"] for name in ("input_ids", "attention_mask")}


def training(case: Case) -> dict[str, torch.Tensor]:
    """The batch of questions and answers, padded on the right."""
    tokens, length = case.tensors["train.tokens"], case.tensors["train.labels"].shape[1]
    image = torch.full((len(tokens), length - tokens.shape[1]), IMAGE)
    return pixels(case) | {
        "input_ids": torch.cat([tokens[:, :1], image, tokens[:, 1:]], dim=1),
        "attention_mask": case.tensors["train.attention_mask"].long(),
        "labels": case.tensors["train.labels"],
    }


def _alone(case: Case, row: int) -> dict[str, torch.Tensor]:
    """One sample of the inference batch without padding."""
    given = _row(inference(case), row)
    real = given.pop("attention_mask")[0].bool()
    return given | {"input_ids": given["input_ids"][:, real]}


def _place_2024(builder: Builder, value: str, f64: bool, tensor: torch.Tensor) -> bool:
    """Put one tensor of the case where it belongs; False when no rule knows it."""
    case = builder.case
    if seam := _vision_seam(value):
        builder.run("batch", "forward", lambda: inference(case))
        builder.expect("batch", seam, _view_order(case, tensor), f64)
        return True
    length = case.tensors["infer.input_ids"].shape[1]
    tail = case.tensors.get("infer.logits.f64")
    if value == "infer.logits" and tail is not None:
        # In float64 of the last positions only: the same of float32, so that the original's own noise, which an
        # adapter of random numbers makes large, is known.
        builder.run("batch", "forward", lambda: inference(case))
        last = [None, [length - tail.shape[1], None]]
        builder.expect("batch", "logits", tensor[:, -tail.shape[1] :], f64, last)
        return True
    if value == "infer.logits_tail":
        builder.run("batch", "forward", lambda: inference(case))
        builder.expect("batch", "logits", tensor, f64, [None, [length - tensor.shape[1], None]])
        return True
    if seam := _text_seam(value):
        # What stands at padding has no meaning, so that rows are compared one by one.
        for row, real in enumerate(case.tensors["infer.attention_mask"].bool()):
            builder.run(f"alone{row}", "forward", lambda row=row: _alone(case, row))
            builder.expect(f"alone{row}", seam, tensor[row : row + 1, real], f64)
        return True
    if value.startswith("generate."):
        return _generation(builder, value.removeprefix("generate."), tensor)
    if value == "train.logits_labelled":
        for row, start, stop, rows in _labelled(case, tensor):
            builder.run(f"answer{row}", "forward", lambda row=row, stop=stop: _answered(case, row, stop))
            builder.expect(f"answer{row}", "logits", rows[None], f64, [None, [start - 1, stop - 1]])
        return True
    return value.startswith("train.") and _training(builder, value, f64, tensor, training)


def _vision_seam(value: str) -> str | None:
    block = BLOCK.fullmatch(value)
    return f"vision.layers.{block[1]}" if block else VISION_SEAMS.get(value)


def _text_seam(value: str) -> str | None:
    hidden = HIDDEN.fullmatch(value)
    if hidden is None:
        return TEXT_SEAMS.get(value)
    return f"decoder.layers.{int(hidden[1]) - 1}" if int(hidden[1]) else "decoder.embeddings"


def _view_order(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of views as the native model has them, picture by picture: the original encodes all whole pictures, then
    all crops."""
    given = pixels(case)
    pictures, side = len(given["pixel_values"]), _side(case)
    if "sizes" not in given or len(tensor) == pictures:
        return tensor
    order, crop = [], pictures
    for row, (height, width) in enumerate(given["sizes"].tolist()):
        count = (height // side) * (width // side)
        count = 0 if count == 1 else count
        order += [row, *range(crop, crop + count)]
        crop += count
    return tensor[order]


def _side(case: Case) -> int:
    return int(case.spec["config"]["vision"]["image"])


def _generation(builder: Builder, name: str, tensor: torch.Tensor) -> bool:
    case = builder.case
    if not is_generated(f"generate.{name}"):
        return False
    options: dict[str, Any] = {"max_new_tokens": case.spec["reference"]["generation"]["max_new_tokens"]}
    if beams := BEAMS.fullmatch(name):
        options["num_beams"] = int(beams[1])
    if name == "early_stop":
        options["eos_token_id"] = case.spec["reference"]["strings"]["early_stop_eos"]
    builder.run(name, "generate", lambda: inference(case), **options)
    builder.expect(name, "sequences", tensor[:, None], False)
    return True


def _labelled(case: Case, tensor: torch.Tensor) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """(row, first labelled position, position behind the last, the row's part of a tensor of all labels)."""
    taken = 0
    for row, labels in enumerate(case.tensors["train.labels"]):
        places = (labels != IGNORED).nonzero()[:, 0]
        start, stop = int(places[0]), int(places[-1]) + 1
        assert stop - start == len(places), f"{case.name}: the labels of row {row} have gaps"
        yield row, start, stop, tensor[taken : taken + len(places)]
        taken += len(places)


def _answered(case: Case, row: int, stop: int) -> dict[str, torch.Tensor]:
    """One sample of the training batch without padding and labels."""
    given = _row(training(case), row)
    del given["labels"], given["attention_mask"]
    return given | {"input_ids": given["input_ids"][:, :stop]}


def _training(
    builder: Builder,
    value: str,
    f64: bool,
    tensor: torch.Tensor,
    inputs: Callable[[Case], dict[str, torch.Tensor]],
) -> bool:
    case = builder.case
    builder.run("train", "train", lambda: inputs(case), mode="eval")
    if value == "train.loss":
        builder.expect("train", "loss", tensor.reshape(()), f64)
    elif value == "train.grad_norms":
        for name, norm in zip(case.spec["reference"]["grad_names"], tensor):
            builder.expect("train", f"grad_norm.{name}", norm, f64)
    elif value.startswith("train.grad."):
        builder.expect("train", value.removeprefix("train."), tensor, f64)
    else:
        return False
    return True


# 2025: a run a picture.


def asked(case: Case, number: int) -> dict[str, torch.Tensor]:
    """One picture with its question."""
    return _pictured(case, number, case.tensors[f"query.tokens.{number}"])


def _pictured(case: Case, number: int, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    start = case.spec["config"]["tokenizer"]["bos_id"]
    image = torch.full((case.spec["config"]["text"]["prefix_attn"] - 1,), IMAGE)
    return {
        "pixel_values": case.tensors[f"pixel_values.{number}"][None],
        "tiling": case.tensors[f"tiling.{number}"][None],
        "input_ids": torch.cat([torch.tensor([start]), image, tokens])[None],
    }


def _trained_2025(case: Case) -> dict[str, torch.Tensor]:
    question, answer = case.tensors["train.question_tokens"], case.tensors["train.answer_tokens"]
    given = _pictured(case, 0, torch.cat([question, answer]))
    labels = given["input_ids"].clone()
    labels[:, : -len(answer)] = IGNORED
    return given | {"labels": labels}


def _place_2025(builder: Builder, value: str, f64: bool, tensor: torch.Tensor) -> bool:
    case = builder.case
    if value.startswith("train."):
        return _training(builder, value, f64, tensor, _trained_2025)
    found = NUMBERED.fullmatch(value)
    if found is None:
        return False
    what, number = found[1], int(found[2])
    if what == "query.greedy":
        steps = case.spec["reference"]["generation"]["max_new_tokens"]
        builder.run(f"greedy{number}", "generate", lambda: asked(case, number), max_new_tokens=steps)
        builder.expect(f"greedy{number}", "sequences", tensor[None, None], False)
        return True
    last = case.spec["config"]["text"]["n_layers"] - 1
    seams = {**VISION_SEAMS, "query.hidden": f"decoder.layers.{last}", "query.logits": "logits"}
    if what not in seams:
        return False
    builder.run(f"query{number}", "forward", lambda: asked(case, number))
    kept = None
    if what == "query.logits" and f64:
        length = len(case.tensors[f"query.tokens.{number}"]) + case.spec["config"]["text"]["prefix_attn"]
        kept = [None, [length - tensor.shape[1], None]]
    # The original projects one picture's features, without an axis of pictures.
    value = tensor[None] if what == "image_embeds" else tensor
    builder.expect(f"query{number}", seams[what], value, f64, kept)
    return True


# The large case: parts of what a training batch gives, forward only.


def _place_large(builder: Builder, value: str, f64: bool, tensor: torch.Tensor) -> bool:
    case, places = builder.case, {"indices": list(SLICED)}
    sliced = {"vision.norm_slice": "vision", "image_embeds_slice": "projector"}
    if value in sliced:
        builder.run("batch", "forward", lambda: training(case))
        builder.expect("batch", sliced[value], tensor, f64, [None, places])
        return True
    if value == "train.loss":
        builder.run("batch", "forward", lambda: training(case))
        builder.expect("batch", "loss", tensor.reshape(()), f64)
        return True
    prompts = case.tensors["prompt_last"].tolist()
    rows = [1] if "row1" in value else range(len(prompts))
    for column, row in enumerate(rows):
        stop = prompts[row] + 1
        if value in ("hidden_slice", "hidden_slice_row1"):
            for layer, hidden in enumerate(tensor[:, column]):
                seam = f"decoder.layers.{layer - 1}" if layer else "decoder.embeddings"
                kept = [None, [stop - 1, stop], [0, hidden.shape[-1]]]
                builder.run(f"prompt{row}", "forward", lambda row=row, stop=stop: _answered(case, row, stop))
                builder.expect(f"prompt{row}", seam, hidden[None, None], f64, kept)
        elif value == "logits_prompt_last":
            builder.run(f"prompt{row}", "forward", lambda row=row, stop=stop: _answered(case, row, stop))
            builder.expect(f"prompt{row}", "logits", tensor[column][None, None], f64, [None, [stop - 1, stop]])
        else:
            return False
    return True
