#!/usr/bin/env python3
"""What the everyday commands cost beside what a person would do without them.

    python benchmarks/everyday.py                      import, inspect, extraction, verification, parity
    python benchmarks/everyday.py --only extraction --tiny

import: `import weightport` and `weightport --help` against `import torch`. inspect: against torch.load of the same
file. extraction: `weightport extract-lora` of a merged model against the singular value decomposition of every whole
difference, as scripts have it. verification: `weightport verify` against `sha256sum` of the same files. parity:
`port-parity` of a small model against loading the model and one pass of it. Whole processes in turn, medians.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from processes import Figures, alternate, save

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from weightport.cli import main; main()"]
START = [sys.executable, "-c", "import torch"]

LOADED = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
print(sum(tensor.numel() for tensor in state.values()))
"""
DECOMPOSED = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
base, tuned, out, rank = *map(Path, sys.argv[1:4]), int(sys.argv[4])
before, after, pairs = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors"), {}
for name in before:
    change = after[name].float() - before[name].float()
    if change.ndim == 2 and change.any():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        pairs[f"{name}.lora_B"] = (u[:, :rank] * s[:rank]).contiguous()
        pairs[f"{name}.lora_A"] = v[:rank].contiguous()
out.mkdir()
save_file(pairs, out / "adapter_model.safetensors")
"""
ONE_PASS = """
import sys, torch, weightport.modeling
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
side = 2 * 16
with torch.no_grad():
    model(input_ids=torch.tensor([[0, 5, 2]]), pixel_values=torch.zeros(1, 3, side, side),
          decoder_input_ids=torch.tensor([[0, 5]]))
"""


def importing(folder: Path, arguments: argparse.Namespace) -> list[Figures]:
    """The package alone, and the first answer of the command line."""
    commands = {
        "import weightport": [sys.executable, "-c", "import weightport"],
        "weightport --help": [*COMMAND, "--help"],
        "import torch": START,
        "interpreter": [sys.executable, "-c", "pass"],
    }
    timings = alternate(commands, arguments.runs)
    return [
        Figures.of("Importing the package", timings, "import weightport", "import torch", start="interpreter"),
        Figures.of("The first answer", timings, "weightport --help", "import torch", start="interpreter"),
    ]


def inspecting(folder: Path, arguments: argparse.Namespace) -> list[Figures]:
    """A torch file of float32."""
    import torch

    count, side = (4, 64) if arguments.tiny else (64, 2816)
    file = folder / "model.pt"
    torch.save({f"layers.{number}.weight": torch.rand(side, side) for number in range(count)}, file)
    size = file.stat().st_size
    commands = {
        "weightport inspect": [*COMMAND, "inspect", str(file)],
        "torch.load": [sys.executable, "-c", LOADED, str(file)],
        "interpreter": [sys.executable, "-c", "pass"],
    }
    title = f"Inspecting a torch file of {size / 1e9:.1f} GB"
    timings = alternate(commands, arguments.runs)
    return [Figures.of(title, timings, "weightport inspect", "torch.load", start="interpreter")]


def _merged(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """A base, and the same with an adapter merged into it."""
    from merge import TINY, WIDE, write_adapter, write_model

    from weightport.api import merge_lora

    shape = TINY if arguments.tiny else WIDE
    layers = write_model(folder / "base", 1e6 if arguments.tiny else 4e8, shape)
    write_adapter(folder / "adapter", layers, shape)
    merge_lora(folder / "base", [(folder / "adapter", 1.0)], folder / "tuned")
    return folder / "base", folder / "tuned"


def extracting(folder: Path, arguments: argparse.Namespace) -> list[Figures]:
    base, tuned = _merged(folder, arguments)
    out = folder / "out"
    size = (base / "model.safetensors").stat().st_size
    commands = {
        "extract-lora": [*COMMAND, "extract-lora", str(tuned), str(base), str(out), "--rank", "16", "-q"],
        "whole decompositions": [sys.executable, "-c", DECOMPOSED, str(base), str(tuned), str(out), "16"],
        "import torch": START,
    }
    timings = alternate(commands, arguments.runs, lambda: shutil.rmtree(out, ignore_errors=True))
    title = f"Extracting a LoRA from {size / 1e9:.1f} GB"
    return [Figures.of(title, timings, "extract-lora", "whole decompositions", start="import torch")]


def verifying(folder: Path, arguments: argparse.Namespace) -> list[Figures]:
    _, tuned = _merged(folder, arguments)
    size = (tuned / "model.safetensors").stat().st_size
    commands = {
        "weightport verify": [*COMMAND, "verify", str(tuned)],
        "sha256sum": ["sha256sum", str(tuned / "model.safetensors")],
        "import torch": START,
    }
    timings = alternate(commands, arguments.runs)
    title = f"Verifying a directory of {size / 1e9:.1f} GB"
    return [Figures.of(title, timings, "weightport verify", "sha256sum", start="import torch")]


def parity(folder: Path, arguments: argparse.Namespace) -> list[Figures]:
    """The repository's own case of OFA-CN."""
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    import ofa_cases
    from golden_case import Case

    from weightport.api import convert

    place = ROOT / "tests" / "golden" / "cases" / "ofa" / "cn-tiny"
    case = Case(place, "ofa/cn-tiny")
    convert(case.materialize(folder / "original"), folder / "model", case.family)
    reference = ofa_cases.write_case(case, folder / "reference.safetensors")
    commands = {
        "port-parity": [
            sys.executable, "-c", "from weightport.cli import port_parity; port_parity()", str(folder / "model"),
            "--reference", str(reference), "-q",
        ],
        "load, one pass": [sys.executable, "-c", ONE_PASS, str(folder / "model")],
    }  # fmt: skip
    timings = alternate(commands, arguments.runs)
    return [Figures.of("Parity of a tiny OFA-CN", timings, "port-parity", "load, one pass")]


WORK: Mapping[str, Callable[[Path, argparse.Namespace], list[Figures]]] = {
    "import": importing, "inspect": inspecting, "extraction": extracting, "verification": verifying, "parity": parity,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(WORK))
    parser.add_argument("--tiny", action="store_true", help="small files, to try")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = []
    for name, work in WORK.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
                figures += work(Path(place), arguments)
    for each in figures:
        print(each.title)
        for name, row in each.rows.items():
            print(f"  {name:<22} {row.seconds:7.2f} s · {row.megabytes:6.0f} MB private · {row.unique:6.0f} MB USS")
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
