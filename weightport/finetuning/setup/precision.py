"""Mixed precision outside of Trainer's own forward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import TrainingArguments


def autocast_dtype(arguments: TrainingArguments) -> torch.dtype | None:
    """dtype of mixed precision, None without it."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def autocast(arguments: TrainingArguments) -> AbstractContextManager[object]:
    """What accelerate puts around a forward pass."""
    dtype = autocast_dtype(arguments)
    return nullcontext() if dtype is None else torch.autocast(arguments.device.type, dtype)
