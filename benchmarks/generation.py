#!/usr/bin/env python3
"""What generating costs: OFA with beam search against transformers' own generate of BART in the same shape.

    python benchmarks/generation.py                      OFA-base, 5 beams, 480 pixels, 1 and 8 pictures
    python benchmarks/generation.py --tiny               a tiny model, to try
    python benchmarks/generation.py --against FOLDER     an earlier state of this package, in place of BART

One run makes a model of random weights and a picture, then times generations of both in turn, each in a process of
its own that is told when, so that a slow moment of the machine hits both; it prints medians and ratios. BART encodes a
text of as many tokens as OFA has patches and text, and both generate the same number of tokens; OFA also runs its
image tower, which is timed alone too. Against an earlier state the generated ids must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from processes import Figures, Timing, save

ROOT = Path(__file__).resolve().parents[1]
BASE: Mapping[str, Any] = {
    "width": 768, "layers": 6, "heads": 12, "inner": 3072, "vocabulary": 59457, "pixels": 480, "text": 8, "tokens": 16,
    "vision": {
        "model_type": "resnet", "embedding_size": 64, "hidden_sizes": [256, 512, 1024], "depths": [3, 4, 23],
        "layer_type": "bottleneck",
    },
}  # fmt: skip
TINY: Mapping[str, Any] = {
    **BASE, "width": 32, "layers": 1, "heads": 2, "inner": 32, "vocabulary": 100, "pixels": 32, "tokens": 4,
    "vision": {**BASE["vision"], "embedding_size": 8, "hidden_sizes": [8, 8, 8], "depths": [1, 1, 1]},
}  # fmt: skip


def text_sizes(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of an encoder and a decoder, as OFA's configuration and BART's name them."""
    sides = ("encoder", "decoder")
    each = {"layers": "layers", "attention_heads": "heads", "ffn_dim": "inner"}
    sizes = {f"{side}_{name}": shape[own] for side in sides for name, own in each.items()}
    return {"vocab_size": shape["vocabulary"], "d_model": shape["width"], **sizes}


def ofa(shape: Mapping[str, Any], beams: int, pictures: int) -> Any:
    """A function that generates once and returns the ids."""
    import torch

    from weightport.modeling.ofa.configuration_ofa import OFAConfig
    from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration

    torch.manual_seed(0)
    config = OFAConfig(**text_sizes(shape), vision_config=shape["vision"])
    model = OFAForConditionalGeneration(config).eval()
    _spread(model)
    inputs = {
        "input_ids": torch.randint(4, shape["vocabulary"], (pictures, shape["text"])),
        "pixel_values": torch.randn(pictures, 3, shape["pixels"], shape["pixels"]),
    }
    settings = {"num_beams": beams, "max_new_tokens": shape["tokens"], "min_new_tokens": shape["tokens"]}
    return lambda: model.generate(**inputs, **settings)


def tower(shape: Mapping[str, Any], beams: int, pictures: int) -> Any:
    """The image tower alone, that of OFA."""
    import torch

    from weightport.modeling.ofa.configuration_ofa import OFAConfig
    from weightport.modeling.ofa.vision_ofa import build_vision_tower

    torch.manual_seed(0)
    model = build_vision_tower(OFAConfig(vision_config=shape["vision"])).eval()
    pixels = torch.randn(pictures, 3, shape["pixels"], shape["pixels"])
    return lambda: model(pixels).last_hidden_state[:, 0, 0, :1].long()


def bart(shape: Mapping[str, Any], beams: int, pictures: int) -> Any:
    """As `ofa`, of BART, whose source has as many tokens as OFA's has patches and text."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    source = (shape["pixels"] // 16) ** 2 + shape["text"]
    config = BartConfig(**text_sizes(shape), max_position_embeddings=source + 8, forced_eos_token_id=None)
    model = BartForConditionalGeneration(config).eval()
    _spread(model)
    ids = torch.randint(4, shape["vocabulary"], (pictures, source))
    settings = {"num_beams": beams, "max_new_tokens": shape["tokens"], "min_new_tokens": shape["tokens"]}
    return lambda: model.generate(input_ids=ids, **settings)


def _spread(model: Any) -> None:
    """Weights whose choices differ clearly, so that rounding decides no token."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_tower" not in name:
                parameter.mul_(2)


