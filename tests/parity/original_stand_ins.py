"""Stand-ins for the originals that the scripts in scripts/reference/ run: module names, layouts, calls and the habits
that have made references wrong. The originals cannot be installed here.

A habit is a function that changes a stand-in: what OFA under torch 1.8 does in zero_grad, what the remote code of
Florence-2 does to a tied head, and so on.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

SCRIPTS = Path(__file__).parents[2] / "scripts" / "reference"
BATCH, SOURCE, TARGET, WIDTH, VOCABULARY = 2, 4, 3, 8, 11


def script(name: str) -> ModuleType:
    """One of the scripts, as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def imports_undone() -> Iterator[None]:
    """Modules that a stand-in brought in while the block ran, and changes of the search path, are gone afterwards.
    Installed packages stay: some cannot be imported twice."""
    modules, path = set(sys.modules), list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if not any(installed in file for installed in ("site-packages", "lib/python")):
                del sys.modules[name]


def ids(length: int) -> torch.Tensor:
    return torch.arange(BATCH * length).reshape(BATCH, length) % (VOCABULARY - 2) + 2


class StandInLayer(nn.Module):
    """Stands in for a layer: an attention that returns a pair, and two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.fc1, self.fc2 = StandInAttention(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.fc2(self.fc1(self.self_attn(x)[0])), None


class StandInAttention(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


class StandInStack(nn.Module):
    """Stands in for fairseq's encoder or decoder: [length, batch, channels] inside, a dictionary outside."""

    def __init__(self, *, time_first: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([StandInLayer(), StandInLayer()])
        self.time_first = time_first

    def forward(self, tokens: torch.Tensor):
        x = self.embed_tokens(tokens)
        x = x.transpose(0, 1) if self.time_first else x
        for layer in self.layers:
            x = layer(x)[0]
        return {"encoder_out": [x]} if self.time_first else (x,)


class StandInOFA(nn.Module):
    """Stands in for the original OFA: only its names, its layout and its call."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = StandInStack(time_first=True), StandInStack(time_first=True)

    def forward(self, src_tokens, src_lengths, prev_output_tokens):
        encoded = self.encoder(src_tokens)["encoder_out"][0].mean(0)
        decoded = self.decoder(prev_output_tokens)["encoder_out"][0].transpose(0, 1) + encoded[:, None]
        return decoded @ self.decoder.embed_tokens.weight.T, {}


class StandInFlorence2(nn.Module):
    """Stands in for Florence-2's remote code: its names, its call, and a head that is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        text = nn.Module()
        text.shared = nn.Embedding(VOCABULARY, WIDTH)
        text.encoder, text.decoder = StandInStack(time_first=False), StandInStack(time_first=False)
        text.encoder.embed_tokens = text.decoder.embed_tokens = text.shared
        self.language_model = nn.Module()
        self.language_model.model = text
        self.language_model.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids, decoder_input_ids=None, labels=None):
        text = self.language_model.model
        used = labels if decoder_input_ids is None else decoder_input_ids
        decoded = text.decoder(used)[0] + text.encoder(input_ids)[0].mean(1, keepdim=True)
        logits = self.language_model.lm_head(decoded)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)

    def generate(self, input_ids, **settings):
        return input_ids


def zeroes_gradients_in_place(model: nn.Module) -> nn.Module:
    """zero_grad as torch 1.8 has it: the gradients' memory is kept and filled with zeros."""

    def zero_grad() -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.detach_().zero_()

    model.zero_grad = zero_grad
    return model
