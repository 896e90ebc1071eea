"""From a checkpoint's files to the plan of its conversion, of every family. Nothing else makes plans: not compared."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import cases
from fuzzing.campaign import Target
from fuzzing.cases import Case
from fuzzing.targets.changes import change
from fuzzing.targets.golden_sources import GOLDEN, materialized, shrunk
from weightport.api import plan_conversion


def _seeds(name: str, trainer: bool, folder: Path) -> list[Case]:
    checkpoint = materialized(name, folder)
    if trainer:
        shrunk(checkpoint)
    return [cases.read(checkpoint.parent)]


def _plan(source: str, settings: Mapping[str, Any], folder: Path) -> Any:
    return plan_conversion(folder / source if source else folder, **settings)


def _plan_blip2(sources: Mapping[str, str], settings: Mapping[str, Any], folder: Path) -> Any:
    return plan_conversion({name: folder / path for name, path in sources.items()}, **settings)


def _blip2() -> tuple[Callable[[Path], Any], str]:
    sys.path.insert(0, str(GOLDEN))
    import blip2_cases
    from golden_case import Case as GoldenCase

    case = GoldenCase(GOLDEN / "cases" / "blip2" / "opt-tiny", "opt-tiny")
    config = case.spec["config"]
    sources = {"checkpoint": config["checkpoint"], "vision": config["vision_checkpoint"], "llm": config["llm_dir"]}
    return partial(_plan_blip2, sources, blip2_cases.settings(case)), "blip2/opt-tiny"


def _target(family: str, case: str, read: Callable[[Path], Any], *, trainer: bool = False) -> Target:
    modules = (f"families/{family}", "converters/", "tokenizers/")
    return Target(f"plan-{family}", partial(_seeds, case, trainer), _change, read, modules=modules)


def _change(rng: Random, case: Case, corpus: list[Case]) -> Case:
    """Companions as often as weights."""
    return change(rng, case, corpus)


TARGETS = (
    _target("ofa", "ofa/cn-tiny", partial(_plan, "ofa_cn_tiny.pt", {}), trainer=True),
    _target("florence2", "florence2/tiny-main", partial(_plan, "", {})),
    _target("paligemma2", "paligemma2/tiny-gemma2", partial(_plan, "paligemma2-tiny-gemma2.npz", {})),
    _target("blip2", _blip2()[1], _blip2()[0]),
    _target("moondream2", "moondream2/tiny-2024-04-02", partial(_plan, "", {"revision": "2024-04-02"})),
)
