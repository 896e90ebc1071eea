#!/usr/bin/env python3
"""What converting costs: `port-ofa` against `cp` of the bytes it writes, and against the straightforward way.

    python benchmarks/convert.py                 a 2 GB model inside a 6 GB training checkpoint
    python benchmarks/convert.py --layers 3      a small one, to try
    python benchmarks/convert.py --family paligemma2                 a PaliGemma 2 3B: an .npz of 6 GB
    python benchmarks/convert.py --family moondream2                 a moondream2 of 2024: safetensors of 3.7 GB
    python benchmarks/convert.py --family florence2                  a Florence-2-large in float32: 3.3 GB
    python benchmarks/convert.py --family paligemma2 --size 28b --layers 4 --limit-gb 2 --no-straightforward

The last one plans the 28B model in full, on a sparse file of 55 GB, and converts one of its widths with four text
layers, in processes that may not have more than 2 GB of private memory.

One run makes the checkpoint, then times whole processes in turn (so that a slow moment of the machine hits all of
them) and prints medians and ratios. Memory is explained in processes.py. The straightforward way is torch.load (or
np.load), rename, load_state_dict, save_pretrained.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from processes import Figures, Timing, save, timed

START = "import torch, transformers; from transformers import GenerationMixin, PreTrainedModel, ResNetModel"


def write_checkpoint(path: Path, layers: int) -> int:
    """Write a fairseq training checkpoint of OFA-large with `layers` layers a side; returns the model's bytes."""
    import torch

    from weightport.checkpoints import Checkpoint, TensorRef
    from weightport.checkpoints.types import NamedTensors
    from weightport.converters.export import original_tensors
    from weightport.families.registry import registry
    from weightport.modeling.ofa.configuration_ofa import OFAConfig
    from weightport.writing.torch_archive import write_torch_archive

    family = registry()["ofa"].conversion
    config = OFAConfig(
        vocab_size=30325,
        d_model=1024,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        vision_config={
            "model_type": "resnet",
            "embedding_size": 64,
            "hidden_sizes": [256, 512, 1024],
            "depths": [3, 8, 36],
            "layer_type": "bottleneck",
        },
    )
    noise = torch.rand(1 << 22).sub_(0.5).mul_(0.05)

    def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // noise.numel()))[:count].reshape(shape).to(dtype)

    shapes = family.targets(config).shapes
    refs = NamedTensors(
        TensorRef.of(name, shape, dtype, lambda shape=shape, dtype=dtype: values(shape, dtype), (name,))
        for name, shape in shapes.items()
        for dtype in (torch.int64 if name.endswith("num_batches_tracked") else torch.float32,)
    )
    native = Checkpoint(path, "generated", (), refs)
    tensors, _ = original_tensors(native, family.rules_of(config, "fairseq"), config, {})

    def stored(prefix: str) -> OrderedDict:
        # As the trainer writes them: tied matrices in three storages, one per name.
        return OrderedDict((t.name, replace(t, storage=f"{prefix}{t.name}")) for t in tensors)

    model = stored("model.")
    document = family.original_document(config, {"task": {"bpe": "bert"}, "language": "zh"}, model)
    moments = {
        number: {"step": 1, "exp_avg": first, "exp_avg_sq": second}
        for number, (first, second) in enumerate(zip(stored("m.").values(), stored("v.").values()))
        if first.dtype.is_floating_point
    }
    document["last_optimizer_state"] = {"state": moments, "param_groups": []}
    write_torch_archive(document, path)
    return sum(tensor.nbytes for tensor in model.values())


