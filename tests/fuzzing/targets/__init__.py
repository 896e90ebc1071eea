"""What is fuzzed: every reader, by name."""

from __future__ import annotations

from fuzzing.campaign import Target
from fuzzing.targets import adapters, data, plans, settings, vocabularies, weights

MILLISECONDS = {
    "torch-zip": 2.0, "torch-legacy": 1.3, "pickle-grammar": 1.0, "safetensors": 0.5, "sharded": 0.7, "npz": 1.4,
    "zarr": 1.3, "ofa-vocabulary": 0.8, "sentencepiece": 0.3, "gemma-vocabulary": 9.0, "florence2-tokenizer": 2.0,
    "moondream2-tokenizer": 0.8, "opt-tokenizer": 3.0, "adapter": 0.8, "recipe": 5.5, "settings": 4.0,
    "reference": 0.3, "jsonl": 0.5, "muge": 0.9, "coco-counting": 0.6, "coco-detection": 0.5, "chats": 1.0,
    "csv-and-lists": 1.0, "coco-captions": 0.7, "tar": 1.0, "class-folders": 0.8, "table": 60.0,
    "plan-ofa": 150.0, "plan-florence2": 150.0, "plan-paligemma2": 150.0, "plan-blip2": 150.0,
    "plan-moondream2": 150.0,
}  # fmt: skip
"""What an input costs: every reader gets the same time."""

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (weights, vocabularies, adapters, settings, data, plans)
    for target in module.TARGETS
}
