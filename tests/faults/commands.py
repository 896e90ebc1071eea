"""The commands under fault, on a tiny Florence-2: their inputs, their command lines, and what a whole result is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parents[1]
RECORD = ".weightport.json"
QUERY = "language_model.model.decoder.layers.0.self_attn.q_proj"
REPO = "somebody/tiny"


@dataclass(frozen=True)
class Command:
    """`argv` gives the command line for an output, `other` one whose whole result differs (an earlier run's).

    `varies` are files of the result whose content differs from run to run (times, losses of the moment): they must be
    there. `source` is an input that may be changed while it is read; `in_place`: the command fills its output in
    place, and a part of it may stand there after a kill.
    """

    name: str
    argv: Callable[[Path, Path], Sequence[str]]
    other: Callable[[Path, Path], Sequence[str]]
    source: str
    varies: tuple[str, ...] = ()
    is_file: bool = False
    in_place: bool = False
    points: int = 100


def make_inputs(room: Path, *, every: bool = True) -> None:
    """The inputs of the commands below `room`/inputs; without `every` those of convert, export and port-adapter."""
    import golden
    from drawn_data import draw_jsonl

    from weightport.api import convert, merge_lora, port_adapter

    inputs = room / "inputs"
    inputs.mkdir(parents=True)
    golden.materialize(TESTS / "golden" / "cases" / "florence2" / "tiny-vocab-4k", inputs / "original")
    from weightport.checkpoints import open_checkpoint

    rows, columns = open_checkpoint(inputs / "original")[f"{QUERY}.weight"].shape
    for name, seed in (("adapter", 1), ("other_adapter", 2)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"base_model.model.{QUERY}.lora_A.weight": torch.randn(2, columns, generator=generator),
            f"base_model.model.{QUERY}.lora_B.weight": torch.randn(rows, 2, generator=generator),
        }
        (inputs / name).mkdir()
        save_file(tensors, inputs / name / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
        (inputs / name / "adapter_config.json").write_text(json.dumps(settings))
    convert(inputs / "original", inputs / "model", "florence2")
    convert(inputs / "original", inputs / "half", "florence2", dtype=torch.float16)
    if not every:
        return
    for name in ("adapter", "other_adapter"):
        port_adapter(inputs / name, inputs / f"native_{name}", inputs / "model")
    merge_lora(inputs / "model", [(inputs / "native_adapter", 1.0)], inputs / "tuned")
    merge_lora(inputs / "model", [(inputs / "native_other_adapter", 1.0)], inputs / "other_tuned")
    draw_jsonl(inputs / "data", count=2)


def _convert(room: Path, out: Path) -> list[str]:
    return ["convert", str(room / "inputs/original"), str(out), "--family", "florence2"]


def _merge(room: Path, out: Path, adapter: str = "native_adapter") -> list[str]:
    return ["merge-lora", str(room / "inputs/model"), str(room / "inputs" / adapter), str(out)]


def _export(room: Path, out: Path, model: str = "model") -> list[str]:
    return ["export", str(room / "inputs" / model), str(out)]


def _extract(room: Path, out: Path, rank: int = 2) -> list[str]:
    return ["extract-lora", str(room / "inputs/tuned"), str(room / "inputs/model"), str(out), "--rank", str(rank)]


def _port(room: Path, out: Path, adapter: str = "adapter") -> list[str]:
    return ["port-adapter", str(room / "inputs" / adapter), str(out), "--base", str(room / "inputs/model")]


_TINY = {
    "training.max_steps": 1,
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.save_strategy": "steps",
    "training.save_steps": 1,
    "training.bf16": False,
    "training.dataloader_num_workers": 0,
    "training.report_to": "none",
    "evaluation.generation.num_beams": 1,
    "evaluation.generation.max_new_tokens": 2,
}


def _set(settings: Mapping[str, object]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def _finetune(room: Path, out: Path, steps: int = 1) -> list[str]:
    settings = {**_TINY, "training.max_steps": steps}
    data = str(room / "inputs/data")
    return ["finetune", str(room / "inputs/model"), "--data", data, "--output", str(out), *_set(settings)]


def _evaluate(room: Path, out: Path, tokens: int = 2) -> list[str]:
    settings = {name: value for name, value in _TINY.items() if name.startswith("evaluation")}
    settings["evaluation.generation.max_new_tokens"] = tokens
    model, data = str(room / "inputs/model"), str(room / "inputs/data")
    return ["evaluate", model, "--data", data, "--metric", "exact-match", "--output", str(out), *_set(settings)]


def _release(room: Path, out: Path, licence: str = "mit") -> list[str]:
    return ["release", str(out), "--repo", REPO, "--license", licence]


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            "convert",
            _convert,
            lambda room, out: [*_convert(room, out), "--dtype", "float16"],
            "inputs/original/model.safetensors",
        ),
        Command(
            "merge",
            _merge,
            lambda room, out: _merge(room, out, "native_other_adapter"),
            "inputs/native_adapter/adapter_model.safetensors",
        ),
        Command(
            "export",
            _export,
            lambda room, out: _export(room, out, "half"),
            "inputs/model/model.safetensors",
        ),
        Command("extract", _extract, lambda room, out: _extract(room, out, 1), "inputs/tuned/model.safetensors"),
        Command(
            "port-adapter",
            _port,
            lambda room, out: _port(room, out, "other_adapter"),
            "inputs/adapter/adapter_model.safetensors",
        ),
        Command(
            "finetune",
            _finetune,
            lambda room, out: _finetune(room, out, 2),
            "inputs/model/model.safetensors",
            varies=("*",),
            in_place=True,
        ),
        Command(
            "evaluate",
            _evaluate,
            lambda room, out: _evaluate(room, out, 3),
            "inputs/model/model.safetensors",
            varies=("evaluation.json", "metrics.json"),
        ),
        Command(
            "release",
            _release,
            lambda room, out: _release(room, out, "apache-2.0"),
            "outputs/out/model.safetensors",
        ),
    )
}


def state_of(path: Path, varies: Sequence[str] = ()) -> str | None:
    """What stands at `path`, as one digest of names and contents; None where nothing does.

    Contents of files that vary are left out, and those of the list of times, which every copy would change.
    """
    if not os.path.lexists(path):
        return None
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if not each.is_dir())
    for each in files:
        name = str(each.relative_to(path))
        digest.update(f"{name}\0".encode())
        if each.name != RECORD and not any(each.match(pattern) for pattern in varies):
            digest.update(hashlib.sha256(each.read_bytes()).digest())
    return digest.hexdigest()[:16]


def files_of(path: Path) -> dict[str, str]:
    """A digest of each file of a folder, without the list of times."""
    if not path.is_dir():
        return {}
    files = [each for each in path.rglob("*") if each.is_file() and each.name != RECORD]
    return {str(each.relative_to(path)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def copied(source: Path, target: Path) -> None:
    """`source` with its times, so that weightport knows what it wrote."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)
