"""torch.compile: the losses of the model as it is, with gradient checkpointing too, and a run that can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import losses, run, still

pytestmark = pytest.mark.slow

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
