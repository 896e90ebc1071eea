#!/usr/bin/env python3
"""What training costs: port-finetune, without and with --cache-features, against the guides' own plain loops.

    python benchmarks/finetune.py                 small models with the proportions of the released ones, on the CPU
    python benchmarks/finetune.py --gpu           OFA-base at 256 px and Florence-2-base at 768 px, bfloat16
    python benchmarks/finetune.py --gpu --only florence2-full florence2 --batch 32 --trainers ours compiled
    python benchmarks/finetune.py --only ofa --trainers features grouped

Three workloads: OFA-CN's LiT-tuning (encoder, with its ResNet, and embeddings frozen) on 10 captions an image, and
Florence-2 on questions about documents, 10 an image, with vision tower and projector frozen (florence2) and whole
(florence2-full). Pictures are drawn here. Models are golden cases made larger, with random weights.

Trainers: the guide's loop, port-finetune (ours), with --cache-features (features), with --group-by-image besides
(grouped), and with --compile (compiled). --tiny runs the same code on the golden cases as they are, to see that it
runs.

Each trainer is a process of its own, in turn on the same files, `--runs` times. samples/s: of the steps after the
first WARM ones, start and filling left out. Memory: the peak of the process's private memory (RssAnon), on a GPU of
what torch allocated. TFLOP/s: the matrix products, convolutions and attention of a step, forward and backward, counted
by torch; their share is of what a large matrix product reaches here in the same dtype, and of the GPU's nominal peak
where that is known. "filled": samples/s over the epochs of the recipe when filling the features counts as well.

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
from dataclasses import dataclass, replace
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
TRAINERS = ("guide", "ours", "features", "grouped", "compiled")
FEATURES = ("features", "grouped")
NOMINAL = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
"""Dense bfloat16 operations a second by GPU, as its maker states them."""
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
    trainers: tuple[str, ...] = ("guide", "ours", "features")


@dataclass(frozen=True)
class Setting:
    """What is run: `scale` names a size; `batch` samples a step in place of the size's."""

    scale: str
    steps: int
    batch: int | None = None

    def size(self, workload: Workload) -> Size:
        """The model and its batches."""
        # The golden case as it is, where OFA's learned positions go up to 64 pixels.
        tiny = Size({}, 64, 2)
        chosen = {"small": workload.small, "full": workload.full, "tiny": tiny}[self.scale]
        return replace(chosen, batch=self.batch or chosen.batch)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is used."""
        return self.scale == "full" and torch.cuda.is_available()

    @property
    def mixed(self) -> bool:
        """Whether matrix products are in bfloat16."""
        return self.scale != "small"


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
WORKLOADS["florence2-full"] = replace(WORKLOADS["florence2"], freeze=(), trainers=("guide", "ours"))


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


def work(name: str, trainer: str, folder: Path, setting: Setting) -> None:
    """One trainer in this process; its figures go to `folder`/result.json."""
    workload = WORKLOADS[name]
    size = setting.size(workload)
    data = next(folder.glob("data/*.jsonl"))
    run = _by_hand if trainer == "guide" else _by_weightport
    times, filling, operations = run(workload, size, folder, data, trainer, setting)
    seconds = times[-1] - times[WARM - 1]
    result = {"rate": size.batch * (len(times) - WARM) / seconds, "filling": filling, "operations": operations}
    if setting.on_gpu:
        result["megabytes"] = torch.cuda.max_memory_allocated() / 1e6
    (folder / "result.json").write_text(json.dumps(result))


def reached(setting: Setting) -> float:
    """Operations a second of a large matrix product, in the dtype of training: the best of several."""
    device, dtype = ("cuda" if setting.on_gpu else "cpu"), (torch.bfloat16 if setting.mixed else torch.float32)
    width = {"full": 8192, "small": 1024, "tiny": 64}[setting.scale]
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        begun = time.perf_counter()
        product = left @ right
        product[0, 0].item()
        seconds.append(time.perf_counter() - begun)
    return 2 * width**3 / min(seconds)


def _by_hand(
    workload: Workload, size: Size, folder: Path, data: Path, trainer: str, setting: Setting
) -> tuple[list[float], float, int]:
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    from weightport.families.registry import registry
    from weightport.finetuning.recipes.settings import BatchSettings
    from weightport.finetuning.setup.model_loading import load_processor

    family = registry().of_directory(folder / "model").training
    processor = load_processor(folder / "model", family, BatchSettings(image_size=size.pixels))
    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    device = torch.device("cuda" if setting.on_gpu else "cpu")
    guide, steps = GUIDES[family.name], setting.steps
    loop = train(guide, model, processor, data, batch=size.batch, steps=steps, rate=workload.rate, device=device)
    return list(loop), 0.0, 0


def _by_weightport(
    workload: Workload, size: Size, folder: Path, data: Path, trainer: str, setting: Setting
) -> tuple[list[float], float, int]:
    from torch.utils.flop_counter import FlopCounterMode

    from weightport.families.registry import registry
    from weightport.finetuning.recipes.recipe import for_family, load_recipe, with_settings
    from weightport.finetuning.setup.preparing import Job
    from weightport.finetuning.training import run as running
    from weightport.finetuning.training.trainer import PortTrainer

    settings = {
        "batch.image_size": size.pixels, "model.freeze": list(workload.freeze),
        "model.cache_features": trainer in FEATURES, "batch.group_by_image": trainer == "grouped",
        "training.torch_compile": trainer == "compiled", "training.max_steps": setting.steps,
        "training.per_device_train_batch_size": size.batch, "training.dataloader_drop_last": True,
        "training.eval_strategy": "no", "training.save_strategy": "no", "training.use_cpu": not setting.on_gpu,
        "training.fp16": False, "training.bf16": setting.mixed,
    }  # fmt: skip
    model = folder / "model"
    recipe = load_recipe(workload.recipe)
    family = registry().of_directory(model).training
    recipe = with_settings(for_family(recipe, family.name), settings, "benchmark")
    times: list[float] = []
    filling = [0.0]
    step, fill = PortTrainer.training_step, running.filled_store

    operations = [0]

    def timed_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if times or trainer == "compiled":
            loss = step(self, *args, **kwargs)
        else:
            with FlopCounterMode(display=False) as counter:
                loss = step(self, *args, **kwargs)
            operations[0] = counter.get_total_flops()
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
    return times, filling[0], operations[0]


def compare(name: str, images: int, runs: int, setting: Setting, trainers: tuple[str, ...]) -> Figures:
    """Run every trainer of a workload in turn and print medians and ratios, to the first of them."""
    workload = WORKLOADS[name]
    size = setting.size(workload)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(workload, size, folder)
        (folder / "data").mkdir()
        workload.draw(folder / "data", images, CAPTIONS)
        found: dict[str, list[dict[str, float]]] = {trainer: [] for trainer in trainers}
        options = ["--steps", str(setting.steps), "--batch", str(size.batch)]
        options += {"full": ["--gpu"], "tiny": ["--tiny"], "small": []}[setting.scale]
        for _ in range(runs):
            for trainer in trainers:
                command = [sys.executable, __file__, "--work", name, trainer, str(folder)]
                timing = timed([*command, *options])
                result = json.loads((folder / "result.json").read_text())
                found[trainer].append({"megabytes": timing.megabytes, "unique": timing.unique, **result})
                shutil.rmtree(folder / "run", ignore_errors=True)
    report(workload, setting, images * CAPTIONS, found)
    rows = {
        trainer: [Timing(100 / each["rate"], each["megabytes"], each["unique"]) for each in results]
        for trainer, results in found.items()
    }
    return Figures.of(
        f"Training by {workload.recipe}, {frozen_in(workload)} frozen",
        rows,
        "ours" if "ours" in trainers else trainers[-1],
        trainers[0],
        unit="100 samples",
    )


def frozen_in(workload: Workload) -> str:
    return " and ".join(workload.freeze) or "nothing"


def report(workload: Workload, setting: Setting, samples: int, found: Mapping[str, list[dict[str, float]]]) -> None:
    """Print samples/s and peak memory of every trainer, and their ratios to the first."""
    size, peak = setting.size(workload), reached(setting)
    median = {
        trainer: {key: statistics.median(each[key] for each in results) for key in results[0]}
        for trainer, results in found.items()
    }
    frozen = frozen_in(workload)
    print(
        f"{workload.recipe} · {size.pixels} px · batches of {size.batch} · {CAPTIONS} answers an image · {frozen} "
        f"frozen · a matrix product reaches {peak / 1e12:.3g} TFLOP/s"
    )
    first = next(iter(median.values()))
    for trainer, figures in median.items():
        print(
            f"  {trainer:<9} {figures['rate']:8.2f} samples/s ({figures['rate'] / first['rate']:.2f} ×) · "
            f"{figures['megabytes']:6.0f} MB ({figures['megabytes'] / first['megabytes']:.2f} ×)"
            f"{_share(median, trainer, size, peak, setting)}"
        )
    for trainer in FEATURES:
        if trainer in median:
            features, seen = median[trainer], samples * workload.epochs
            filled = seen / (seen / features["rate"] + features["filling"])
            print(
                f"  filled    {filled:8.2f} samples/s ({filled / first['rate']:.2f} ×) over {workload.epochs} epochs "
                f"of {trainer}; filling took {features['filling']:.1f} s"
            )


def _share(median: Mapping[str, Mapping[str, float]], trainer: str, size: Size, peak: float, setting: Setting) -> str:
    """What a trainer makes of the machine: operations a second, and their share of the peak."""
    # What is compiled cannot be counted: it does what ours does.
    counted = median.get("ours" if trainer == "compiled" else trainer, {}).get("operations", 0)
    if not counted:
        return ""
    rate = counted / size.batch * median[trainer]["rate"]
    shares = [f"{rate / peak:.1%} of what a matrix product reaches"]
    name = torch.cuda.get_device_name() if setting.on_gpu else ""
    shares += [f"{rate / nominal:.0%} of {nominal / 1e12:.0f}" for gpu, nominal in NOMINAL.items() if gpu in name][:1]
    return f" · {rate / 1e12:.3g} TFLOP/s ({', '.join(shares)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="full size on the first GPU")
    parser.add_argument("--tiny", action="store_true", help="golden cases as they are, to see that everything runs")
    parser.add_argument("--images", type=int, help="pictures drawn, 10 samples each (24, on a GPU 400)")
    parser.add_argument("--steps", type=int, help="of each run (10, on a GPU 30)")
    parser.add_argument("--batch", type=int, help="samples of a step, in place of the guide's")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, help="in place of the workload's")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale = "full" if arguments.gpu else "tiny" if arguments.tiny else "small"
    steps = arguments.steps or {"full": 30, "small": 10, "tiny": WARM + 2}[scale]
    setting = Setting(scale, steps, arguments.batch)
    if arguments.work:
        name, trainer, folder = arguments.work
        work(name, trainer, Path(folder), setting)
        return
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a GPU that torch sees")
    images = arguments.images or {"full": 400, "small": 24, "tiny": 2}[scale]
    where = torch.cuda.get_device_name() if setting.on_gpu else f"{os.cpu_count()} cores"
    print(f"torch {torch.__version__} · {where}")
    figures = [
        compare(name, images, arguments.runs, setting, tuple(arguments.trainers or WORKLOADS[name].trainers))
        for name in arguments.only
    ]
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
