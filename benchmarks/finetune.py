#!/usr/bin/env python3
"""What training costs: port-finetune, without and with --cache-features, against the guides' own plain loops.

    python benchmarks/finetune.py                 small models with the proportions of the released ones, on the CPU
    python benchmarks/finetune.py --gpu           OFA-base at 256 px and Florence-2-base at 768 px, bfloat16
    python benchmarks/finetune.py --only florence2 --steps 6

Two workloads: OFA-CN's LiT-tuning (encoder, with its ResNet, and embeddings frozen) on 10 captions an image, and
Florence-2 with vision tower and projector frozen on questions about documents, 10 an image. Pictures
are drawn here. Models are golden cases made larger, with random weights.

Each trainer is a process of its own, in turn on the same files, `--runs` times. samples/s: of the steps after the
first WARM ones, start and filling left out. Memory: the peak of the process's private memory (RssAnon), on a GPU of
what torch allocated. "filled": samples/s over the epochs of the recipe when filling the features counts as well.

What to expect: the guide runs frozen and trained parts in every step, so that features cannot save more than the
frozen parts' share of it. Figures and the machine they are from: docs/feature_cache.md.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from guide_loops import GUIDES, train
from PIL import Image, ImageDraw
from processes import Figures, Timing, save, timed

ROOT = Path(__file__).resolve().parents[1]
WARM = 2
CAPTIONS = 10
TRAINERS = ("guide", "ours", "features")
CHARACTERS = "一二三四五六七八九十人大小上下左右天地水火山木金土日月"


@dataclass(frozen=True)
class Size:
    """A model and its batches: fields of config.json by dotted name, pixels, samples a step."""

    config: Mapping[str, Any]
    pixels: int
    batch: int


@dataclass(frozen=True)
class Workload:
    """A golden case, a recipe on it with the freeze targets, its epochs and rate, in two sizes."""

    case: str
    recipe: str
    freeze: tuple[str, ...]
    epochs: int
    rate: float
    draw: Callable[[Path, int, int], Path]
    small: Size
    full: Size


def draw_picture(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG of coloured shapes and noise."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.randint(0, 256, (size[1] // 8, size[0] // 8, 3), generator=generator, dtype=torch.uint8).numpy()
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR)
    ImageDraw.Draw(picture).ellipse((number % 200, 40, number % 200 + 200, 240), fill=(number * 37 % 256, 90, 160))
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def _caption(image: int, number: int) -> str:
    """8 to 20 characters."""
    places = [image * 7 + number * 3 + i * i for i in range(8 + (image + number) % 13)]
    return "".join(CHARACTERS[place % len(CHARACTERS)] for place in places)


def draw_captions(folder: Path, images: int, captions: int) -> Path:
    """MUGE's files: captions of 8 to 20 characters about pictures of 640 × 480."""
    with open(folder / "train_imgs.tsv", "w") as table:
        for number in range(images):
            table.write(f"{number}\t{base64.urlsafe_b64encode(draw_picture(number, (640, 480))).decode()}\n")
    texts = [[_caption(number, each) for each in range(captions)] for number in range(images)]
    lines = [json.dumps({"image_id": str(n), "text": text}, ensure_ascii=False) for n, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("\n".join([*lines, ""]), "utf-8")
    return folder / "train.jsonl"


def draw_documents(folder: Path, images: int, questions: int) -> Path:
    """JSON lines: questions about pages of 850 × 1100, of one length, and their answers."""
    rows = []
    for number in range(images):
        (folder / f"{number}.jpg").write_bytes(draw_picture(number, (850, 1100)))
        for question in range(questions):
            text = f"what is the number in line {question:02d} of page {number:03d}?"
            rows.append({"image": f"{number}.jpg", "prefix": text, "suffix": f"{number * 31 + question:05d}"})
    path = folder / "annotations.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), ""]), "utf-8")
    return path


def _ofa(width: int, layers: int, depths: list[int], vocabulary: int) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    return {
        "d_model": width, "vocab_size": vocabulary, "image_bucket_size": 42, "token_bucket_size": 256,
        "vision_config.depths": depths, "scale_resids": False,
        **{f"{side}_layers": layers for side in sides},
        **{f"{side}_attention_heads": width // 64 for side in sides},
        **{f"{side}_ffn_dim": 4 * width for side in sides},
    }  # fmt: skip


def _florence2(width: int, layers: int, embed: list[int], depths: list[int], vocabulary: int) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    return {
        "text_config.d_model": width, "text_config.vocab_size": vocabulary,
        "text_config.max_position_embeddings": 1024, "vision_config.projection_dim": width,
        "vision_config.embed_dim": embed, "vision_config.depths": depths,
        "vision_config.num_heads": [size // 32 for size in embed],
        "vision_config.num_groups": [size // 32 for size in embed],
        **{f"text_config.{side}_layers": layers for side in sides},
        **{f"text_config.{side}_attention_heads": width // 64 for side in sides},
        **{f"text_config.{side}_ffn_dim": 4 * width for side in sides},
    }  # fmt: skip


WORKLOADS = {
    # Small: about two thirds of a forward pass in what is frozen, as in OFA-base (18 of 28 GFLOP multiply-adds).
    "ofa": Workload(
        "ofa/cn-tiny", "muge-caption", ("encoder", "embeddings"), 10, 5e-5, draw_captions,
        Size(_ofa(384, 3, [1, 1, 2], 16000), 256, 16), Size(_ofa(768, 6, [3, 4, 23], 59457), 256, 128),
    ),
    "florence2": Workload(
        "florence2/tiny-vocab-4k", "docvqa", ("vision", "projector"), 7, 1e-6, draw_documents,
        Size(_florence2(256, 2, [64, 128, 256, 512], [1, 1, 3, 1], 4000), 256, 6),
        Size(_florence2(768, 6, [128, 256, 512, 1024], [1, 1, 9, 1], 51289), 768, 6),
    ),
}  # fmt: skip


def make_model(workload: Workload, size: Size, folder: Path) -> Path:
    """A converted golden case, made larger, its weights drawn at random."""
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    from golden_case import Case
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    from weightport.api import convert

    logging.disable_progress_bar()
    case = Case(ROOT / "tests" / "golden" / "cases" / workload.case, workload.case)
    (folder / "original").mkdir(parents=True)
    directory = folder / "model"
    convert(case.materialize(folder / "original"), directory, case.family)
    config = AutoConfig.from_pretrained(directory)
    for name, value in size.config.items():
        *outer, last = name.split(".")
        part = config
        for each in outer:
            part = getattr(part, each)
        setattr(part, last, value)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def work(name: str, trainer: str, folder: Path, gpu: bool, steps: int) -> None:
    """One trainer in this process; its figures go to `folder`/result.json."""
    workload = WORKLOADS[name]
    size = workload.full if gpu else workload.small
    data = next(folder.glob("data/*.jsonl"))
    run = _by_hand if trainer == "guide" else _by_weightport
    times, filling = run(workload, size, folder, data, trainer, gpu, steps)
    seconds = times[-1] - times[WARM - 1]
    result = {"rate": size.batch * (len(times) - WARM) / seconds, "filling": filling}
    if gpu:
        result["megabytes"] = torch.cuda.max_memory_allocated() / 1e6
    (folder / "result.json").write_text(json.dumps(result))


def _by_hand(
    workload: Workload, size: Size, folder: Path, data: Path, trainer: str, gpu: bool, steps: int
) -> tuple[list[float], float]:
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    from weightport.families.registry import registry
    from weightport.finetuning.recipes.settings import BatchSettings
    from weightport.finetuning.setup.model_loading import load_processor

    family = registry().of_directory(folder / "model").training
    processor = load_processor(folder / "model", family, BatchSettings(image_size=size.pixels))
    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    device = torch.device("cuda" if gpu else "cpu")
    guide = GUIDES[family.name]
    loop = train(guide, model, processor, data, batch=size.batch, steps=steps, rate=workload.rate, device=device)
    return list(loop), 0.0


def _by_weightport(
    workload: Workload, size: Size, folder: Path, data: Path, trainer: str, gpu: bool, steps: int
) -> tuple[list[float], float]:
    from weightport.families.registry import registry
    from weightport.finetuning.recipes.recipe import for_family, load_recipe, with_settings
    from weightport.finetuning.setup.preparing import Job
    from weightport.finetuning.training import run as running
    from weightport.finetuning.training.trainer import PortTrainer

    settings = {
        "batch.image_size": size.pixels, "model.freeze": list(workload.freeze),
        "model.cache_features": trainer == "features", "training.max_steps": steps,
        "training.per_device_train_batch_size": size.batch, "training.dataloader_drop_last": True,
        "training.eval_strategy": "no", "training.save_strategy": "no", "training.use_cpu": not gpu,
        "training.fp16": False, "training.bf16": gpu,
    }  # fmt: skip
    model = folder / "model"
    recipe = load_recipe(workload.recipe)
    family = registry().of_directory(model).training
    recipe = with_settings(for_family(recipe, family.name), settings, "benchmark")
    times: list[float] = []
    filling = [0.0]
    step, fill = PortTrainer.training_step, running.filled_store

    def timed_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        loss.item()
        times.append(time.perf_counter())
        return loss

    def timed_fill(*args: Any) -> Any:
        begun = time.perf_counter()
        store = fill(*args)
        filling[0] = time.perf_counter() - begun
        return store

    PortTrainer.training_step = timed_step
    running.filled_store = timed_fill
    job = Job(model, family, str(data), folder / "run", recipe, overwrite=True)
    running.finetune(job, quiet=True)
    return times, filling[0]


def compare(name: str, images: int, runs: int, steps: int, gpu: bool) -> Figures:
    """Run every trainer of a workload in turn and print medians and ratios."""
    workload = WORKLOADS[name]
    size = workload.full if gpu else workload.small
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(workload, size, folder)
        (folder / "data").mkdir()
        workload.draw(folder / "data", images, CAPTIONS)
        found: dict[str, list[dict[str, float]]] = {trainer: [] for trainer in TRAINERS}
        for _ in range(runs):
            for trainer in TRAINERS:
                options = ["--gpu"] if gpu else []
                command = [sys.executable, __file__, "--work", name, trainer, str(folder), "--steps", str(steps)]
                timing = timed([*command, *options])
                result = json.loads((folder / "result.json").read_text())
                found[trainer].append({"megabytes": timing.megabytes, "unique": timing.unique, **result})
                shutil.rmtree(folder / "run", ignore_errors=True)
    report(workload, size, images * CAPTIONS, found)
    rows = {
        trainer: [Timing(100 / each["rate"], each["megabytes"], each["unique"]) for each in results]
        for trainer, results in found.items()
    }
    return Figures.of(f"Training by {workload.recipe}", rows, "ours", "guide", unit="100 samples")


def report(workload: Workload, size: Size, samples: int, found: Mapping[str, list[dict[str, float]]]) -> None:
    """Print samples/s and peak memory of every trainer, and their ratios to the guide's loop."""
    median = {
        trainer: {key: statistics.median(each[key] for each in results) for key in results[0]}
        for trainer, results in found.items()
    }
    print(f"{workload.recipe} · {size.pixels} px · batches of {size.batch} · {CAPTIONS} answers an image")
    guide = median["guide"]
    for trainer, figures in median.items():
        print(
            f"  {trainer:<9} {figures['rate']:8.2f} samples/s ({figures['rate'] / guide['rate']:.2f} ×) · "
            f"{figures['megabytes']:6.0f} MB ({figures['megabytes'] / guide['megabytes']:.2f} ×)"
        )
    features = median["features"]
    seen = samples * workload.epochs
    filled = seen / (seen / features["rate"] + features["filling"])
    print(
        f"  filled    {filled:8.2f} samples/s ({filled / guide['rate']:.2f} ×) over {workload.epochs} epochs; "
        f"filling took {features['filling']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="full size on the first GPU")
    parser.add_argument("--images", type=int, help="pictures drawn, 10 samples each (24, on a GPU 400)")
    parser.add_argument("--steps", type=int, help="of each run (10, on a GPU 30)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=sorted(WORKLOADS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = arguments.steps or (30 if arguments.gpu else 10)
    if arguments.work:
        name, trainer, folder = arguments.work
        work(name, trainer, Path(folder), arguments.gpu, steps)
        return
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a GPU that torch sees")
    images = arguments.images or (400 if arguments.gpu else 24)
    where = torch.cuda.get_device_name() if arguments.gpu else f"{os.cpu_count()} cores"
    print(f"torch {torch.__version__} · {where}")
    figures = [
        compare(name, images, arguments.runs, steps, arguments.gpu)
        for name in WORKLOADS
        if arguments.only in (None, name)
    ]
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
