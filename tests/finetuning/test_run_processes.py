"""Several processes, or several batches a step, give the losses of one process with all samples in one batch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from drawn_data import draw_jsonl, write_lines
from tiny_processes import side_by_side
from tiny_runs import EVERY_RECIPE, RECIPES, assigned, job_of, losses, run, still

STEPS = {
    "training.learning_rate": 1e-3,
    "training.warmup_steps": 0,
    "training.max_steps": 3,
    "training.save_strategy": "no",
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
}
TOLERANCE = 1e-6
SPACING = 5e-7
"""Of losses of about 10, whose float32 neighbours are 1e-6 away: four of these."""


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of very different length: the mean of two batches' means is not the mean over their tokens."""
    path = draw_jsonl(tmp_path_factory.mktemp("uneven"), 8)
    texts = ["a", "big old dog in the warm sun", "b", "red cat on a mat by the bed", "c", "hot tea for two of us", "d"]
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return write_lines(path, [{**row, "suffix": text} for row, text in zip(rows, [*texts, "e f g h i j"])])


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(
    name: str, tiny: Callable[[str], Path], uneven: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe, model, data, settings = RECIPES[name]
    source = uneven if data == "pairs" else request.getfixturevalue(data)
    more = {
        **STEPS,
        **settings,
        **still(tiny(model)),
        "evaluation.samples": 3,
        "evaluation.batch_size": 1,
        # A model that has learned nothing chooses by the last bits, and each choice decides all later ones.
        "evaluation.generation.max_new_tokens": 4,
    }
    one = run(
        tiny(model), recipe, source, tmp_path / "one", eval_data=source,
        more={**more, "training.per_device_train_batch_size": 2},
    )  # fmt: skip
    job = job_of(
        tiny(model), recipe, source, tmp_path / "two", eval_data=source,
        more={**more, "training.per_device_train_batch_size": 1},
    )  # fmt: skip
    assert side_by_side(job, 2) == [0, 0]

    assert len(losses(one.history)) == 3
    assert losses(tmp_path / "two") == pytest.approx(losses(one.history), abs=TOLERANCE, rel=SPACING)
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics == pytest.approx({name: one.metrics[name] for name in metrics}, abs=1e-5) and metrics
    answered = [sorted((tmp_path / each / "predictions").iterdir()) for each in ("one", "two")]
    assert [path.name for path in answered[0]] == [path.name for path in answered[1]]
    assert len(answered[1][-1].read_text().splitlines()) == 3, "a process answered what another one did too"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_torchrun_trains_once_and_writes_once(tiny: Callable[[str], Path], uneven: Path, tmp_path: Path) -> None:
    model = tiny("florence2")
    more = {**STEPS, **still(model)}
    one = run(
        model, "docvqa", uneven, tmp_path / "one", eval_data=uneven,
        more={**more, "training.per_device_train_batch_size": 4},
    )  # fmt: skip
    program = str(Path(sys.executable).with_name("torchrun"))
    command = [program, "--standalone", "--nproc-per-node", "2", str(Path(sys.executable).with_name("port-finetune"))]
    arguments = [str(model), "--data", str(uneven), "--eval-data", str(uneven), "-o", str(tmp_path / "two"), "--json"]
    settings = assigned({**more, "training.per_device_train_batch_size": 2, "training.dataloader_num_workers": 1})
    done = subprocess.run(
        [*command, *arguments, "--recipe", "docvqa", *settings], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one.history), abs=TOLERANCE)
    printed = json.loads(done.stdout)
    assert printed["metrics"].keys() == one.metrics.keys()
    assert Path(printed["directory"]) == tmp_path / "two" / "model"
    assert "Warning" not in done.stderr and "warn" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["muge-caption-ofa-cn", "caption-ofa", "docvqa-florence2"])
def test_accumulated_batches_have_the_losses_of_one_that_holds_them_all(
    name: str, tiny: Callable[[str], Path], uneven: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe, model, data, settings = RECIPES[name]
    source = uneven if data == "pairs" else request.getfixturevalue(data)
    more = {**STEPS, **settings, **still(tiny(model))}
    seen = []
    for batch, accumulated in ((4, 1), (2, 2)):
        changed = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        out = run(tiny(model), recipe, source, tmp_path / f"{batch}", more={**more, **changed})
        seen.append(losses(out.history))
    assert seen[1] == pytest.approx(seen[0], abs=TOLERANCE)


def test_gradient_checkpointing_changes_no_loss(tiny: Callable[[str], Path], uneven: Path, tmp_path: Path) -> None:
    for name in ("florence2", "ofa", "paligemma2"):
        seen = []
        for checkpointing in (False, True):
            more = {**STEPS, "training.per_device_train_batch_size": 2, "gradient_checkpointing": checkpointing}
            more |= {"batch.image_size": 64} if name == "ofa" else {}
            out = run(tiny(name), "default", uneven, tmp_path / f"{name}{checkpointing}", more=more)
            seen.append(losses(out.history))
            config = (out.directory / "config.json").read_bytes()
            assert config == (tiny(name) / "config.json").read_bytes(), "training left a mark in the configuration"
        assert seen[1] == pytest.approx(seen[0], abs=TOLERANCE)


def test_gradient_checkpointing_trains_an_adapter_as_well_and_without_a_warning(
    tiny: Callable[[str], Path], uneven: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    seen = []
    for checkpointing in (False, True):
        more = {**STEPS, "training.per_device_train_batch_size": 2, "gradient_checkpointing": checkpointing}
        more |= {"model.method": "lora", "training.learning_rate": 5e-2, "evaluation.samples": 2}
        out = run(tiny("florence2"), "docvqa", uneven, tmp_path / str(checkpointing), eval_data=uneven, more=more)
        seen.append(losses(out.history))
    assert seen[1] == pytest.approx(seen[0], abs=TOLERANCE)
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]
