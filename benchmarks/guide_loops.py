"""The guides' own training loops, written from their description: plain PyTorch, as a reader of the guide would type
them. Pictures are decoded and processed in the data loader, which has no workers; the whole model runs in every step.

OFA-Chinese (LiT-tuning): encoder and word embeddings do not require gradients, everything is in training mode, labels
are padded with id 1 and the loss counts them. Florence-2 on DocVQA: `is_trainable = False` on the vision tower, which
PyTorch does not know, so that all of it is trained; labels are padded with id 1 and counted too.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, torch.Tensor]


class MugeCaptions(Dataset[tuple[str, str]]):
    """(base64 of the picture, caption) of every pair; the TSV is kept in memory."""

    def __init__(self, captions: Path) -> None:
        lines = captions.with_name(f"{captions.stem}_imgs.tsv").read_text().splitlines()
        self.images = dict(line.split("\t") for line in lines)
        rows = [json.loads(line) for line in captions.read_text("utf-8").splitlines()]
        self.pairs = [(row["image_id"], text) for row in rows for text in row["text"]]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, str]:
        name, caption = self.pairs[index]
        return self.images[name], caption


class Questions(Dataset[tuple[Path, str, str]]):
    """(picture, question, answer) of every line."""

    def __init__(self, path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        self.rows = [(path.parent / row["image"], row["prefix"], row["suffix"]) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Path, str, str]:
        return self.rows[index]


@dataclass(frozen=True)
class Guide:
    """One guide: its data, how it makes a batch, what it means by frozen."""

    data: Callable[[Path], Any]
    batch: Callable[[Any, Any, list[Any]], Batch]
    freeze: Callable[[Any], None]


def _caption_batch(processor: Any, config: Any, pairs: list[tuple[str, str]]) -> Batch:
    pictures = [Image.open(BytesIO(base64.urlsafe_b64decode(image))).convert("RGB") for image, _ in pairs]
    prompts = [processor.prompt("ofa_chinese_caption")] * len(pairs)
    made = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    answers = processor.tokenizer([caption for _, caption in pairs], padding=True, truncation=True, max_length=100)
    ids = torch.tensor(answers["input_ids"])
    return {**made, "decoder_input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def _question_batch(processor: Any, config: Any, rows: list[tuple[Path, str, str]]) -> Batch:
    pictures = [Image.open(path).convert("RGB") for path, _, _ in rows]
    prompts = [f"<DocVQA>{question}" for _, question, _ in rows]
    made = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    labels = processor.tokenizer([answer for *_, answer in rows], padding=True, return_tensors="pt")["input_ids"]
    start = torch.full_like(labels[:, :1], config.text_config.decoder_start_token_id)
    return {**made, "decoder_input_ids": torch.cat([start, labels[:, :-1]], dim=1), "labels": labels}


def _lock_encoder(model: Any) -> None:
    for parameter in model.model.encoder.parameters():
        parameter.requires_grad = False


def _mean_to_freeze(model: Any) -> None:
    for parameter in model.model.vision_tower.parameters():
        parameter.is_trainable = False


GUIDES: Mapping[str, Guide] = {
    "ofa": Guide(MugeCaptions, _caption_batch, _lock_encoder),
    "florence2": Guide(Questions, _question_batch, _mean_to_freeze),
}


def train(
    guide: Guide, model: Any, processor: Any, data: Path, *, batch: int, steps: int, rate: float, device: torch.device
) -> Iterator[float]:
    """Train for `steps`; yields the time after each, in seconds. bfloat16 on a GPU, float32 without."""
    guide.freeze(model)
    model.to(device).train()
    samples = guide.data(data)
    loader = DataLoader(
        samples,
        batch,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: guide.batch(processor, model.config, rows),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    done = 0
    while done < steps:
        for tensors in loader:
            placed = {name: tensor.to(device) for name, tensor in tensors.items()}
            labels = placed.pop("labels")
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(**placed).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            done += 1
            yield time.perf_counter()
            if done == steps:
                return
