"""What no reference is needed for: a sample computes the same alone, among others, behind padding, and step by step.

Each check compares the native model with itself, in the same dtype: both sides round, so twice float32's noise is
allowed. Positions that are padding are left out: their values have no meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from weightport.checkpoints import TensorRef
from weightport.parity.compare import Comparison, Place, compare
from weightport.parity.family import Family
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
    model: PreTrainedModel, family: Family, arguments: Mapping[str, Any], place: Place
) -> Iterator[Comparison | NotCompared]:
    """`arguments`: what a forward run gives the native model, as a batch."""
    if not model.config.is_encoder_decoder:
        yield from _of_decoder(model, family, arguments, place)
        return
    whole = _logits(model, arguments)
    ids = arguments.get("decoder_input_ids")
    if ids is None:
        yield from (NotCompared(place.run, seam, "the run has no target to decode") for seam in INVARIANCES)
        return
    pad = model.config.get_text_config().pad_token_id
    real = ids != pad
    yield _batch_check(model, arguments, whole, real, place)
    if bool(real[:, -1].any()) or bool(real[:, 0].all()):
        try:
            padded = _logits(model, _padded(arguments, pad))
        except ValueError as error:
            yield NotCompared(place.run, PADDING, f"the model takes no longer inputs: {error}")
        else:
            yield _compared(PADDING, padded[:, : ids.shape[1]], whole, real, place)
    steps = min(STEPS, ids.shape[1])
    yield _compared(CACHE, _stepwise(model, arguments, steps), whole[:, :steps], real[:, :steps], place)


def _of_decoder(
    model: PreTrainedModel, family: Family, arguments: Mapping[str, Any], place: Place
) -> Iterator[Comparison | NotCompared]:
    """The checks of a model whose decoder reads image, prompt and answer in one sequence."""
    ids = arguments.get("input_ids")
    if ids is None:
        yield from (NotCompared(place.run, seam, "the run has no text") for seam in INVARIANCES)
        return
    mask = arguments.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    # A family may keep the logits that its references hold; here those of every column are compared.
    arguments = {name: value for name, value in arguments.items() if name != "logits_to_keep"}
    whole = _text_logits(model, arguments, ids.shape[1])
    yield _batch_check(model, arguments, whole, real, place)

    # Padding goes where the batch has it: behind the text, unless it stands before some sample's.
    left = not bool(real[:, 0].all())
    try:
        padded = _text_logits(model, _wider(model, arguments, left=left), ids.shape[1] + ADDED)
    except (ValueError, IndexError) as error:
        yield NotCompared(place.run, PADDING, f"the model takes no longer inputs: {error}")
    else:
        columns = slice(ADDED, None) if left else slice(ids.shape[1])
        yield _compared(PADDING, padded[:, columns], whole, real, place)

    decoded = torch.zeros_like(real)
    stepped = torch.zeros_like(whole)
    for row in range(len(ids)):
        sample = _unpadded(_row(arguments, row, len(ids)), real[row], ids.shape[1])
        prefix = family.prefix(sample, model.config)
        logits = _decoded(model, sample, prefix)
        if logits.shape[1] > prefix:
            places = real[row].nonzero().flatten()[: logits.shape[1]]
            decoded[row, places] = True
            stepped[row, places] = logits[0]
    if bool(decoded.any()):
        yield _compared(CACHE, stepped, whole, decoded, place)
    else:
        yield NotCompared(place.run, CACHE, "the run has no token behind what the model reads at once")


def _batch_check(
    model: PreTrainedModel, arguments: Mapping[str, Any], whole: torch.Tensor, real: torch.Tensor, place: Place
) -> Comparison | NotCompared:
    rows, columns = real.shape
    if rows == 1:
        return NotCompared(place.run, BATCH, "the run has one sample only")
    alone = torch.cat([_text_logits(model, _row(arguments, row, rows), columns) for row in range(rows)])
    return _compared(BATCH, alone, whole, real, place)


def _logits(model: PreTrainedModel, arguments: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments, use_cache=False).logits


def _text_logits(model: PreTrainedModel, arguments: Mapping[str, Any], columns: int) -> torch.Tensor:
    """Logits of the `columns` of text; some models give those of the image before them."""
    return _logits(model, arguments)[:, -columns:]


def _row(arguments: Mapping[str, Any], row: int, batch: int) -> dict[str, Any]:
    """One sample of the batch, with the padding it has there, and all of its images."""

    def of_row(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim or value.shape[0] % batch:
            return value
        each = value.shape[0] // batch
        return value[row * each : (row + 1) * each]

    return {name: of_row(value) for name, value in arguments.items()}


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


def _wider(model: PreTrainedModel, arguments: Mapping[str, Any], *, left: bool) -> dict[str, Any]:
    """Every tensor with a column for each of `input_ids` with columns of masked padding beside it."""
    ids = arguments["input_ids"]
    pad = model.config.get_text_config().pad_token_id
    given = {"attention_mask": torch.ones_like(ids), **arguments}
    return {
        name: torch.nn.functional.pad(
            value, (ADDED, 0) if left else (0, ADDED), value=(pad or 0) if name == "input_ids" else 0
        )
        if _by_column(value, ids.shape[1])
        else value
        for name, value in given.items()
    }


def _unpadded(sample: Mapping[str, Any], real: torch.Tensor, columns: int) -> dict[str, Any]:
    return {name: value[:, real] if _by_column(value, columns) else value for name, value in sample.items()}


def _by_column(value: Any, columns: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == columns


def _decoded(model: Any, sample: Mapping[str, Any], prefix: int) -> torch.Tensor:
    """Logits of one sample's first columns, computed as `generate` does: `prefix` of them read at once, each one after
    from the cache that those before it left."""
    given = dict(sample)
    ids = given.pop("input_ids")
    mask = given.pop("attention_mask", torch.ones_like(ids))
    given.setdefault("position_ids", torch.arange(ids.shape[1], device=ids.device)[None])
    last = min(prefix + STEPS, ids.shape[1])
    cache, logits = None, []
    for start, end in ((0, prefix), *((step, step + 1) for step in range(prefix, last))):
        part = {name: value[:, :end] if _by_column(value, ids.shape[1]) else value for name, value in given.items()}
        inputs = model.prepare_inputs_for_generation(
            ids[:, :end],
            next_sequence_length=end - start,
            past_key_values=cache,
            attention_mask=mask[:, :end],
            is_first_iteration=not start,
            use_cache=True,
            **part,
        )
        with torch.no_grad():
            output = model(**inputs)
        cache = output.past_key_values
        logits.append(output.logits[:, start - end :])
    return torch.cat(logits, dim=1)


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
    ref = TensorRef.of(seam, tuple(reference.shape), reference.dtype, lambda: reference)
    return compare(Observed(value[real]), Expected(seam, place.dtype, ref), place)
