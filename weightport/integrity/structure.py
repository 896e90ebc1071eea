"""Configuration against tensors: the native class on the meta device, and the names and shapes that it would load."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from weightport.checkpoints import Checkpoint
from weightport.converters.name_spaces import NameSpace, meta_model, name_space_of
from weightport.errors import WeightportError
from weightport.integrity.findings import Finding, listed, unchecked, warning, wrong
from weightport.integrity.notices import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from weightport.converters.family import ConversionStage


class VerifiedFamily(Protocol):
    """What a verification needs of a model's family."""

    @property
    def name(self) -> str: ...

    @property
    def conversion(self) -> ConversionStage: ...


@dataclass(frozen=True)
class Loaded:
    """A model on the meta device, and where its tensors are stored."""

    model: PreTrainedModel
    names: NameSpace


def load_on_meta(
    directory: Path, config: Mapping[str, Any], checkpoint: Checkpoint
) -> tuple[Loaded | None, list[Finding]]:
    """(the model with the names of the directory's tensors, None where there is no class for it; what is wrong)."""
    if (why := _without_class(config)) is not None:
        return None, [unchecked("model", why)]
    try:
        model = meta_model(directory)
        names = name_space_of(model, {name: ref.shape for name, ref in checkpoint.items()})
    except WeightportError as error:
        return None, [wrong(CONFIG, str(error).removeprefix(f"{directory / CONFIG} "))]
    except Exception as error:
        # Configurations validate themselves, each with exceptions of its own.
        text = " ".join(str(error).split())
        return None, [wrong(CONFIG, f"builds no model ({type(error).__name__}: {text[:200]})")]
    return Loaded(model, names), _met(model, names)


def check_names(family: VerifiedFamily, loaded: Loaded, checkpoint: Checkpoint) -> list[Finding]:
    """Whether the tensors are named as the native class's files are, not as its running model calls them: programs
    that serve models read the former."""
    expected = family.conversion.targets(loaded.model.config).shapes
    tied = {loaded.names.stored_name(name) for name in loaded.names.bound}
    others = [name for name in checkpoint if name not in expected and name not in tied]
    lost = [name for name in expected if name not in checkpoint.tensors]
    if not others and not lost:
        return []
    return [
        warning(
            "names",
            f"{len(others)} tensors load, but have other names than the files of {loaded.names.architecture} "
            f"({listed(others, 3)}; expected {listed(lost, 3)}): serving engines look for the latter",
        )
    ]


def _without_class(config: Mapping[str, Any]) -> str | None:
    """Why no class of transformers or weightport can be asked; None where one can."""
    import transformers
    from transformers import CONFIG_MAPPING

    import weightport.modeling  # noqa: F401 - registers with the Auto classes

    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING:
        return None
    code = ", and its own code is not run" if "auto_map" in config else ""
    return (
        f"transformers {transformers.__version__} knows no model_type {model_type!r}{code}: names and shapes unknown"
    )


def _met(model: PreTrainedModel, names: NameSpace) -> list[Finding]:
    """Tensors that the model lacks, does not take, or takes in another shape."""
    absent = [
        name
        for name in names.shapes
        if name not in names.made_of and name not in names.tied and name not in names.permuted
    ]
    missing = _unless(absent, getattr(model, "_keys_to_ignore_on_load_missing", None))
    surplus = _unless(names.unused, getattr(model, "_keys_to_ignore_on_load_unexpected", None))
    found = []
    if missing:
        found.append(
            wrong("tensors", f"{len(missing)} that the configuration asks for are missing: {listed(missing)}")
        )
    if surplus:
        found.append(wrong("tensors", f"{len(surplus)} have no place in the configured model: {listed(surplus)}"))
    for name, shape in names.shapes.items():
        if (stored := _stored_shape(names, name)) not in (None, shape):
            text = f"{names.made_of[name][0].stored} gives {list(stored or ())}, the configuration {list(shape)}"
            found.append(wrong("tensors", text))
    return found


def _stored_shape(names: NameSpace, name: str) -> tuple[int, ...] | None:
    """What the stored blocks of a tensor come to; None where they are not known."""
    pieces = names.made_of.get(name)
    if not pieces:
        return None
    rank = len(pieces[0].axes)
    return tuple(max(piece.start[axis] + piece.extent(axis) for piece in pieces) for axis in range(rank))


def _unless(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    ignored = [re.compile(pattern) for pattern in patterns or ()]
    return [name for name in names if not any(pattern.search(name) for pattern in ignored)]
