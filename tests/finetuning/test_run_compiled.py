"""torch.compile: the losses of the model as it is, with gradient checkpointing too, and a run that can be resumed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import job_of, losses, run, still

from weightport.errors import RecipeError
from weightport.finetuning.setup.preparing import prepare

STEPS = {
    "training.learning_rate": 1e-3,
    "training.per_device_train_batch_size": 2,
    "training.max_steps": 2,
    "training.save_strategy": "steps",
    "training.save_steps": 1,
    "training.logging_steps": 1,
    "training.dataloader_num_workers": 0,
    "evaluation.samples": 2,
    "evaluation.generation.max_new_tokens": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_model_has_the_losses_of_the_model_as_it_is(
    checkpointing: bool, tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    more = {**STEPS, **still(tiny("florence2")), "training.gradient_checkpointing": checkpointing}
    plain = run(tiny("florence2"), "docvqa", pairs, tmp_path / "plain", eval_data=pairs, more=more)
    # Another backend compiles in seconds what inductor compiles in minutes, and all else is the same.
    more |= {"training.torch_compile": True, "training.torch_compile_backend": "eager", "model.ema_decay": 1e-9}
    out = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, more=more)
    assert losses(out.history) == pytest.approx(losses(plain.history), abs=1e-6)
    assert out.metrics == pytest.approx(dict(plain.metrics), abs=1e-5)
    files = [sorted(path.name for path in each.directory.iterdir()) for each in (plain, out)]
    assert files[0] == files[1]
    (tmp_path / "run" / "checkpoints" / "checkpoint-2").rename(tmp_path / "run" / "checkpoints" / "tmp-checkpoint-2")
    again = run(tiny("florence2"), "docvqa", pairs, tmp_path / "run", eval_data=pairs, resume=True, more=more)
    assert losses(again.history) == pytest.approx(losses(plain.history), abs=1e-6)


@pytest.mark.parametrize("named", [True, False])
def test_machine_without_a_compiler_is_told_before_the_first_step(
    named: bool, tiny: Callable[[str], Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tiny("florence2"), "docvqa", pairs, tmp_path / "run", more={**STEPS, "training.torch_compile": True})
    monkeypatch.setenv("CXX", "no-such-compiler") if named else monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    wanted = "no-such-compiler" if named else r"(g|clang)\+\+"
    with pytest.raises(
        RecipeError, match=rf"torch_compile needs a C\+\+ compiler, and there is no {wanted} \(CXX, PATH"
    ):
        prepare(job)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("CXX", sys.executable)
    prepare(job)
