#!/usr/bin/env python3
"""The main job in a minute: a fairseq training checkpoint becomes a proven native model, speaks, goes back, is
fine-tuned, merged and made ready for release.

The checkpoint is a golden case of the tests: every option of the released OFA-CN models on, small, with weights that
are a formula of each tensor's name. Its file (optimizer state included) is what OFA's own trainer wrote, byte for
byte, and its reference is what OFA's own code computed on it. Untrained weights make the caption noise, not the proof.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "golden"))

FOLDER = Path("demo")
CASE = ROOT / "tests" / "golden" / "cases" / "ofa" / "cn-tiny"
RECIPE = Path(os.path.relpath(ROOT / "examples" / "tiny-caption.yaml"))


def main() -> None:
    """Run every step, each command shown before its output; ends with the first one that fails."""
    checkpoint = prepare()
    out, back = FOLDER / "out", FOLDER / "back.pt"
    run("weightport", "inspect", checkpoint)
    run("port-ofa", checkpoint, out, "--overwrite")
    reports = ("--json", out / "parity.json", "--report", FOLDER / "parity.html")
    run("port-parity", out, "--reference", FOLDER / "reference.safetensors", *reports, "--overwrite")
    photograph(FOLDER / "parity.html", FOLDER / "parity.png")
    run("weightport", "generate", out, FOLDER / "picture.png", "--beams", "3", "--max-new-tokens", "12")
    run("weightport", "export", out, back, "--overwrite")
    compare(checkpoint, back)
    captions, tuned, merged = FOLDER / "captions", FOLDER / "run", FOLDER / "merged"
    learned, recipe = captions / "train.jsonl", ("--recipe", RECIPE)
    draw_captions(captions)
    run("port-finetune", out, "--data", learned, "--eval-data", learned, "--output", tuned, *recipe, "--overwrite")
    run("port-merge-lora", out, tuned / "adapter", merged, "--overwrite")
    run("weightport", "evaluate", merged, "--data", learned, *recipe)
    run("port-release", merged, "--repo", "somebody/ofa-tiny-captions", "--dry-run")


def prepare() -> Path:
    """Write the original's checkpoint, its reference and a picture into FOLDER; returns the checkpoint."""
    import golden
    import ofa_cases
    from golden_case import Case
    from PIL import Image, ImageDraw

    FOLDER.mkdir(exist_ok=True)
    checkpoint = golden.materialize(CASE, FOLDER)
    ofa_cases.write_case(Case(CASE, "cn-tiny"), FOLDER / "reference.safetensors")
    picture = Image.new("RGB", (320, 240), "skyblue")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 170, 320, 240), fill="darkgreen")
    draw.ellipse((110, 70, 210, 170), fill="firebrick")
    picture.save(FOLDER / "picture.png")
    print(f"{checkpoint}: OFA-CN in miniature, as OFA's own trainer wrote it ({checkpoint.stat().st_size:,} bytes)\n")
    return checkpoint


def draw_captions(folder: Path) -> None:
    """Four pictures with two captions each, in MUGE's layout: train.jsonl, and train.tsv with the images."""
    import base64
    import json
    from io import BytesIO

    from PIL import Image, ImageDraw

    scenes = (
        ("white", "firebrick", "ellipse", ["大红苹果", "桌上的红苹果"]),
        ("seagreen", "snow", "rectangle", ["白猫坐在地上", "白猫看着花"]),
        ("gray", "black", "rectangle", ["黑狗跑在街道上", "店铺前的黑狗"]),
        ("khaki", "royalblue", "ellipse", ["蓝车在山前", "山前的蓝车"]),
    )
    folder.mkdir(exist_ok=True)
    with (folder / "train.jsonl").open("w") as captions, (folder / "train.tsv").open("w") as images:
        for i, (ground, colour, shape, texts) in enumerate(scenes):
            picture, encoded = Image.new("RGB", (160, 120), ground), BytesIO()
            getattr(ImageDraw.Draw(picture), shape)((20 + 20 * i, 30, 90 + 20 * i, 100), fill=colour)
            picture.save(encoded, "PNG")
            images.write(f"{i}\t{base64.b64encode(encoded.getvalue()).decode()}\n")
            captions.write(json.dumps({"image_id": i, "text": texts}, ensure_ascii=False) + "\n")
    print(f"{folder}: four pictures with two captions each, in MUGE's layout\n")


def run(program: str, *arguments: str | Path) -> None:
    """Print the command as a user types it, then run it."""
    print("$", program, *arguments, flush=True)
    command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
    done = subprocess.run(command, check=False)
    print(flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def photograph(page: Path, picture: Path) -> None:
    """A picture of the report, where Chromium is installed: docs/parity.png was made so."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"open {page} in a browser to see the report (with Chromium installed, its picture is made here)\n")
        return
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")
    size = ("--window-size=1100,1000", f"--screenshot={picture.resolve()}")
    subprocess.run([browser, *quiet, *size, page.resolve().as_uri()], check=False, capture_output=True, timeout=60)
    print(f"{page} · {picture}\n")


def compare(checkpoint: Path, back: Path) -> None:
    """Every tensor of the exported checkpoint against the original's, bit for bit; exits with 1 when one differs."""
    from weightport.checkpoints import open_checkpoint
    from weightport.checkpoints.lazy_tensors import same_bits

    original, exported = (open_checkpoint(path).section("model") for path in (checkpoint, back))
    different = [
        name
        for name in {**original, **exported}
        if name not in original or name not in exported or not same_bits(original[name].read(), exported[name].read())
    ]
    if different:
        sys.exit(f"{len(different)} tensors differ after the way back: {', '.join(different[:5])}")
    print(f"all {len(original)} tensors of {back} equal the original's, bit for bit")


if __name__ == "__main__":
    main()
