"""transformers' TrainingArguments from a recipe, fitted to the machine."""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks, is_deepspeed_zero3_enabled

from weightport.errors import RecipeError
from weightport.finetuning.activation_checkpointing import with_own_name
from weightport.finetuning.metrics.table import METRICS
from weightport.finetuning.training.resuming import CHECKPOINTS
from weightport.finetuning.training.schedules import own_schedule

TENSORBOARD = "tensorboard"


def training_arguments(
    settings: Mapping[str, Any],
    run: Path,
    *,
    evaluates: bool,
    leaves_unused: bool = True,
    stops_early: bool = False,
    explicit: frozenset[str] = frozenset(),
) -> tuple[TrainingArguments, list[str]]:
    """(arguments, notes on what this machine changes). `evaluates`: there is evaluation data. `leaves_unused`: a step
    may leave trained parameters without a gradient. `stops_early`: the run ends when a figure no longer becomes
    better. `explicit`: settings given by hand, which are not fitted. Raises RecipeError for what cannot be."""
    # TrainingArguments writes its defaults into the mappings that it is given.
    values, notes = copy.deepcopy(dict(settings)), []
    if not torch.cuda.is_available():
        for precision in ("fp16", "bf16"):
            if values.get(precision) and f"training.{precision}" not in explicit:
                values[precision] = False
                notes.append(f"{precision} is off: there is no GPU here")
    if stops_early:
        _require_evaluations(values, evaluates=evaluates)
        # The last model of such a run is not its best.
        values.setdefault("load_best_model_at_end", True)
        values.setdefault("metric_for_best_model", "loss")
    if not evaluates:
        values["eval_strategy"] = "no"
        if values.pop("load_best_model_at_end", False):
            notes.append("load_best_model_at_end is off: there is no evaluation data")
        if values.pop("eval_on_start", False):
            notes.append("eval_on_start is off: there is no evaluation data")
    _require_checkpoints_to_choose_from(values)
    best = METRICS.get(str(values.get("metric_for_best_model")).removeprefix("eval_"))
    if best is not None:
        values.setdefault("greater_is_better", best.higher_is_better)
    values = with_own_name(values)
    if own_schedule(values) is not None:
        # PortTrainer makes it.
        values["lr_scheduler_type"] = "constant"
        values.pop("lr_scheduler_kwargs", None)
    values["dataloader_num_workers"] = loader_workers(values)
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    values.setdefault("report_to", "none")
    # transformers' TensorBoard callback knows no other way.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / TENSORBOARD)
    if not torch.accelerator.is_available():
        # accelerate joins several processes without an accelerator only when told that there is none.
        values["use_cpu"] = True
    _require_deepspeed(values)
    # DDP waits for every gradient unless it is told, and warns when it is told for nothing.
    values.setdefault("ddp_find_unused_parameters", leaves_unused)
    try:
        arguments = TrainingArguments(
            output_dir=str(run / CHECKPOINTS),
            remove_unused_columns=False,
            # Trainer would take OFA's label_smoothing for labels too.
            label_names=["labels"],
            disable_tqdm=True,
            # A loss that is no number ends the run instead of being averaged away.
            logging_nan_inf_filter=False,
            **values,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"training: {error}") from error
    _require_whole_weights()
    _require_compiler(arguments)
    _require_reporting(arguments)
    return arguments, notes


def _require_evaluations(values: Mapping[str, Any], *, evaluates: bool) -> None:
    """Raises RecipeError when early stopping would have nothing to go by."""
    if not evaluates:
        raise RecipeError(
            "Early stopping needs evaluations, and there is no evaluation data. Pass --eval-data or --eval-fraction."
        )
    if values.get("eval_strategy", "no") in ("no", False):
        raise RecipeError(
            "Early stopping needs evaluations while training, and training.eval_strategy is no. Set "
            "eval_strategy=epoch, or steps with eval_steps."
        )


def _require_checkpoints_to_choose_from(values: Mapping[str, Any]) -> None:
    """Raises RecipeError where the best model is the result and checkpoints are not saved when there are evaluations.
    transformers would name options that the command does not have."""
    saved, measured = (
        str(values.get(f"{name}_strategy", other)) for name, other in (("save", "steps"), ("eval", "no"))
    )
    if values.get("load_best_model_at_end") and saved not in (measured, "best"):
        raise RecipeError(
            "The best model is taken from a checkpoint (early stopping, training.load_best_model_at_end): "
            f"training.save_strategy is {saved} and training.eval_strategy is {measured}. Set both alike, or "
            "load_best_model_at_end=false."
        )


def _require_deepspeed(values: Mapping[str, Any]) -> None:
    """Raises RecipeError when DeepSpeed is asked for and not installed."""
    asked = "training.deepspeed" if values.get("deepspeed") else ""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        asked = "accelerate's configuration (ACCELERATE_USE_DEEPSPEED)"
    if asked and find_spec("deepspeed") is None:
        raise RecipeError(
            f"{asked} needs DeepSpeed, which is not installed: pip install deepspeed. FSDP does the same with torch "
            "alone: --set fsdp=true."
        )


def _require_whole_weights() -> None:
    """Raises RecipeError for DeepSpeed's stage 3. transformers renames the weights that it loads into it, and would
    save them under names that the base's files do not have."""
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise RecipeError(
            "training.deepspeed: stage 3 of zero_optimization shares weights out, and stages 1 and 2 are what this "
            "command takes. Set stage 2, or let FSDP share the weights out: --set fsdp=true."
        )


def _require_compiler(arguments: TrainingArguments) -> None:
    """Raises RecipeError where torch.compile would find no compiler at its first step: on CPUs it writes C++."""
    inductor = arguments.torch_compile and arguments.torch_compile_backend in (None, "inductor")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if inductor and arguments.device.type == "cpu" and shutil.which(compiler) is None:
        raise RecipeError(
            f"training.torch_compile needs a C++ compiler, and there is no {compiler} (CXX, PATH). Install one, name "
            "it with the environment variable CXX, or leave --compile out."
        )


def shares_weights_out(arguments: TrainingArguments) -> str | None:
    """What divides the weights among processes, FSDP or DeepSpeed, if anything does."""
    if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "FSDP"
    if arguments.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "DeepSpeed"
    return None


def _require_reporting(arguments: TrainingArguments) -> None:
    """Raises RecipeError for a service that is not known or not installed: Trainer would notice after the start."""
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"training.report_to: {error}") from error


def planned_steps(arguments: TrainingArguments, samples: int) -> int:
    """Optimizer steps of a run over a data set of `samples`, as Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    held = arguments.train_batch_size * arguments.world_size
    batches = samples // held if arguments.dataloader_drop_last else math.ceil(samples / held)
    return math.ceil(arguments.num_train_epochs * math.ceil(batches / arguments.gradient_accumulation_steps))


def loader_workers(settings: Mapping[str, Any]) -> int:
    """Processes that read and decode samples: what the recipe says, as far as there are cores for them."""
    return min(int(settings.get("dataloader_num_workers", 0)), os.cpu_count() or 1)
