#!/usr/bin/env python3
"""What converting costs: `port-ofa` against `cp` of the bytes it writes, and against the straightforward way.

    python benchmarks/convert.py                 a 2 GB model inside a 6 GB training checkpoint
    python benchmarks/convert.py --layers 3      a small one, to try

One run makes the checkpoint, then times whole processes in turn (so that a slow moment of the machine hits all of
them) and prints medians and ratios. Memory is the peak of private anonymous memory (RssAnon): pages of mapped files
belong to the page cache. The straightforward way is torch.load, rename, load_state_dict, save_pretrained.
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

from processes import Timing, timed

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
        TensorRef(name, shape, dtype, lambda shape=shape, dtype=dtype: values(shape, dtype), (name,))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=14, help="layers a side; 14 make a 2 GB model in a 6 GB file")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each command")
    parser.add_argument("--folder", type=Path, help="where to work; needs 4 times the file's size")
    parser.add_argument("--straightforward", nargs=2, type=Path, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.straightforward:
        straightforward(*arguments.straightforward)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source, port, naive, copy = (folder / part for part in ("ofa.pt", "port", "naive", "copy"))
        write_checkpoint(source, arguments.layers)
        command = Path(sys.executable).with_name("port-ofa")
        commands = {
            "port-ofa": [str(command), str(source), str(port), "--vocab", "none", "--quiet", "--overwrite"],
            "cp": ["cp", str(port / "model.safetensors"), str(copy)],
            "cp, then sync": ["sh", "-c", f"cp {port}/model.safetensors {copy} && sync {copy}"],
            "interpreter start": [sys.executable, "-c", START],
            "straightforward": [sys.executable, __file__, "--straightforward", str(source), str(naive)],
        }
        commands["port-ofa"] += ["--max-shard-size", "100GB"]
        timings: dict[str, list[Timing]] = {label: [] for label in commands}
        for _ in range(arguments.runs):
            for label, each in commands.items():
                copy.unlink(missing_ok=True)
                shutil.rmtree(naive, ignore_errors=True)
                timings[label].append(timed(each))
        report(timings, source.stat().st_size, (port / "model.safetensors").stat().st_size)


def report(timings: dict[str, list[Timing]], read: int, written: int) -> None:
    """Print medians and the ratios that are claimed."""
    seconds = {label: statistics.median(t.seconds for t in runs) for label, runs in timings.items()}
    memory = {label: statistics.median(t.megabytes for t in runs) for label, runs in timings.items()}
    print(f"checkpoint {read / 1e9:.2f} GB, model written {written / 1e9:.2f} GB")
    for label in timings:
        print(f"{label:<18} {seconds[label]:7.2f} s   {memory[label]:7.0f} MB private memory at its peak")
    start = seconds["interpreter start"]
    ratios = {
        "(port-ofa − interpreter start) / cp": (seconds["port-ofa"] - start) / seconds["cp"],
        "(port-ofa − interpreter start) / (cp, then sync)": (seconds["port-ofa"] - start) / seconds["cp, then sync"],
        "straightforward / port-ofa": seconds["straightforward"] / seconds["port-ofa"],
        "memory: straightforward / port-ofa": memory["straightforward"] / memory["port-ofa"],
    }
    for label, ratio in ratios.items():
        print(f"{label:<50} {ratio:5.2f}")
    print(json.dumps({"seconds": seconds, "megabytes": memory, "ratios": ratios}))


if __name__ == "__main__":
    main()
