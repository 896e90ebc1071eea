#!/usr/bin/env python3
"""What merging costs: `port-merge-lora` against `cp` of the base, and against peft's merge_and_unload +
save_pretrained.

    python benchmarks/merge.py                      a 2.5 GB float16 model, rank 16 on every linear layer
    python benchmarks/merge.py --gigabytes 0.2      a small one, to try
    python benchmarks/merge.py --gigabytes 20 --limit 2    port-merge-lora alone, its memory limited to 2 GB

One run makes a Llama-shaped base and an adapter, then times whole processes in turn on the same files (so that a slow
moment of the machine hits all of them) and prints medians and ratios. The check of all merged weights is always part
of it. Memory is explained in processes.py; the limit is on private writable memory (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import Figures, Timing, alternate, save, timed

from weightport.writing import HashedFile
from weightport.writing.outgoing import Outgoing
from weightport.writing.safetensors_shards import as_bytes, safetensors_header

RANK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama's widths."""

    hidden: int = 2048
    inner: int = 5504
    vocabulary: int = 32000
    heads: int = 16

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a layer."""
        square, up = (self.hidden, self.hidden), (self.inner, self.hidden)
        attention = {f"self_attn.{name}_proj": square for name in "qkvo"}
        return attention | {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": (self.hidden, self.inner)}


WIDE, TINY = Shape(), Shape(64, 160, 500, 4)
PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def write_model(folder: Path, nbytes: float, shape: Shape = WIDE) -> int:
    """Write a float16 Llama of about `nbytes`, one file of a few GB after another; returns its layers."""
    width = shape.hidden
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": of for name, of in shape.linear.items()}
    layer |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (shape.vocabulary, width),
    }
    size = lambda shapes: 2 * sum(torch.Size(each).numel() for each in shapes.values())  # noqa: E731
    layers = max(1, round((nbytes - size(ends)) / size(layer)))
    shapes = dict(ends)
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": each for name, each in layer.items()}
    folder.mkdir(parents=True)
    noise = torch.randn(1 << 24).mul_(0.02).half()
    files: list[list[Outgoing]] = [[]]
    for name, each in shapes.items():
        if sum(spec.nbytes for spec in files[-1]) > 4e9:
            files.append([])
        files[-1].append(Outgoing(name, each, torch.float16, lambda: iter(())))
    names = [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    names = names if len(files) > 1 else ["model.safetensors"]
    for file, specs in zip(names, files):
        with HashedFile(folder / file) as out:
            out.write(safetensors_header(specs))
            for spec in specs:
                count = torch.Size(spec.shape).numel()
                for start in range(0, count, noise.numel()):
                    out.write(as_bytes(noise[: min(noise.numel(), count - start)]))
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": {s.name: file for file, specs in zip(names, files) for s in specs}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "intermediate_size": shape.inner, "num_hidden_layers": layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads, "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False, "dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def write_adapter(folder: Path, layers: int, shape: Shape = WIDE) -> None:
    """Write a float32 adapter of rank RANK on every linear layer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for number in range(layers):
        for name, (outputs, inputs) in shape.linear.items():
            key = f"base_model.model.model.layers.{number}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in shape.linear], "base_model_name_or_path": "base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def report(timings: Mapping[str, Sequence[Timing]]) -> None:
    """Print every command's seconds and memory, and the ratios that are claimed, of medians and of minima."""
    for name, found in timings.items():
        seconds = sorted(timing.seconds for timing in found)
        memory, unique = (max(values) for values in zip(*((each.megabytes, each.unique) for each in found)))
        print(
            f"{name:<16} {statistics.median(seconds):7.2f} s (least {seconds[0]:.2f}) · {memory:6.0f} MB private · "
            f"{unique:6.0f} MB USS"
        )
    for label, of in (("medians", statistics.median), ("minima", min)):
        seconds_of = {name: of([timing.seconds for timing in found]) for name, found in timings.items()}
        ours, start = seconds_of[OURS], seconds_of["interpreter"]
        ratios = [f"{seconds_of['peft'] / ours:.1f} × as fast as peft"]
        ratios += [f"without interpreter start {(ours - start) / seconds_of[name]:.1f} × {name}" for name in COPIES]
        if EARLIER in seconds_of:
            ratios.append(f"{seconds_of[EARLIER] / ours:.2f} × as fast as the earlier state")
        print(f"{label}: {' · '.join(ratios)}")


OURS, EARLIER = "port-merge-lora", "earlier state"
COPIES = ("cp", "cp, then sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the base")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, to try")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=float, help="gigabytes of memory; runs port-merge-lora alone, once")
    parser.add_argument("--before", type=Path, help="an earlier state of this package (the folder that holds it), too")
    parser.add_argument("--folder", type=Path, help="where the files go (about four times the model)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    shape = TINY if arguments.tiny else WIDE
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        base, adapter, out = folder / "base", folder / "adapter", folder / "out"
        layers = write_model(base, arguments.gigabytes * 1e9, shape)
        write_adapter(adapter, layers, shape)
        program = "from weightport.cli import port_merge_lora; port_merge_lora()"
        merge = [sys.executable, "-c", program, str(base), str(adapter), str(out), "--no-verify", "-q"]
        if arguments.limit:
            found = timed(merge, int(arguments.limit * 1e9))
            print(
                f"port-merge-lora  {found.seconds:.1f} s · {found.megabytes:.0f} MB, limited to {arguments.limit:g} GB"
            )
            return
        commands = {
            "cp": ["cp", "-r", str(base), str(out)],
            "cp, then sync": ["sh", "-c", f"cp -r {base} {out} && sync {out}/*"],
            "interpreter": [sys.executable, "-c", "import torch"],
            OURS: merge,
            "peft": [sys.executable, "-c", PEFT, str(base), str(adapter), str(out)],
        }
        if arguments.before:
            # Not the folder that the benchmark is started in, which may hold this package.
            commands[EARLIER] = ["env", "PYTHONSAFEPATH=1", f"PYTHONPATH={arguments.before.resolve()}", *merge]
        timings = alternate(commands, arguments.runs, lambda: shutil.rmtree(out, ignore_errors=True))
    report(timings)
    title = f"Merging a LoRA into {arguments.gigabytes:g} GB, weights proven"
    save(arguments.json, [Figures.of(title, timings, OURS, "peft", copy="cp, then sync", start="interpreter")])


if __name__ == "__main__":
    main()
