"""The options in a fairseq checkpoint, whichever of fairseq's three ways they were saved in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weightport.checkpoints.pickle.records import Record
from weightport.checkpoints.shown import shown
from weightport.errors import ConfigurationError
from weightport.families.ofa.omegaconf import to_plain, unwrapped

Flavour = Literal["args", "cfg", "omegaconf"]


@dataclass(frozen=True)
class FairseqOptions:
    """What the model of a fairseq checkpoint was built with, as plain Python data.

    `model` and `task` are flat: option name to value. `flavour` says how the file keeps them: `args`, one Namespace
    for everything (so `model` and `task` are the same options); `cfg`, a dictionary of groups; `omegaconf`, the same
    as a pickled DictConfig. `groups` has all groups of the latter two (`common`, `optimization`, …). Values that were
    never set are "???", and interpolations such as "${common.seed}" stay text: no resolving was done.
    """

    model: Mapping[str, Any]
    task: Mapping[str, Any]
    flavour: Flavour
    groups: Mapping[str, Any]

    @property
    def architecture(self) -> str | None:
        """The registered name of the model's architecture, such as "ofa_base"; None where the file names none."""
        return _name(self.model, "arch", "_name")

    @property
    def task_name(self) -> str | None:
        """The registered name of the task, such as "caption"; None where the file names none."""
        return _name(self.task, "_name", "task") if self.flavour != "args" else _name(self.task, "task")


def is_fairseq(document: Any) -> bool:
    """Whether `document` is laid out as fairseq's trainer does: a model beside options."""
    return isinstance(document, dict) and "model" in document and _options(document) is not None


def fairseq_options(document: Any) -> FairseqOptions:
    """The options of the fairseq checkpoint that `document` (Checkpoint.document) comes from.

    As in fairseq itself, `args` wins where it is not None. Raises ConfigurationError where there are no options, or
    they are of none of the three kinds.
    """
    options = _options(document) if isinstance(document, dict) else None
    if options is None:
        keys = shown(tuple(document)) if isinstance(document, dict) else type(document).__name__
        raise ConfigurationError(
            f"Expected a fairseq checkpoint with its options under 'args' or 'cfg', found {keys}. A file with weights "
            "alone does not say how the model was built."
        )
    kind, value = options
    plain = to_plain(value)
    if not isinstance(plain, dict):
        raise ConfigurationError(f"The checkpoint's {kind!r} should hold options by name, but is {shown(value)}.")
    plain = {str(name): item for name, item in plain.items()}
    if kind == "args":
        return FairseqOptions(plain, plain, "args", {})
    flavour: Flavour = "omegaconf" if isinstance(value, Record) else "cfg"
    return FairseqOptions(_group(plain, "model"), _group(plain, "task"), flavour, plain)


def _options(document: Mapping[str, Any]) -> tuple[Literal["args", "cfg"], Any] | None:
    for kind in ("args", "cfg"):
        if unwrapped(document.get(kind)) is not None:
            return kind, document[kind]
    return None


def _group(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    group = options.get(name)
    if group is None:
        return {}
    if isinstance(group, Record):
        # A dataclass of fairseq's own, pickled as it is.
        group = {key: to_plain(value) for key, value in {**group.entries, **group.fields}.items()}
    if not isinstance(group, dict):
        raise ConfigurationError(f"The checkpoint's cfg[{name!r}] should hold options by name, but is {shown(group)}.")
    return {str(key): value for key, value in group.items()}


def _name(options: Mapping[str, Any], *keys: str) -> str | None:
    return next((options[key] for key in keys if isinstance(options.get(key), str)), None)
