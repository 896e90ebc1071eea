"""The search for the largest batch that fits: a step keeps its samples, and the run its losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from drawn_data import draw_jsonl
from tiny_runs import job_of, losses, run, still

from weightport.errors import RecipeError, TrainingError
from weightport.finetuning import activation_checkpointing
from weightport.finetuning.setup import batch_size, preparing
from weightport.finetuning.setup.batch_size import Division, bytes_of, fitting_division
from weightport.finetuning.setup.preparing import prepare

STEPS = {
    "training.learning_rate": 1e-3,
    "training.warmup_steps": 0,
    "training.max_steps": 3,
    "training.per_device_train_batch_size": 4,
    "training.save_strategy": "steps",
    "training.save_steps": 1,
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
}


def searched(
    tiny: Callable[[str], Path], data: Path, folder: Path, needs: Callable[[int], float], samples: int = 12
) -> tuple[Division, str, list[int]]:
    """What is found where a batch needs that many megabytes of 100, and which sizes were tried."""
    more = {**STEPS, "training.per_device_train_batch_size": samples, "batch.fit_memory": False}
    prepared = prepare(job_of(tiny("florence2"), "docvqa", data, folder, more=more))
    tried: list[int] = []

    def measure(batch: int) -> float:
        tried.append(batch)
        return 1e6 * needs(batch)

    job = job_of(tiny("florence2"), "docvqa", data, folder, more={"batch.memory": "100 MB", "batch.fit_memory": True})
    division, note = fitting_division(prepared.loaded, job.recipe, prepared.arguments, prepared.samples, measure)
    return division, note, tried


def test_largest_batch_that_fits_divides_the_samples_of_a_step(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    division, note, tried = searched(tiny, pairs, tmp_path / "run", lambda batch: 10 + 15 * batch)
    # 5 would fit and does not divide 12; 6 is foreseen to need 100 MB and the optimizer's moments.
    assert (division.size, division.accumulation, division.samples) == (4, 3, 12)
    assert tried == [1, 2, 3, 4]
    assert note.startswith("batches of 4: the largest that fits 100 MB, with 7")
    assert note.endswith("3 batches of 4 make the 12 samples of a step")
    assert searched(tiny, pairs, tmp_path / "run", lambda batch: 1.0)[0].size == 12
    steep = searched(tiny, pairs, tmp_path / "run", lambda batch: 10 if batch < 3 else float("inf"))
    assert (steep[0].size, steep[2]) == (2, [1, 2, 3])


def test_memory_that_holds_no_sample_is_an_error(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"Not even a batch of one sample fits: it needs 201 MB, and 100 MB are"):
        searched(tiny, pairs, tmp_path / "run", lambda batch: 200.0)
    more = {**STEPS, "batch.fit_memory": True, "batch.memory": "1 MB"}
    said = r"Not even a batch of one sample fits: it needs [\d.]+ [MG]B, and 1\.0 MB are there"
    with pytest.raises(TrainingError, match=said):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=more)
    assert not (tmp_path / "run").exists()


def test_optimizer_and_average_count(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    plain = prepare(job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=STEPS))
    averaged = job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**STEPS, "model.ema_decay": 0.9})
    trained = sum(share.trainable for share in plain.shares)
    needs = [
        batch_size._not_yet_there(plain.loaded.model, each, plain.arguments)
        for each in (plain.recipe, averaged.recipe)
    ]
    assert needs == [8 * trained, 16 * trained]


@pytest.mark.parametrize("name", ["florence2", pytest.param("ofa-cn", marks=pytest.mark.slow)])
def test_search_leaves_losses_and_the_model_as_they_are(
    name: str, tiny: Callable[[str], Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe, data = ("docvqa", "pairs") if name == "florence2" else ("muge-caption", "muge")
    source = request.getfixturevalue(data)
    # Dropout and batch statistics on: a search that drew a number or moved one would be seen.
    more = {**STEPS, "model.freeze": [], **({"batch.image_size": 64} if name == "ofa-cn" else {})}
    plain = run(tiny(name), recipe, source, tmp_path / "plain", more=more)
    found = run(tiny(name), recipe, source, tmp_path / "found", more={**more, "batch.fit_memory": True})
    assert any(note.startswith("batches of 4: the largest that fits") for note in found.notes), found.notes
    assert losses(found.history) == losses(plain.history)
    weights = [(each.directory / "model.safetensors").read_bytes() for each in (plain, found)]
    assert weights[0] == weights[1]


def test_smaller_batches_have_the_same_losses_and_a_resumed_run_does_not_search_again(
    tiny: Callable[[str], Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {**STEPS, **still(tiny("florence2"))}
    plain = run(tiny("florence2"), "docvqa", pairs, tmp_path / "plain", more=more)
    more["batch.fit_memory"] = True
    monkeypatch.setattr(
        preparing, "fitting_division", lambda *args: (Division(2, 2, 1), "batches of 2: the largest that fits")
    )
    found = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=more)
    assert losses(found.history) == pytest.approx(losses(plain.history), abs=1e-6)
    record = json.loads((found.directory / "training.json").read_text())
    assert record["samples_per_step"] == 4

    def again(*args: object) -> tuple[Division, str]:
        raise AssertionError("it searched again")

    monkeypatch.setattr(preparing, "fitting_division", again)
    resumed = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", resume=True, more=more)
    assert losses(resumed.history) == losses(found.history)
    assert "as when the run was started: 2 batches of 2 make the 4 samples of a step" in resumed.notes


def test_one_sample_is_enough_to_search_with(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    more = {**STEPS, "batch.fit_memory": True, "training.max_steps": 1}
    out = run(tiny("florence2"), "docvqa", draw_jsonl(tmp_path / "one", 1), tmp_path / "run", more=more)
    assert any("1 batch of 4 makes the 4 samples of a step" in note for note in out.notes), out.notes


def test_peak_of_a_larger_batch_is_seen(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    prepared = prepare(job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more=STEPS))
    trial = batch_size._Trial(prepared.loaded, prepared.recipe, prepared.arguments, prepared.samples)
    assert trial.peak(1024) - trial.peak(1) > 50e6
    assert all(each.grad is None for each in prepared.loaded.model.parameters())


def test_activation_checkpointing_has_one_name_and_its_newer_one_counts() -> None:
    (own,) = activation_checkpointing.with_own_name({"gradient_checkpointing": True})
    both = {"activation_checkpointing": False, "gradient_checkpointing": True, "max_steps": 1}
    for values in (both, dict(reversed(both.items()))):
        assert activation_checkpointing.with_own_name(values) == {own: False, "max_steps": 1}
    given = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert activation_checkpointing.with_own_name(given) == {f"{own}_kwargs": {"use_reentrant": False}}


def test_gradient_checkpointing_counts_in_the_search(tiny: Callable[[str], Path], pairs: Path, tmp_path: Path) -> None:
    checkpointed: list[bool] = []

    def measure(batch: int) -> float:
        checkpointed.append(activation_checkpointing.is_on(prepared.loaded.model))
        return 0.0

    job = job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**STEPS, "gradient_checkpointing": True})
    prepared = prepare(job)
    fitting_division(prepared.loaded, job.recipe, prepared.arguments, prepared.samples, measure)
    assert checkpointed == [True, True, True]
    assert not activation_checkpointing.is_on(prepared.loaded.model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch.memory": "8 GB"}, r"batch\.memory is what --batch-size auto may use"),
        (
            {"batch.fit_memory": True, "batch.memory": "lots"},
            r"batch\.memory is 'lots'\. It is an amount",
        ),
        ({"batch.fit_memory": True, "batch.loss_mean": "batches"}, r"another division is another loss"),
        ({"batch.fit_memory": True, "training.fsdp": True}, r"FSDP and DeepSpeed share it out"),
        ({"batch.fit_memory": True, "training.auto_find_batch_size": True}, r"auto_find_batch_size does not: set one"),
    ],
)
def test_search_that_cannot_be_is_refused(
    settings: dict[str, object], words: str, tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**STEPS, **settings})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "expected"), [("8 GB", 8e9), ("1.5g", 1.5e9), ("500MB", 5e8), ("1e9", 1e9)])
def test_amounts_of_memory_are_read(text: str, expected: float) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize(
    ("then", "processes", "now"),
    [
        ((4, 1, 1), 2, (2, 1, 2)),
        ((2, 2, 1), 2, (2, 1, 2)),
        ((2, 1, 2), 1, (2, 2, 1)),
        ((3, 2, 1), 2, (3, 1, 2)),
        ((3, 2, 4), 3, (2, 4, 3)),
    ],
)
def test_step_keeps_its_samples_in_another_number_of_processes(
    then: tuple[int, int, int], processes: int, now: tuple[int, int, int]
) -> None:
    assert Division(*then).among(processes) == Division(*now)
    assert Division(*then).samples == Division(*now).samples


def test_samples_that_cannot_be_shared_evenly_are_an_error() -> None:
    with pytest.raises(
        TrainingError, match=r"4 samples a step \(4 × 1 in 1 process\), which 3 processes cannot share"
    ):
        Division(4, 1, 1).among(3)
