"""Whether an adapter's base is the one at hand, as far as it says: by hash, else by architecture and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from weightport.adapters.base.base_model import Base
from weightport.adapters.base.base_record import recorded_base
from weightport.adapters.reading.lora_tensors import LoraAdapter
from weightport.checkpoints.formats.sharded import read_json
from weightport.errors import AdapterError, CheckpointError


def identify(base: Base, adapter: LoraAdapter, hashes: Iterable[str] | None) -> str:
    """In words, how it is known that `adapter` belongs to `base`; its modules and shapes fit already.

    hashes: SHA-256 of the base's weight files, where they are known. Raises AdapterError where the adapter names
    another architecture, or has recorded other weights.
    """
    expected = recorded_base(adapter.path)
    if expected is not None and hashes is not None:
        if not set(hashes) <= expected:
            raise AdapterError(
                f"{adapter.path} was trained on a base whose weights have another SHA-256 than those in {base.path}. "
                "Merge it into the base it was trained on; if the weights were only saved again, remove base.json "
                "from the adapter."
            )
        return "the base by its SHA-256 (base.json)"
    named = adapter.settings.base_model
    said = f"; it names {named}" if named else ""
    trained = _trained_architecture(adapter)
    if trained is not None and trained not in _architectures(base):
        _require_type(base, adapter, _type_of_class(trained), trained)
    folder = Path(named) if named else None
    if folder is not None and (folder / "config.json").is_file():
        if folder.resolve() == base.path.resolve():
            return "the base by its folder, architecture and shapes"
        _require_type(base, adapter, _type_in(folder), str(folder))
    return f"the base by architecture and shapes{said}" if trained else f"the base by names and shapes{said}"


def _trained_architecture(adapter: LoraAdapter) -> str | None:
    """The class that the adapter was trained on, as peft notes it for adapters without a task."""
    mapping = adapter.settings.data.get("auto_mapping")
    found = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return found if isinstance(found, str) else None


def _architectures(base: Base) -> list[str]:
    return [name for name in base.config.get("architectures") or () if isinstance(name, str)]


def _require_type(base: Base, adapter: LoraAdapter, found: str | None, where: str) -> None:
    # An original's remote code may have the class under another type: its names have been brought over by now.
    if found is None or found == base.model_type or adapter.ported is not None:
        return
    raise AdapterError(
        f"{adapter.path} was trained on another architecture: found {where} ({found}), expected "
        f"{', '.join(_architectures(base)) or 'a model'} ({base.model_type}), which {base.path} is. Merge it into the "
        "model it was trained on."
    )


def _type_of_class(name: str) -> str | None:
    """The model_type of transformers' class `name`; None for a class that it does not have."""
    import transformers

    config = getattr(getattr(transformers, name, None), "config_class", None)
    return getattr(config, "model_type", None)


def _type_in(folder: Path) -> str | None:
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        return None
    return config.get("model_type") if isinstance(config, dict) else None
