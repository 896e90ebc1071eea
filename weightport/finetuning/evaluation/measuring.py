"""What a run does at each evaluation: answer the data, write the answers, show a few, score them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weightport.finetuning.data.samples import Samples
from weightport.finetuning.display.previews import preview_lines
from weightport.finetuning.display.progress import ProgressLine
from weightport.finetuning.evaluation.answering import World, answers, chosen, write_predictions
from weightport.finetuning.evaluation.predictions import Prediction
from weightport.finetuning.metrics import score_all
from weightport.finetuning.recipes.settings import Recipe
from weightport.finetuning.setup.preparing import Prepared

PREDICTIONS = "predictions"


class Measuring:
    """Called with the model and the step; metrics by name, the same in every process. `predictions` are the last."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        prepared: Prepared,
        samples: Samples,
        progress: ProgressLine,
        say: Callable[[str], None],
    ) -> None:
        self.predictions: list[Prediction] = []
        self._run = run
        self._recipe = recipe
        self._prepared = prepared
        self._samples = samples
        self._progress = progress
        self._say = say

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        recipe, loaded, arguments = self._recipe, self._prepared.loaded, self._prepared.arguments
        world = World(arguments.process_index, arguments.world_size)
        indices = chosen(len(self._samples), recipe.evaluation.samples)
        self.predictions = answers(
            model,
            loaded.processor,
            loaded.family,
            self._samples,
            indices,
            recipe.batch,
            recipe.evaluation,
            skip_bad=recipe.data.skip_bad,
            workers=arguments.dataloader_num_workers,
            autocast=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
            world=world,
            advance=self._progress.answering(len(indices[world.rank :: world.size])),
        )
        if world.rank == 0:
            write_predictions(self._run / PREDICTIONS / f"step-{step:06}.jsonl", self.predictions)
        for line in preview_lines(self.predictions, recipe.evaluation.previews):
            self._say(line)
        return score_all(recipe.evaluation.metrics, self.predictions)
