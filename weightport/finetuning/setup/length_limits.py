"""A recipe's lengths, fitted to what the model has positions for."""

from __future__ import annotations

from dataclasses import replace

from weightport.finetuning.recipes.settings import Recipe
from weightport.finetuning.setup.model_loading import Loaded


def fitted(recipe: Recipe, loaded: Loaded) -> tuple[Recipe, list[str]]:
    """(the recipe with lengths that the model can hold, notes on what that changes).

    A prompt or answer beyond the model's positions would end a run in its middle.
    """
    room = loaded.family.room(loaded.processor, loaded.model.config)
    batch, evaluation, notes = recipe.batch, recipe.evaluation, []
    if batch.max_prompt_length is None or batch.max_prompt_length > room.prompt:
        if batch.max_prompt_length is not None:
            notes.append(_note("batch.max_prompt_length", batch.max_prompt_length, room.prompt))
        batch = replace(batch, max_prompt_length=room.prompt)
    if batch.max_target_length > room.answer:
        notes.append(_note("batch.max_target_length", batch.max_target_length, room.answer))
        batch = replace(batch, max_target_length=room.answer)
    wanted = evaluation.generation.get("max_new_tokens")
    if isinstance(wanted, int) and wanted > room.answer:
        notes.append(_note("evaluation.generation.max_new_tokens", wanted, room.answer))
        evaluation = replace(evaluation, generation={**evaluation.generation, "max_new_tokens": room.answer})
    return replace(recipe, batch=batch, evaluation=evaluation), notes


def _note(name: str, wanted: int, limit: int) -> str:
    return f"{name} is {limit}, not {wanted}: the model has no more positions"
