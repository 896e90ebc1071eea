"""Versions of transformers that are known to be wrong for a model: a dated table, one rule a fault.

A directory's config.json says which version wrote it, weightport's training.json which one trained it. A rule speaks
of the faulty version, not of the directory: whether the weights suffered depends on what was done with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightport.integrity.findings import Finding, warning

Release = tuple[int, ...]


@dataclass(frozen=True)
class KnownFault:
    """`model_types` of config.json; versions from `first` up to, and without, `fixed` (None: not fixed). `reads`: the
    fault is in loading the directory's own code, whatever version wrote it. `what` goes wrong and `todo`."""

    model_types: tuple[str, ...]
    first: Release
    fixed: Release | None
    what: str
    todo: str
    source: str
    checked: str
    reads: bool = False

    def holds(self, version: Release) -> bool:
        return self.first <= version and (self.fixed is None or version < self.fixed)


FAULTS = (
    KnownFault(
        ("florence2",), (4, 57, 0), (5, 13, 0),
        "shifts the labels twice in training: a fine-tune made with it learnt to give the token after the next one",
        "If the weights were trained with it, train again; converted or merged weights are not touched.",
        "transformers #46897; the loss's arguments in 4.57.0, 5.12.1 and 5.13.0", "2026-11",
    ),
    KnownFault(
        ("blip-2", "blip_2"), (4, 52, 1), (4, 53, 0),
        "generates wrong answers with BLIP-2",
        "Measurements made with it do not count; the weights are not touched.",
        "transformers #38858", "2026-11",
    ),
    KnownFault(
        ("paligemma",), (4, 48, 0), (4, 49, 0),
        "masks the padding of PaliGemma wrongly, in training and in batches",
        "If the weights were trained with it, train again; converted or merged weights are not touched.",
        "transformers #35855", "2026-11",
    ),
    KnownFault(
        ("moondream1",), (5, 0, 0), None,
        "loads moondream2's remote code with buffers that are not initialised, and answers garbage",
        "Convert the folder (port-moondream2 FOLDER OUT).",
        "pipecat #5856", "2026-11", reads=True,
    ),
    KnownFault(
        ("internvl_chat",), (5, 0, 0), None,
        "cannot load InternVL's remote code, which asks tensors on the meta device for their values",
        "Take the repository written for transformers (its name ends in -hf).",
        "InternVL #1254", "2026-11", reads=True,
    ),
)  # fmt: skip


def known_faults(
    config: Mapping[str, Any], training: Mapping[str, Any] | None = None, running: str | None = None
) -> list[Finding]:
    """The rules that speak of a directory with this config.json and training.json.

    `running` is the version of transformers that would load it, by default the one that is installed.
    """
    wrote = config.get("transformers_version")
    versions = training.get("versions") if isinstance(training, Mapping) else None
    trained = versions.get("transformers") if isinstance(versions, Mapping) else None
    # A conversion or a merge rewrites nothing that its reader computed; a record of the training knows better.
    told: list[tuple[str, object, str]] = [("written by", wrote, "config.json")]
    if trained:
        told = [("trained by", trained, "training.json")]
    found = []
    for fault in FAULTS:
        if config.get("model_type") not in fault.model_types:
            continue
        cases: list[tuple[str, object, str]]
        if fault.reads:
            cases = [("remote code, for", running or _installed(), "config.json")] if "auto_map" in config else []
        else:
            cases = told
        for verb, version, file in cases:
            if (parsed := release_of(version)) is not None and fault.holds(parsed):
                text = f"{verb} transformers {version}, which {fault.what} ({fault.source}). {fault.todo}"
                found.append(warning(file, text))
    return found


def release_of(version: object) -> Release | None:
    """4.57.0.dev0 as (4, 57, 0); None for what is no version. A development version counts as its release."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    return tuple(int(part or 0) for part in found.groups()) if found else None


def _installed() -> str:
    from importlib.metadata import version

    return version("transformers")
