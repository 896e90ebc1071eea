#!/usr/bin/env python3
"""What data loading costs beside the model: reading, decoding, resizing and collating JPEGs, against a training step.

    python benchmarks/data_loading.py                     drawn JPEGs of 3264 × 2448, resized to 768 px
    python benchmarks/data_loading.py --images DIR        your own JPEGs
    python benchmarks/data_loading.py --size 768 --step-ms 120    against a step measured elsewhere

One process and one thread, as a data loader's worker is. Stages, in milliseconds of processor time a picture (median):
read (the file's bytes), decode (to RGB), prepare (the processor's resizing and normalising, with the prompt's tokens),
and the collator as a run calls it. "draft" is `data.draft`: a JPEG decoded at the smallest of 1, 1/2, 1/4 and 1/8 of
its size whose sides still have that many pixels. Its difference is of the processor's output (pixels resized to
--size), in levels of 255: mean, 99th percentile and largest.

workers: how many processes keep up with `--step-ms` for a batch of `--batch`. Without it, the step of a Florence-2 of
the released model's proportions at small width is measured here, which a GPU outruns many times over.

What to expect: decoding is most of it, and grows with the picture's own pixels, not with --size. Figures and the
machine they are from: docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
CASE = "florence2/tiny-vocab-4k"


def draw_photograph(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG with soft areas, edges and grain, as a camera's have: noise on three scales, shapes, quality 90."""
    generator = np.random.default_rng(number)
    width, height = size
    layers = [(64, 90.0), (8, 30.0), (1, 8.0)]
    canvas = np.full((height, width, 3), 128.0)
    for scale, strength in layers:
        small = generator.normal(0, strength, (height // scale + 1, width // scale + 1, 3)).clip(-127, 127) + 128
        layer = Image.fromarray(small.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        canvas += np.asarray(layer, dtype=np.float64) - 128
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for each in range(12):
        x, y = (int(value) for value in generator.integers(0, min(size) - 80, 2))
        pen.ellipse((x, y, x + 60 + each * 9, y + 80), outline=(each * 20, 255 - each * 20, 90), width=3)
        pen.text((y, x), f"line {each} of {number}", fill="black", font_size=28)
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_data(folder: Path, files: Sequence[Path]) -> Path:
    """JSON lines of one question about each picture."""
    rows = [
        {"image": file.name, "prefix": "<VQA>what is in line 7?", "suffix": f"{n:05}"} for n, file in enumerate(files)
    ]
    path = folder / "annotations.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), ""]), "utf-8")
    return path


def milliseconds(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Median processor time over the items, each once, the first one left out: it warms up."""
    found = []
    for item in items:
        begun = time.process_time()
        work(item)
        found.append(1000 * (time.process_time() - begun))
    return statistics.median(found[1:] or found)


def level_differences(exact: torch.Tensor, draft: torch.Tensor, deviation: torch.Tensor) -> dict[str, float]:
    """Of two outputs of a processor, [3, size, size] each, in levels of 255."""
    levels = ((exact - draft).abs() * deviation[:, None, None] * 255).flatten()
    at = max(1, round(0.99 * levels.numel()))
    return {"mean": float(levels.mean()), "p99": float(levels.kthvalue(at).values), "most": float(levels.max())}


def resized(processor: Any, picture: Image.Image) -> torch.Tensor:
    """What the model is given of a picture: float32 [3, size, size]."""
    return torch.as_tensor(processor.image_processor(picture, return_tensors="pt")["pixel_values"][0])


def measure(folder: Path, size: int, count: int, source: Path | None, pixels: tuple[int, int]) -> dict[str, Any]:
    """All stages, without and with draft decoding."""
    sys.path[:0] = [str(ROOT / "tests" / "finetuning"), str(ROOT / "tests" / "golden")]
    from tiny_runs import convert_case
    from transformers import AutoConfig

    from weightport.families.registry import registry
    from weightport.finetuning.data import DataSettings, open_data
    from weightport.finetuning.data.collation import BadSamples, Collator, Indexed
    from weightport.finetuning.recipes.settings import BatchSettings
    from weightport.finetuning.setup.model_loading import load_processor

    data = source or folder / "pictures"
    if source is None:
        data.mkdir()
        for number in range(count):
            (data / f"{number:05}.jpg").write_bytes(draw_photograph(number, pixels))
    files = sorted(each for each in data.iterdir() if each.suffix.lower() in (".jpg", ".jpeg"))[:count]
    if len(files) < 2:
        raise SystemExit(f"{data}: at least two *.jpg were expected, found {len(files)}.")
    samples = open_data(write_data(folder, files), DataSettings(images=(str(data),)))
    model = convert_case(CASE, folder)
    family = registry().training_of(model)
    batch = BatchSettings(prompt="{prefix}", max_target_length=16)
    processor = load_processor(model, family, batch)
    config = AutoConfig.from_pretrained(model)
    # The positions of a tiny model end below 768 px; what a processor costs does not depend on the model.
    processor.image_processor.size = {"height": size, "width": size}
    deviation = torch.tensor(processor.image_processor.image_std)
    indexed = Indexed(samples)
    items = [indexed[index] for index in range(len(samples))]
    pictures = [sample.picture for _, sample in items if not isinstance(sample, str) and sample.picture]
    contents = [file.read_bytes() for file in files]
    decoded = [picture.read() for picture in pictures[: min(8, len(pictures))]]

    found: dict[str, Any] = {
        "pictures": len(files),
        "own pixels": sorted({picture.size for picture in decoded})[:3],
        "bytes": round(statistics.mean(map(len, contents))),
        "ms read": milliseconds(lambda picture: picture.load(), pictures),
        "ms prepare": milliseconds(lambda picture: resized(processor, picture), decoded),
    }
    for name, draft in (("exact", None), ("draft", size)):
        collator = Collator(family, processor, config, batch, BadSamples(samples, 0), draft=draft)
        found[f"ms decode {name}"] = milliseconds(lambda picture, draft=draft: picture.read(draft), pictures)
        found[f"ms collate {name}"] = milliseconds(lambda item, collator=collator: collator([item]), items)
    differences = [
        level_differences(resized(processor, picture.read()), resized(processor, picture.read(size)), deviation)
        for picture in pictures[:16]
    ]
    found["draft difference"] = {
        "mean": statistics.mean(each["mean"] for each in differences),
        "p99": statistics.mean(each["p99"] for each in differences),
        "most": max(each["most"] for each in differences),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEGs, by default drawn ones")
    parser.add_argument("--count", type=int, default=16, help="pictures")
    parser.add_argument("--pixels", type=int, nargs=2, default=(3264, 2448), metavar=("W", "H"), help="of drawn ones")
    parser.add_argument("--size", type=int, default=768, help="pixels that they are resized to")
    parser.add_argument("--step-ms", type=float, help="milliseconds of a step on a batch, measured elsewhere")
    parser.add_argument("--batch", type=int, default=16, help="samples of such a step")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.size, arguments.count, arguments.images, tuple(arguments.pixels))
    for name in ("exact", "draft"):
        found[f"samples/s a worker {name}"] = 1000 / found[f"ms collate {name}"]
        if arguments.step_ms:
            needed = arguments.batch * found[f"ms collate {name}"] / arguments.step_ms
            found[f"workers {name}"] = needed
    if arguments.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        shown = f"{value:.2f}" if isinstance(value, float) else value
        if isinstance(value, dict):
            shown = " · ".join(f"{name} {each:.2f}" for name, each in value.items())
        print(f"{key:<26} {shown}")


if __name__ == "__main__":
    main()
