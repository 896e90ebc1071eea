"""peft's own custom models through our merge: `python tests/peft_suite/run.py [words of a row's name]`.

The rows are `TEST_CASES` of `test_custom_models.py` in the source distribution of the installed peft (pip's index has
to be reachable the first time; later runs find them in .cache), those of LoRA and of the other methods that we merge.
Of each row peft makes an adapter with random weights; our merge, in float32, float16 and bfloat16, is compared with
peft's own in float64. A row that is not merged must be refused with the reason that stands here. Ends with 1 when a
row is neither.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# peft transforms in float32 whatever the model's dtype, so of float32 weights it is the less exact one.
OF_SIXTEEN_BITS = ("FOURIERFT",)
NEAREST = 0.55
"""Roundings: half of one is what rounding to the nearest costs."""

# What no merge gives, by what the error says: rows by their names and settings, from the start.
REFUSED: tuple[tuple[str, str], ...] = (
    (r".*with KaSA", r"subtracts a part of the base's singular values"),
    (r".*Monteclora", r"draws its weights at random"),
    (r"(?i)(?!.*'save_indices': True).*uni-?lora", r"save_indices is false"),
    (r"Conv2d Groups2? LoRA", r"a dense convolution .* beside one in groups"),
)
# What peft's test modules take from others that need more packages than peft: never called here.
STAND_INS: Mapping[str, tuple[str, ...]] = {
    "testing_common": ("PeftCommonTester", "_skip_if_merging_not_supported"),
    "testing_utils": ("get_state_dict", "hub_online_once", "require_non_cpu", "set_init_weights_false"),
}


def fetch_rows(release: str) -> types.ModuleType:
    """peft's module of custom models, of this release; fetched unless it is there."""
    folder = CACHE / f"peft-{release}-tests"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            print(f"fetching the source distribution of peft {release}", flush=True)
            download = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch]
            subprocess.run([sys.executable, "-m", "pip", *download, f"peft=={release}"], check=True)
            (archive,) = Path(scratch).glob("peft-*.tar.gz")
            unpacked = Path(scratch) / "unpacked"
            name = archive.name.removesuffix(".tar.gz") + "/tests/test_custom_models.py"
            with tarfile.open(archive) as source:
                source.extract(name, scratch, filter="data")
            (unpacked / "peft_rows").mkdir(parents=True)
            (unpacked / "peft_rows" / "__init__.py").touch()
            (Path(scratch) / name).rename(unpacked / "peft_rows" / "test_custom_models.py")
            unpacked.rename(folder)
    sys.path.insert(0, str(folder))
    for module, names in STAND_INS.items():
        stand_in = types.ModuleType(f"peft_rows.{module}")
        for each in names:
            setattr(stand_in, each, type(each, (), {"__init__": lambda self, *arguments: None}))
        sys.modules[stand_in.__name__] = stand_in
    return importlib.import_module("peft_rows.test_custom_models")


def write_base(model: torch.nn.Module, folder: Path) -> Path:
    """The model's weights as a directory, of an architecture that transformers does not know."""
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": [type(model).__name__], "model_type": "custom"}))
    return folder


def write_adapter(model: torch.nn.Module, config: Any, folder: Path) -> Path:
    """An adapter as peft saves it, all of whose weights are random."""
    from peft import get_peft_model

    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tuned.save_pretrained(folder)
    return folder


def distance(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], dtype: torch.dtype) -> float:
    """The largest distance in roundings of `dtype`; infinite where names or shapes differ."""
    if {n: v.shape for n, v in found.items()} != {n: v.shape for n, v in expected.items()}:
        return float("inf")
    furthest = 0.0
    for name, reference in expected.items():
        if reference.is_floating_point():
            step = torch.finfo(dtype).eps * reference.abs().clamp(min=float(reference.abs().mean()) + 1e-30)
            furthest = max(furthest, float(((found[name].double() - reference).abs() / step).max()))
    return furthest


def run(rows: types.ModuleType, model_id: str, config: Any, dtype: torch.dtype, folder: Path) -> float:
    """The distance of our merge of one row from peft's."""
    from peft import PeftModel

    from weightport.adapters.merging.merge import merge_lora
    from weightport.families.registry import registry

    def model() -> Any:
        torch.manual_seed(0)
        made = rows.MockTransformerWrapper.from_pretrained(model_id)
        # As stored: the adapter is made and merged on the rounded weights.
        return made.to(dtype).float()

    base = write_base(model().to(dtype), folder / "base")
    adapter = write_adapter(model(), config, folder / "adapter")
    out = merge_lora(base, [(adapter, 1.0)], folder / "out", registry()).directory
    tuned = PeftModel.from_pretrained(model(), adapter, autocast_adapter_dtype=False).double()
    expected = tuned.merge_and_unload().state_dict()
    return distance(load_file(out / "model.safetensors"), expected, dtype)


def main(words: list[str]) -> int:
    from weightport.adapters.reading.additive_tensors import METHODS

    warnings.simplefilter("ignore")
    rows = fetch_rows(version("peft"))
    wrong = merged = refused = 0
    furthest = 0.0
    for name, model_id, config_class, settings in rows.TEST_CASES:
        kind = config_class.__name__.removesuffix("Config").upper()
        if not all(word in name for word in words) or kind not in ("LORA", *METHODS):
            continue
        said = next((reason for pattern, reason in REFUSED if re.match(pattern, f"{name} {settings}")), None)
        found = []
        dtypes = DTYPES[1:] if kind in OF_SIXTEEN_BITS else DTYPES
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found.append(run(rows, model_id, config_class(**settings), dtype, Path(folder)))
                except Exception as error:  # whatever peft or the merge raise is the row's result
                    text = f"{type(error).__name__}: {error}"
                    found.append(text if said is None or not re.search(said, text) else None)
        numbers = [each for each in found if isinstance(each, float)]
        if said is not None and not any(each is not None for each in found):
            refused += 1
            verdict = f"refused: {said}"
        elif said is None and len(numbers) == len(dtypes) and max(numbers) < NEAREST:
            merged += 1
            furthest = max(furthest, *numbers)
            verdict = f"{max(numbers):.2f}"
        else:
            wrong += 1
            verdict = f"WRONG {found}"
        print(f"{kind:9} {name:60} {verdict}", flush=True)
    print(f"{merged} rows merged, within {furthest:.2f} roundings · {refused} refused by name · {wrong} wrong")
    return 1 if wrong or not merged else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