def write_florence2(folder: Path, layers: int) -> Path:
    """A Florence-2-large in float32 with `layers` layers a side, as its repository has it; its weights."""
    import torch
    from transformers import Florence2Config

    from weightport.checkpoints import Checkpoint, TensorRef
    from weightport.checkpoints.types import NamedTensors
    from weightport.converters.export import original_tensors
    from weightport.families.florence2.original import original_config
    from weightport.families.registry import registry
    from weightport.writing.torch_archive import write_torch_archive

    text = {
        "model_type": "bart", "vocab_size": 51289, "d_model": 1024, "encoder_layers": layers, "decoder_layers": layers,
        "encoder_attention_heads": 16, "decoder_attention_heads": 16, "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {
        "embed_dim": [256, 512, 1024, 2048], "depths": [1, 1, 9, 1], "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64], "projection_dim": 1024,
    }  # fmt: skip
    family = registry()["florence2"].conversion
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=51288)
    noise = torch.rand(1 << 22).sub_(0.5).mul_(0.05)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // noise.numel()))[:count].reshape(shape)

    refs = NamedTensors(
        TensorRef.of(name, shape, torch.float32, lambda shape=shape: values(shape), (name,))
        for name, shape in family.targets(config).shapes.items()
    )
    native = Checkpoint(folder, "generated", (), refs)
    tensors, _ = original_tensors(native, family.rules_of(config, ""), config, {})
    folder.mkdir()
    write_torch_archive(OrderedDict((tensor.name, tensor) for tensor in tensors), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(original_config(config)))
    return folder / "pytorch_model.bin"


def straightforward_florence2(source: Path, out: Path) -> None:
    """The whole state in memory, renamed by the family's own table, a model beside it."""
    import torch
    from transformers import AutoModelForImageTextToText

    from weightport.api import plan_conversion

    state = torch.load(source, map_location="cpu", weights_only=True)
    planned = plan_conversion(source.parent, "florence2", vocabulary="none")
    renamed = {
        target.name: torch.cat([block.reshape(-1) for block in target.blocks()]).reshape(target.shape)
        for target in planned.plan.targets
    }
    model = AutoModelForImageTextToText.from_config(planned.model.config)
    model.load_state_dict(renamed, strict=False)
    model.save_pretrained(out)
    del state


def write_moondream2(folder: Path) -> Path:
    """A moondream2 of one view in float16, at the released sizes, with the config.json of its time; its weights."""
    import torch

    from weightport.checkpoints import Checkpoint, TensorRef
    from weightport.checkpoints.types import NamedTensors
    from weightport.converters.export import original_tensors
    from weightport.families.registry import registry
    from weightport.modeling.moondream.configuration_moondream import MoondreamConfig
    from weightport.writing.safetensors_shards import lay_out, write_shards

    family, config = registry()["moondream2"].conversion, MoondreamConfig()
    noise = torch.rand(1 << 22).sub_(0.5).mul_(0.05).half()

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // noise.numel()))[:count].reshape(shape)

    refs = NamedTensors(
        TensorRef.of(name, shape, torch.float16, lambda shape=shape: values(shape), (name,))
        for name, shape in family.targets(config).shapes.items()
    )
    native = Checkpoint(folder, "generated", (), refs)
    tensors, _ = original_tensors(native, family.rules_of(config, "2024"), config, {})
    folder.mkdir()
    write_shards(lay_out(tensors, 10**12), folder, metadata={"format": "pt"}, allow_nonfinite=False)
    stated = {"architectures": ["Moondream"], "model_type": "moondream1", "text_config": {"model_type": "phi"}}
    (folder / "config.json").write_text(json.dumps(stated))
    return folder / "model.safetensors"


def straightforward_safetensors(source: Path, out: Path) -> None:
    """As a script would do it: the whole state in memory, cut and renamed, a model beside it."""
    import torch
    from safetensors.torch import load_file

    from weightport.checkpoints.lazy_tensors import in_memory
    from weightport.families.moondream2.rules import moondream_rules
    from weightport.modeling.moondream.configuration_moondream import MoondreamConfig
    from weightport.modeling.moondream.modeling_moondream import MoondreamForConditionalGeneration

    config = MoondreamConfig.from_pretrained(out.with_name("port"))
    rules, renamed = moondream_rules(config, "2024"), {}
    for name, tensor in load_file(source).items():
        claim = next(rules.of_source(name))
        made = claim.rule.operation.forward([in_memory(tensor)])
        renamed |= {
            native: value.read().contiguous() for native, value in zip(claim.rule.target_names(claim.captures), made)
        }
    torch.set_default_dtype(torch.float16)
    model = MoondreamForConditionalGeneration(config)
    model.load_state_dict(renamed, strict=False)
    model.save_pretrained(out)


