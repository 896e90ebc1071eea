"""Whether an adapter's base is the one at hand, as far as it says: by hash, else by architecture and shapes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from weightport.adapters.base.base_model import Base
from weightport.adapters.base.base_record import recorded_base
from weightport.adapters.reading.lora_tensors import LoraAdapter
from weightport.checkpoints.formats.sharded import read_json
from weightport.errors import AdapterError, CheckpointError


def states_base(adapter: LoraAdapter) -> bool:
    """Whether the adapter says anything of the base it was trained on."""
    known = recorded_base(adapter.path) is not None or _trained_architecture(adapter) is not None
    return known or adapter.settings.base_model is not None


def identify(base: Base, adapter: LoraAdapter, hashes: Iterable[str] | None, earlier: Sequence[str]) -> str:
    """In words, how it is known that `adapter` belongs to `base`; its modules and shapes fit already.

    hashes: SHA-256 of the base's weight files, where they are known. earlier: the adapter's modules under names
    that the files or an earlier transformers have, and today's model has not. Raises AdapterError where the adapter
    names another architecture, has recorded other weights, or says nothing of its base and has such names.
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
    if not states_base(adapter):
        _require_todays_names(base, adapter, earlier)
    folder = _configuration_folder(named)
    if folder is not None:
        if folder.resolve() == base.path.resolve():
            return "the base by its folder, architecture and shapes"
        _require_type(base, adapter, _type_in(folder), str(folder))
    return f"the base by architecture and shapes{said}" if trained else f"the base by names and shapes{said}"


def _require_todays_names(base: Base, adapter: LoraAdapter, earlier: Sequence[str]) -> None:
    # One class's names of yesterday are another's of today (Qwen2-VL's and Llama's), and shapes may agree.
    if earlier and adapter.ported is None:
        raise AdapterError(
            f"{adapter.path} says nothing of its base, and peft would not load it into {base.path}: expected names of "
            f"today's {', '.join(_architectures(base)) or base.model_type}, found {earlier[0]}. If it was trained on "
            "this model under an earlier transformers, set base_model_name_or_path in its adapter_config.json to the "
            "model's directory."
        )


def _configuration_folder(named: str | None) -> Path | None:
    """Where the configuration of the base that the adapter names is at hand: its folder, or the Hub's cache."""
    if not named:
        return None
    if (Path(named) / "config.json").is_file():
        return Path(named)
    if not _may_be_cached(named):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(named, "config.json")
    except ValueError:  # no name that the Hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _may_be_cached(named: str) -> bool:
    """Whether the Hub's cache has a folder for `named`: to ask it costs imports that a merge has no other use for."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return os.path.isdir(os.path.join(HF_HUB_CACHE, f"models--{named.replace('/', '--')}"))


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