CLOCKS = {"wall": "perf_counter", "processor": "process_time"}
SUBJECTS = {"ofa": ofa, "tower": tower, "bart": bart}


def serve(subject: str, shape: Mapping[str, Any], beams: int, pictures: int, threads: int, clock: str) -> None:
    """Generate once for every line of standard input; answer seconds and ids."""
    import time

    import torch

    torch.set_num_threads(threads)
    now = getattr(time, CLOCKS[clock])
    with torch.no_grad():
        generate = SUBJECTS[subject](shape, beams, pictures)
        generate()
        print("ready", flush=True)
        for _ in sys.stdin:
            begun = now()
            ids = generate()
            print(json.dumps({"seconds": now() - begun, "ids": ids.tolist()}), flush=True)


class Generator:
    """A process that generates when it is told to."""

    def __init__(self, subject: str, package: Path, options: Mapping[str, Any]) -> None:
        command = [sys.executable, __file__, "--serve", subject]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value)) if value is not True]
        command += [f"--{name}" for name, value in options.items() if value is True]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(package)},
        )
        self.seconds: list[float] = []
        self.ids: list[list[int]] = []
        self._answer()

    def once(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = json.loads(self._answer())
        self.seconds.append(answer["seconds"])
        self.ids = answer["ids"]

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a generation ended with status {self.process.wait()}")
        return line

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(arguments: argparse.Namespace, pictures: int) -> dict[str, Any]:
    """Medians of alternating generations of `pictures` pictures."""
    options = {"beams": arguments.beams, "pictures": pictures, "threads": arguments.threads, "clock": arguments.clock}
    options |= {"tiny": True} if arguments.tiny else {}
    earlier = arguments.against
    peer = ("ofa", earlier) if earlier else ("bart", ROOT)
    with Generator("ofa", ROOT, options) as ours, Generator(*peer, options) as other:
        subjects = {"ofa": ours, "earlier" if earlier else "bart": other}
        for _ in range(arguments.runs):
            for generator in subjects.values():
                generator.once()
        if earlier and ours.ids != other.ids:
            raise SystemExit("the two states generate different ids")
    with Generator("tower", ROOT, options) as images:
        for _ in range(arguments.runs):
            images.once()
    found = {name: statistics.median(generator.seconds) for name, generator in subjects.items()}
    return {"pictures": pictures, **found, "tower": statistics.median(images.seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="an earlier state of this package (the folder that holds it)")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--pictures", type=int, action="append", help="pictures at a time; may be given again")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: beside other work, with --threads 1"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--serve", choices=SUBJECTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        shape = TINY if arguments.tiny else BASE
        serve(arguments.serve, shape, arguments.beams, arguments.pictures[0], arguments.threads, arguments.clock)
        return
    rows = [compare(arguments, pictures) for pictures in arguments.pictures or (1, 8)]
    for row in rows:
        other = "earlier" if arguments.against else "bart"
        print(
            f"{row['pictures']} pictures, {arguments.beams} beams: OFA {row['ofa']:.2f} s ({row['tower']:.2f} of them "
            f"its image tower) · {other} {row[other]:.2f} s · {row[other] / row['ofa']:.2f} × as fast"
        )
    peer = "earlier" if arguments.against else "bart"
    figures = [
        Figures(
            f"Generating for {row['pictures']} pictures, {arguments.beams} beams",
            "ofa",
            peer,
            {name: Timing(row[name], 0.0) for name in ("ofa", peer, "tower")},
        )
        for row in rows
    ]
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