def straightforward(source: Path, out: Path) -> None:
    """The way of the scripts in issue threads: everything in memory, twice."""
    import torch

    from weightport.families.ofa.rules import fairseq_rules
    from weightport.modeling.ofa.configuration_ofa import OFAConfig
    from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration

    state = torch.load(source, map_location="cpu", weights_only=False)["model"]
    config = OFAConfig.from_pretrained(out.with_name("port"))
    rules = fairseq_rules(config)
    renamed = {}
    for name, tensor in state.items():
        for claim in rules.of_source(name):
            if claim.pattern < len(claim.rule.sources):
                renamed[claim.rule.target_names(claim.captures)[0]] = tensor
    model = OFAForConditionalGeneration(config)
    model.load_state_dict(renamed, strict=False)
    model.save_pretrained(out)


def straightforward_npz(source: Path, out: Path) -> None:
    """As the former scripts did it: every member in memory, every layer's slices beside them, a model, its state."""
    import numpy as np
    import torch
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    from weightport.checkpoints.lazy_tensors import in_memory
    from weightport.families.paligemma2.layouts import Towers
    from weightport.families.paligemma2.rules import paligemma_rules

    config = PaliGemmaConfig.from_pretrained(out.with_name("port"))
    rules = paligemma_rules(config, Towers())
    memory = {"vision_tower.vision_model.": "model.vision_tower.", "language_model.model.": "model.language_model.",
              "multi_modal_projector.": "model.multi_modal_projector."}  # fmt: skip
    renamed = {}
    with np.load(source) as archive:
        for name in archive.files:
            tensor = torch.from_numpy(archive[name].view(np.int16)).view(torch.bfloat16)
            claim = next(rules.of_source(name.removeprefix("params/")))
            made = [each.read().contiguous() for each in claim.rule.operation.forward([in_memory(tensor)])]
            layers = max(1, len(made) // len(claim.rule.targets))
            for stored, value in zip(claim.rule.target_names(claim.captures, layers), made):
                start = next(each for each in memory if stored.startswith(each))
                renamed[memory[start] + stored.removeprefix(start)] = value
    torch.set_default_dtype(torch.bfloat16)
    model = PaliGemmaForConditionalGeneration(config)
    model.load_state_dict(renamed, strict=False)
    model.save_pretrained(out)


def write_source(arguments: argparse.Namespace, folder: Path) -> Path:
    """The checkpoint to convert."""
    if arguments.family == "ofa":
        write_checkpoint(folder / "ofa.pt", arguments.layers or 14)
        return folder / "ofa.pt"
    if arguments.family == "moondream2":
        return write_moondream2(folder / "moondream2")
    if arguments.family == "florence2":
        return write_florence2(folder / "florence2", arguments.layers or 12)
    import paligemma_files

    whole = paligemma_files.shapes(arguments.size)
    if arguments.layers:
        sparse = folder / "whole.npz"
        total = paligemma_files.write_sparse(sparse, whole)
        dry = timed([*port_command("paligemma2"), str(sparse), str(folder / "none"), "--vocab", "none", "--dry-run"],
                    arguments.limit)  # fmt: skip
        print(f"planned in full: {arguments.size}, {total / 1e9:.1f} GB, {dry.seconds:.1f} s, {dry.megabytes:.0f} MB; "
              f"converted with {arguments.layers} text layers")  # fmt: skip
        sparse.unlink()
    paligemma_files.write_checkpoint(
        folder / "paligemma.npz", paligemma_files.shapes(arguments.size, arguments.layers)
    )
    return folder / "paligemma.npz"


STRAIGHTFORWARD = {
    "ofa": straightforward,
    "paligemma2": straightforward_npz,
    "moondream2": straightforward_safetensors,
    "florence2": straightforward_florence2,
}
"""The straightforward way to each family's model."""


def port_command(family: str) -> list[str]:
    """`port-FAMILY`, by the interpreter and the package that run this."""
    return [sys.executable, "-c", f"from weightport import cli; cli.port_{family}()"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=tuple(STRAIGHTFORWARD), default="ofa")
    parser.add_argument("--size", choices=("3b", "10b", "28b"), default="3b", help="of PaliGemma 2")
    parser.add_argument("--layers", type=int, help="OFA: layers a side, 14 make a 2 GB model in a 6 GB file; "
                        "PaliGemma: text layers, by default all; Florence-2: layers a side, 12")  # fmt: skip
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each command")
    parser.add_argument("--folder", type=Path, help="where to work; needs 4 times the file's size")
    parser.add_argument("--limit-gb", type=float, help="private memory that a conversion may have")
    parser.add_argument("--no-straightforward", action="store_true", help="leave out what needs most memory and disk")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--straightforward", nargs=2, type=Path, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.limit = int(arguments.limit_gb * 1e9) if arguments.limit_gb else None
    if arguments.straightforward:
        STRAIGHTFORWARD[arguments.family](*arguments.straightforward)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        port, naive, copy = (folder / part for part in ("port", "naive", "copy"))
        source, label = write_source(arguments, folder), f"port-{arguments.family}"
        copied = f"cp {port}/model.safetensors {copy}"
        commands = {
            label: [*port_command(arguments.family), str(source), str(port), "--vocab", "none", "--quiet",
                    "--overwrite", "--max-shard-size", "100GB"],
            "cp": ["cp", str(port / "model.safetensors"), str(copy)],
            "cp, then sync": ["sh", "-c", f"{copied} && sync {copy}"],
            "interpreter start": [sys.executable, "-c", START],
            "straightforward": [sys.executable, __file__, "--family", arguments.family, "--straightforward",
                                str(source), str(naive)],
        }  # fmt: skip
        if arguments.no_straightforward:
            del commands["straightforward"]
        timings: dict[str, list[Timing]] = {each: [] for each in commands}
        for _ in range(arguments.runs):
            for each, command in commands.items():
                copy.unlink(missing_ok=True)
                shutil.rmtree(naive, ignore_errors=True)
                timings[each].append(timed(command, arguments.limit if each == label else None))
        written = (port / "model.safetensors").stat().st_size
        report(label, timings, source.stat().st_size, written)
        title = f"Converting {arguments.family}, {written / 1e9:.1f} GB written"
        peer = "" if arguments.no_straightforward else "straightforward"
        copy_and_start = {"copy": "cp, then sync", "start": "interpreter start"}
        save(arguments.json, [Figures.of(title, timings, label, peer, **copy_and_start)])


def report(port: str, timings: dict[str, list[Timing]], read: int, written: int) -> None:
    """Print medians and the ratios that are claimed."""
    seconds = {label: statistics.median(t.seconds for t in runs) for label, runs in timings.items()}
    memory = {label: statistics.median(t.megabytes for t in runs) for label, runs in timings.items()}
    print(f"checkpoint {read / 1e9:.2f} GB, model written {written / 1e9:.2f} GB")
    for label in timings:
        print(f"{label:<18} {seconds[label]:7.2f} s   {memory[label]:7.0f} MB private memory at its peak")
    start = seconds["interpreter start"]
    ratios = {
        f"({port} − interpreter start) / cp": (seconds[port] - start) / seconds["cp"],
        f"({port} − interpreter start) / (cp, then sync)": (seconds[port] - start) / seconds["cp, then sync"],
    }
    if "straightforward" in timings:
        ratios |= {
            f"straightforward / {port}": seconds["straightforward"] / seconds[port],
            f"memory: straightforward / {port}": memory["straightforward"] / memory[port],
        }
    for label, ratio in ratios.items():
        print(f"{label:<50} {ratio:5.2f}")
    print(json.dumps({"seconds": seconds, "megabytes": memory, "ratios": ratios}))


if __name__ == "__main__":
    main()
