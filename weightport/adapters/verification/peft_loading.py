"""Adapters in peft, whose own reading of an adapter_config.json knows neither limits nor one kind of error."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.adapters.reading.lora_config import CONFIG
from weightport.adapters.reading.lora_settings import LoraSettings, require_fields
from weightport.checkpoints.formats.sharded import read_json
from weightport.errors import AdapterError

if TYPE_CHECKING:
    import torch


def load_adapter(model: Any, folder: Path, name: str = "default", **options: Any) -> Any:
    """`model` with the LoRA adapter in `folder` under `name`, by peft (a PeftModel gets one more).

    Raises AdapterError where peft cannot load it, and for patterns that would match for ever.
    """
    from peft import PeftModel

    require_bounded(model, folder)
    try:
        if isinstance(model, PeftModel):
            missing = model.load_adapter(folder, name, **options).missing_keys
            if missing:
                # As peft says it of a first adapter.
                warnings.warn(f"Found missing adapter keys while loading the checkpoint: {missing}.", stacklevel=2)
            return model
        return PeftModel.from_pretrained(model, folder, name, **options)
    except (ValueError, RuntimeError) as error:
        raise AdapterError(f"{folder} does not fit the model: {error}") from error
    except Exception as error:
        # peft checks its settings as it uses them: whatever stands there wrongly may raise anything.
        raise AdapterError(f"peft cannot load {folder}: {type(error).__name__}: {error}") from error


def require_bounded(model: torch.nn.Module, folder: Path) -> None:
    """Raises AdapterError when the adapter's settings are malformed, or match the model's modules for too long."""
    where = str(folder / CONFIG)
    data = read_json(folder / CONFIG)
    if not isinstance(data, Mapping):
        raise AdapterError(f"{where} should hold a JSON object; found {type(data).__name__}.")
    if data.get("peft_type") == "LORA":
        require_fields(data, where)
    else:
        # Other methods have the names of the modules in common with LoRA.
        data = {
            field: data[field] for field in ("target_modules", "exclude_modules") if isinstance(data.get(field), str)
        }
    LoraSettings(data).require_bounded([name for name, _ in model.named_modules()], where)
