"""DeepSpeed on processes without a GPU: the losses and the result of one process, where the package is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_processes import side_by_side
from tiny_runs import FOUR_STEPS, job_of, losses, run, still

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)"),
]

BUILD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of DeepSpeed on CPUs, the operation that it compiles at its first start compiled before."""
    found = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions"))}
    subprocess.run([sys.executable, "-c", BUILD], check=True, timeout=600, env={**os.environ, **found})
    return found


def configuration(folder: Path, stage: int) -> Path:
    path = folder / f"stage{stage}.json"
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {"zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False}
    path.write_text(json.dumps({**settings, **dict.fromkeys(auto, "auto")}))
    return path


def test_shared_out_gradients_have_the_losses_and_the_result_of_one_process(
    on_cpu: dict[str, str], tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    model = tiny("florence2")
    whole = {**FOUR_STEPS, **still(model), "training.per_device_train_batch_size": 4}
    one = run(model, "docvqa", pairs, tmp_path / "one", eval_data=pairs, more=whole)
    shared = {
        **whole,
        "training.per_device_train_batch_size": 2,
        "training.deepspeed": str(configuration(tmp_path, 2)),
    }
    two = tmp_path / "two"
    assert side_by_side(job_of(model, "docvqa", pairs, two, eval_data=pairs, more=shared), 2, on_cpu) == [0, 0]
    assert losses(two) == pytest.approx(losses(one.history), abs=1e-6, rel=5e-7)
    metrics = json.loads((two / "metrics.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(one.metrics["eval_loss"], abs=1e-5)
    expected, found = (load_file(folder / "model.safetensors") for folder in (one.directory, two / "model"))
    assert found.keys() == expected.keys()
    for key, each in found.items():
        assert each.dtype == expected[key].dtype
        torch.testing.assert_close(each.float(), expected[key].float(), atol=2e-3, rtol=0)
    (two / "checkpoints" / "checkpoint-4").rename(two / "checkpoints" / "tmp-checkpoint-4")
    again = job_of(model, "docvqa", pairs, two, eval_data=pairs, resume=True, more=shared)
    assert side_by_side(again, 2, on_cpu) == [0, 0]
    assert losses(two) == pytest.approx(losses(one.history), abs=1e-6, rel=5e-7)


def test_stage_3_is_refused_before_the_model_is_read(
    on_cpu: dict[str, str], tiny: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    words = ["--data", pairs, "-o", tmp_path / "run", "--recipe", "docvqa", "--set"]
    setting = f"deepspeed={configuration(tmp_path, 3)}"
    begin = "from weightport.cli.finetuning import port_finetune; port_finetune()"
    command = [sys.executable, "-c", begin, tiny("florence2"), *words, setting]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, env={**os.environ, **on_cpu}
    )
    assert done.returncode and "stage 3 of zero_optimization shares weights out" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
