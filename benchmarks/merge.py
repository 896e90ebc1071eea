#!/usr/bin/env python3
"""What merging costs: `port-merge-lora` against `cp` of the base, and against peft's merge_and_unload +
save_pretrained.

    python benchmarks/merge.py                      a 2.5 GB float16 model, rank 16 on every linear layer
    python benchmarks/merge.py --gigabytes 0.2      a small one, to try
    python benchmarks/merge.py --gigabytes 20 --limit 2    port-merge-lora alone, its memory limited to 2 GB

One run makes a Llama-shaped base and an adapter, then times whole processes in turn on the same files (so that a slow
moment of the machine hits all of them) and prints medians and ratios. Memory is the peak of private anonymous memory
(RssAnon): pages of mapped files belong to the page cache. The limit is on private writable memory (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from processes import Timing, timed

from weightport.writing import HashedFile
from weightport.writing.outgoing import Outgoing
from weightport.writing.safetensors_shards import as_bytes, safetensors_header

HIDDEN, INNER, VOCABULARY, RANK = 2048, 5504, 32000, 16
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def write_model(folder: Path, nbytes: float) -> int:
    """Write a float16 Llama of about `nbytes`, one file of a few GB after another; returns its layers."""
    layer = {f"{name}.weight": shape for name, shape in LINEAR.items()}
    layer |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    ends = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    size = lambda shapes: 2 * sum(torch.Size(shape).numel() for shape in shapes.values())  # noqa: E731
    layers = max(1, round((nbytes - size(ends)) / size(layer)))
    shapes = dict(ends)
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    folder.mkdir(parents=True)
    noise = torch.randn(1 << 24).mul_(0.02).half()
    files: list[list[Outgoing]] = [[]]
    for name, shape in shapes.items():
        if sum(spec.nbytes for spec in files[-1]) > 4e9:
            files.append([])
        files[-1].append(Outgoing(name, shape, torch.float16, lambda: iter(())))
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
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def write_adapter(folder: Path, layers: int) -> None:
    """Write a float32 adapter of rank RANK on every linear layer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for number in range(layers):
        for name, (outputs, inputs) in LINEAR.items():
            key = f"base_model.model.model.layers.{number}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in LINEAR],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def report(timings: Mapping[str, Sequence[Timing]]) -> None:
    """Print every command's seconds and memory, and the two ratios that are claimed, of medians and of minima."""
    for name, found in timings.items():
        seconds = sorted(timing.seconds for timing in found)
        memory = max(timing.megabytes for timing in found)
        print(f"{name:<16} {statistics.median(seconds):7.2f} s (least {seconds[0]:.2f}) · {memory:6.0f} MB private")
    for label, of in (("medians", statistics.median), ("minima", min)):
        seconds_of = {name: of([timing.seconds for timing in found]) for name, found in timings.items()}
        ours, start, copy = (seconds_of[name] for name in ("port-merge-lora", "interpreter", "cp"))
        print(f"{label}: {seconds_of['peft'] / ours:.1f} × as fast as peft", end=" · ")
        print(f"without interpreter start {(ours - start) / copy:.1f} × cp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the base")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=float, help="gigabytes of memory; runs port-merge-lora alone, once")
    parser.add_argument("--folder", type=Path, help="where the files go (about four times the model)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        base, adapter, out = folder / "base", folder / "adapter", folder / "out"
        layers = write_model(base, arguments.gigabytes * 1e9)
        write_adapter(adapter, layers)
        program = "from weightport.cli import port_merge_lora; port_merge_lora()"
        merge = [sys.executable, "-c", program, str(base), str(adapter), str(out), "--no-verify", "-q"]
        commands = {
            "cp": ["cp", "-r", str(base), str(out)],
            "interpreter": [sys.executable, "-c", "import torch"],
            "port-merge-lora": merge,
            "peft": [sys.executable, "-c", PEFT, str(base), str(adapter), str(out)],
        }
        if arguments.limit:
            found = timed(merge, int(arguments.limit * 1e9))
            print(
                f"port-merge-lora  {found.seconds:.1f} s · {found.megabytes:.0f} MB, limited to {arguments.limit:g} GB"
            )
            return
        timings: dict[str, list[Timing]] = {name: [] for name in commands}
        for _ in range(arguments.runs):
            for name, command in commands.items():
                timings[name].append(timed(command))
                shutil.rmtree(out, ignore_errors=True)
        report(timings)


if __name__ == "__main__":
    main()
