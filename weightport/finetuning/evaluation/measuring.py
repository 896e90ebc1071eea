"""What a run does at each evaluation: answer the data, write the answers, show a few, score them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weightport.errors import OutputError
from weightport.finetuning.data.samples import Samples
from weightport.finetuning.display.previews import preview_lines
from weightport.finetuning.display.progress import ProgressLine
from weightport.finetuning.evaluation.answering import World, answers, chosen, read_predictions, write_predictions
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics import score_all
from weightport.finetuning.recipes.settings import Recipe
from weightport.finetuning.setup.precision import autocast_dtype
from weightport.finetuning.setup.preparing import Prepared

PREDICTIONS = "predictions"


class Measuring:
    """Called with the model and the step; metrics by name, the same in every process. `notes`: on answers that could
    not be written."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        prepared: Prepared,
        samples: Samples,
        progress: ProgressLine,
        say: Callable[[str], None],
    ) -> None:
        self.notes: list[str] = []
        self._latest: tuple[int, list[Prediction]] = (-1, [])
        self._run = run
        self._recipe = recipe
        self._prepared = prepared
        self._samples = samples
        self._progress = progress
        self._say = say

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        found = self._measured(model, step, autocast_dtype(self._prepared.arguments))
        lines = preview_lines(self._latest[1], self._recipe.evaluation.previews)
        if lines:
            self._say(f"the model's answers at step {step:,} beside the references of the data:")
        for line in lines:
            self._say(line)
        return found

    def as_saved(self, model: Any, step: int) -> dict[str, float]:
        """Measure the model of `step` once more in its own dtype, as `weightport evaluate` will; its answers take the
        place of those before."""
        return self._measured(model, step, None)

    def _measured(self, model: Any, step: int, autocast: torch.dtype | None) -> dict[str, float]:
        recipe, loaded, arguments = self._recipe, self._prepared.loaded, self._prepared.arguments
        world = World(arguments.process_index, arguments.world_size)
        indices = chosen(len(self._samples), recipe.evaluation.samples)
        predictions = answers(
            model,
            loaded.processor,
            loaded.family,
            self._samples,
            indices,
            recipe.batch,
            recipe.evaluation,
            skip_bad=recipe.data.skip_bad,
            workers=arguments.dataloader_num_workers,
            autocast=autocast,
            world=world,
            advance=self._progress.answering(len(indices[world.rank :: world.size])),
        )
        if world.rank == 0:
            self._write(step, predictions)
        self._latest = step, predictions
        return score_all(recipe.evaluation.metrics, predictions)

    def predictions_at(self, step: int) -> list[Prediction]:
        """The answers of the model at `step`, of this session or of one before it; nothing where they are gone."""
        return self._latest[1] if self._latest[0] == step else read_predictions(self._file(step))

    def _write(self, step: int, predictions: list[Prediction]) -> None:
        try:
            write_predictions(self._file(step), predictions)
        except OutputError as error:
            # The model that is being trained is worth more than a page of its answers.
            self.notes.append(f"the answers at step {step:,} are not kept: {error}")

    def _file(self, step: int) -> Path:
        return self._run / PREDICTIONS / f"step-{step:06}.jsonl"
