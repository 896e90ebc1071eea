#!/usr/bin/env python3
"""What reading training data costs: pictures and captions in MUGE's files, against the published guide's own reader.

    python benchmarks/reading_data.py                    400 pictures of 640 × 480, 10 captions each
    python benchmarks/reading_data.py --images 8         a few, to try

Whole processes in turn: both open the files, decode every sample's picture once and end. The guide's keeps the whole
table of pictures in memory; ours knows where each picture stands, and has checked every line first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from processes import Figures, alternate, save

OURS, PEER = "weightport's reader", "the guide's reader"


def read_ours(captions: Path, every: int) -> int:
    from weightport.finetuning.data.opening import open_data
    from weightport.finetuning.data.settings import DataSettings

    samples = open_data(captions, DataSettings())
    pictures = 0
    for place in range(0, len(samples), every):
        sample = samples[place]
        assert sample.picture is not None
        pictures += sample.picture.read().width > 0
    return pictures


def read_as_the_guide(captions: Path, every: int) -> int:
    import base64
    from io import BytesIO

    from guide_loops import MugeCaptions
    from PIL import Image

    pairs = MugeCaptions(captions)
    pictures = 0
    for place in range(0, len(pairs), every):
        encoded, _ = pairs[place]
        pictures += Image.open(BytesIO(base64.urlsafe_b64decode(encoded))).convert("RGB").width > 0
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--captions", type=int, default=10, help="of each picture")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--read", nargs=3, metavar=("WHO", "FILE", "EVERY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        who, file, every = arguments.read
        {"ours": read_ours, "guide": read_as_the_guide}[who](Path(file), int(every))
        return
    from finetune import draw_captions

    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        file = draw_captions(Path(place), arguments.images, arguments.captions)
        command = [sys.executable, __file__, "--read"]
        # One caption of each picture: every picture is decoded once.
        rest = [str(file), str(arguments.captions)]
        timings = alternate(
            {
                OURS: [*command, "ours", *rest],
                PEER: [*command, "guide", *rest],
                "imports": [sys.executable, "-c", "import torch, PIL.Image, weightport.finetuning.data.opening"],
            },
            arguments.runs,
        )
    figures = Figures.of(f"Reading {arguments.images} pictures", timings, OURS, PEER, start="imports")
    for name, row in figures.rows.items():
        print(f"{name:<20} {row.seconds:7.2f} s · {row.megabytes:6.0f} MB private · {row.unique:6.0f} MB USS")
    save(arguments.json, [figures])


if __name__ == "__main__":
    main()
