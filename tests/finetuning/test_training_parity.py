"""The trainer's own loss and gradients against the original's, for every golden case with a training run.

The cases' references and the comparison are the parity runner's; only the step is PortTrainer's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainingArguments

from weightport.api import check_parity, convert
from weightport.finetuning.data.collation import INDICES
from weightport.finetuning.training.trainer import PortTrainer, loss_of_samples
from weightport.parity import runner
from weightport.parity.family import Family
from weightport.parity.originals import Originals
from weightport.parity.reference import Expected, Run, read_reference
from weightport.parity.seams import Observations, observe
from weightport.parity.training import AFTER, _exact_loss, _is_gradient, _record_originals, _unchanged

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))

import blip2_cases  # noqa: E402 - found beside the cases
import florence2_cases  # noqa: E402
import moondream2_cases  # noqa: E402
import ofa_cases  # noqa: E402
import paligemma2_cases  # noqa: E402
from golden_case import Case, find_cases, sources_of  # noqa: E402

TABLES = {
    table.FAMILY: table for table in (ofa_cases, florence2_cases, paligemma2_cases, blip2_cases, moondream2_cases)
}


def with_training(case: Case) -> bool:
    """Whether the original has trained on the case, and the trainer's step fits beside the other tests."""
    if case.family not in TABLES or not case.checkpoints or case.adapter or case.large:
        return False
    if case.family == blip2_cases.FAMILY:
        return "loss" in case.tensors
    trained = ("train.", "grad_norm.")
    return bool(case.spec.get("training")) or any(name.startswith(trained) for name in case.tensors)


CASES = [pytest.param(case, id=case.name) for case in find_cases(GOLDEN / "cases") if with_training(case)]


class Counting:
    """What the trainer was asked to do, so that a test that trains nothing cannot pass."""

    def __init__(self, output: Path, *, spoil: bool = False) -> None:
        self.output = output
        self.spoil = spoil
        self.steps = 0

    def __call__(
        self,
        model: PreTrainedModel,
        family: Family,
        run: Run,
        arguments: Mapping[str, Any],
        wanted: Sequence[Expected],
        originals: Originals,
    ) -> Observations:
        """What `weightport.parity.training.run_training` does, by a step of the trainer."""
        self.steps += 1
        # big_vision's trainer takes the mean over examples of each one's mean.
        by_sample = run.options.get("mean") == "examples"
        trainer = PortTrainer(
            model, _arguments(self.output), samples=None, data_collator=lambda rows: rows[0], train_dataset=[None],
            by_sample=by_sample, compute_loss_func=partial(loss_of_samples, shift=True) if by_sample else None,
        )  # fmt: skip
        seen: dict[str, Any] = {}
        compute = trainer.compute_loss

        def keep(*args: Any, **kwargs: Any) -> Any:
            loss, seen["output"] = compute(*args, **{**kwargs, "return_outputs": True})
            return (loss, seen["output"]) if kwargs.get("return_outputs") else loss

        trainer.compute_loss = keep  # type: ignore[method-assign]
        observations: Observations = {}
        batch = {**arguments, INDICES: torch.arange(len(arguments["labels"]))}
        if self.spoil:
            batch["labels"] = batch["labels"].flip(0)
            batch.pop("decoder_input_ids", None)
        with _unchanged(model), _exact_loss(model, family), _mode(model, run.options.get("mode") == "train"):
            items = torch.tensor(len(arguments["labels"])) if by_sample else (arguments["labels"] != -100).sum()
            loss = trainer.training_step(model, batch, items)
            for each in wanted:
                if each.seam == "loss":
                    observations[each.tensor.name] = observe(loss, each)
                elif each.seam in family.losses:
                    value = family.losses[each.seam](seen["output"], arguments, model.config)
                    observations[each.tensor.name] = observe(value.detach(), each)
            _record_originals(model, [each for each in wanted if _is_gradient(each.seam)], originals, observations)
        return observations


class _mode:  # noqa: N801 - reads as a statement
    """The trainer's train() leaves the model in evaluation mode while the block runs, unless `training`."""

    def __init__(self, model: PreTrainedModel, training: bool) -> None:
        self.model, self.training = model, training

    def __enter__(self) -> None:
        self.model.train(self.training)
        if not self.training:
            self.model.train = lambda mode=True: self.model  # type: ignore[method-assign]

    def __exit__(self, *exception: object) -> None:
        self.model.__dict__.pop("train", None)


def _arguments(output: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False,
        label_names=["labels"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Path] = {}

    def get(case: Case) -> Path:
        if case.name not in found:
            folder = tmp_path_factory.mktemp("parity")
            vocabulary = None if (case.path / "companions").is_dir() else "none"
            (folder / "original").mkdir()
            original = case.materialize(folder / "original")
            settings = {"vocabulary": vocabulary, **TABLES[case.family].settings(case)}
            table = TABLES[case.family]
            convert(sources_of(case, table, original), folder / "model", case.family, **settings)
            found[case.name] = folder / "model"
        return found[case.name]

    return get


@pytest.mark.parametrize("case", CASES)
def test_trainer_computes_the_original_loss_and_gradients(
    case: Case, converted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reference = TABLES[case.family].write_case(case, tmp_path / "reference.safetensors", kinds=("train",))
    step = Counting(tmp_path)
    monkeypatch.setattr(runner, "run_training", step)
    report = check_parity(converted(case), reference, dtypes=[torch.float32, torch.float64])
    wrong = [(each.run, each.seam, each.dtype) for each in report.comparisons if not each.verdict.passes]
    assert report.passed, f"{case.name}: {wrong[:8]}"
    runs = read_reference(reference).runs
    assert runs and step.steps >= 2 * len(runs), "the trainer was not asked"
    compared = {each.seam for each in report.comparisons}
    assert "loss" in compared and any(seam.startswith("grad") for seam in compared)
    missed = [each for each in report.not_compared if not each.seam.startswith(AFTER)]
    assert not missed, f"{case.name}: not compared: {missed[:5]}"


def test_another_target_does_not_pass_for_the_original(
    converted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = next(param.values[0] for param in CASES if param.values[0].family == "florence2")
    reference = florence2_cases.write_case(case, tmp_path / "reference.safetensors", kinds=("train",))
    monkeypatch.setattr(runner, "run_training", Counting(tmp_path, spoil=True))
    assert not check_parity(converted(case), reference, dtypes=[torch.float32]).passed
