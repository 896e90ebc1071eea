"""BLIP-2 checkpoints and their companions, made from the golden cases, to be changed and converted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = GOLDEN / "cases" / "blip2"
sys.path.insert(0, str(GOLDEN))

import blip2_cases  # noqa: E402 - found beside the cases
from golden_case import Case  # noqa: E402

from weightport.api import convert  # noqa: E402


class Lavis:
    """A case's source files in a folder of their own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.case = Case(CASES / name, name)
        self.sources: dict[str, Path] = blip2_cases.sources(self.case, self.case.materialize(folder))
        self.settings: dict[str, Any] = blip2_cases.settings(self.case)

    def edit(self, source: str, change: Callable[[Any], Any]) -> None:
        """Change what torch.save was given; None in return keeps the changed object."""
        path = self.sources[source]
        path = path / "pytorch_model.bin" if path.is_dir() else path
        document = torch.load(path, weights_only=True)
        made = change(document)
        torch.save(document if made is None else made, path)

    def edit_config(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the language model's config.json."""
        path = self.sources["llm"] / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    def convert(self, out: Path, **settings: Any) -> Any:
        return convert(self.sources, out, "blip2", **{**self.settings, **settings})


def without(name: str) -> Callable[[Any], None]:
    """Takes a tensor out of what torch.save was given."""

    def change(document: Any) -> None:
        del document.get("model", document)[name]

    return change
