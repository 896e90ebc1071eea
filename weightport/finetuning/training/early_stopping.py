"""The end of a run that no longer gets better, with a count that survives --resume."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which goes on counting where the checkpoint of a resumed run had come to. A run
    that had been stopped takes no further step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        states: Any = state.stateful_callbacks
        saved = states.get(type(self).__name__, {})
        self.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
        control.should_training_stop = self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether the figure has not become better for as long as it may."""
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)

    def note(self, args: TrainingArguments, state: TrainerState) -> list[str]:
        """A note on a run that ended before its last step."""
        if not self.exhausted or state.global_step >= state.max_steps:
            return []
        name = (args.metric_for_best_model or "loss").removeprefix("eval_")
        times = "1 evaluation" if self.early_stopping_patience == 1 else f"{self.early_stopping_patience} evaluations"
        best = f"{state.best_metric:.4g}" if state.best_metric is not None else "none"
        return [
            f"stopped early at step {state.global_step:,} of {state.max_steps:,}: {name} was not better than {best} "
            f"in {times}"
        ]
