"""What no reference is needed for: a sample computes the same alone, among others, behind padding, and step by step.

Each check compares the native model with itself, in the same dtype: both sides round, so twice float32's noise is
allowed. Positions of the target that are padding are left out: their values have no meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from weightport.checkpoints import TensorRef
from weightport.parity.compare import Comparison, Place, compare
from weightport.parity.reference import Expected
from weightport.parity.report import NotCompared
from weightport.parity.seams import Observed

BATCH, PADDING, CACHE = "invariance.batch", "invariance.padding", "invariance.cache"
INVARIANCES = (BATCH, PADDING, CACHE)
ADDED = 3
"""Columns of padding that the padding check appends to source and target."""

STEPS = 12
"""Tokens that the cache check decodes one by one."""

MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def check_invariances(
    model: PreTrainedModel, arguments: Mapping[str, Any], place: Place
) -> Iterator[Comparison | NotCompared]:
    """`arguments`: what a forward run gives the native model, as a batch."""
    whole = _logits(model, arguments)
    ids = arguments.get("decoder_input_ids")
    if ids is None:
        yield from (NotCompared(place.run, seam, "the run has no target to decode") for seam in INVARIANCES)
        return
    pad = model.config.get_text_config().pad_token_id
    real = ids != pad
    if len(ids) > 1:
        alone = torch.cat([_logits(model, _row(arguments, row, len(ids))) for row in range(len(ids))])
        yield _compared(BATCH, alone, whole, real, place)
    else:
        yield NotCompared(place.run, BATCH, "the run has one sample only")
    if bool(real[:, -1].any()) or bool(real[:, 0].all()):
        try:
            padded = _logits(model, _padded(arguments, pad))
        except ValueError as error:
            yield NotCompared(place.run, PADDING, f"the model takes no longer inputs: {error}")
        else:
            yield _compared(PADDING, padded[:, : ids.shape[1]], whole, real, place)
    steps = min(STEPS, ids.shape[1])
    yield _compared(CACHE, _stepwise(model, arguments, steps), whole[:, :steps], real[:, :steps], place)


def _logits(model: PreTrainedModel, arguments: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments, use_cache=False).logits


def _row(arguments: Mapping[str, Any], row: int, batch: int) -> dict[str, Any]:
    """One sample of the batch, with the padding it has there."""
    return {name: value[row : row + 1] if _batched(value, batch) else value for name, value in arguments.items()}


def _batched(value: Any, batch: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch


def _padded(arguments: Mapping[str, Any], pad: int) -> dict[str, Any]:
    """Source and target with columns of masked padding behind them."""
    longer = dict(arguments)
    for name, mask in MASKS.items():
        ids = arguments.get(name)
        if ids is None:
            continue
        attended = arguments.get(mask)
        attended = torch.ones_like(ids) if attended is None else attended
        longer[name] = torch.nn.functional.pad(ids, (0, ADDED), value=pad)
        longer[mask] = torch.nn.functional.pad(attended, (0, ADDED), value=0)
    return longer


def _stepwise(model: PreTrainedModel, arguments: Mapping[str, Any], steps: int) -> torch.Tensor:
    """Logits of the first `steps` target positions, each decoded from the cache that those before it left."""
    given = {
        name: value for name, value in arguments.items() if name not in MASKS.values() or name == "attention_mask"
    }
    ids, mask = given.pop("decoder_input_ids"), arguments.get("decoder_attention_mask")
    cache, logits = None, []
    for step in range(steps):
        if mask is not None:
            given["decoder_attention_mask"] = mask[:, : step + 1]
        with torch.no_grad():
            output = model(**given, decoder_input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _compared(seam: str, value: torch.Tensor, whole: torch.Tensor, real: torch.Tensor, place: Place) -> Comparison:
    reference = whole[real].cpu()
    ref = TensorRef(seam, tuple(reference.shape), reference.dtype, lambda: reference)
    return compare(Observed(value[real]), Expected(seam, place.dtype, ref), place)
