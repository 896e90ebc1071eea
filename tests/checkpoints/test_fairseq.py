"""Checkpoints that fairseq's own code wrote, in fairseq's own environment, are opened here without it.

The environment has PyPI's fairseq 0.12.2, whose wheel is for Python 3.8 (later versions must build it, and 3.11
refuses its dataclasses), and is named by WEIGHTPORT_FAIRSEQ_PYTHON:

    python3.8 -m venv fairseq-env
    fairseq-env/bin/pip install "pip<24.1"        # later ones reject the metadata of omegaconf 2.0
    fairseq-env/bin/pip install --only-binary fairseq "numpy<1.24" torch==1.12.1 torchaudio==0.12.1 fairseq==0.12.2
    WEIGHTPORT_FAIRSEQ_PYTHON=fairseq-env/bin/python python -m pytest tests/checkpoints/test_fairseq.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from weightport.checkpoints import open_checkpoint, sections
from weightport.families.ofa.fairseq_options import fairseq_options

PYTHON = os.environ.get("WEIGHTPORT_FAIRSEQ_PYTHON")

pytestmark = [
    pytest.mark.fairseq,
    pytest.mark.skipif(not PYTHON, reason="WEIGHTPORT_FAIRSEQ_PYTHON names no Python with fairseq 0.12.2"),
]

# Trains a small transformer for one step and saves it with fairseq's trainer, in the three ways that exist.
WRITER = r"""
import argparse, json, sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from fairseq import options, tasks, utils
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

out = Path(sys.argv[1])
data = out / "data"
data.mkdir()
for language in ("en", "de"):
    dictionary = Dictionary()
    for word in ("a", "b", "c"):
        dictionary.add_symbol(word)
    dictionary.save(str(data / f"dict.{language}.txt"))
parser = options.get_training_parser()
args = options.parse_args_and_arch(parser, [
    str(data), "--task", "translation", "--source-lang", "en", "--target-lang", "de",
    "--arch", "transformer_iwslt_de_en", "--encoder-layers", "2", "--decoder-layers", "1",
    "--encoder-embed-dim", "16", "--decoder-embed-dim", "16",
    "--encoder-ffn-embed-dim", "32", "--decoder-ffn-embed-dim", "32", "--optimizer", "adam", "--lr", "0.01", "--cpu",
    "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1", "--max-tokens", "100",
    "--share-decoder-input-output-embed",
])
cfg = convert_namespace_to_omegaconf(args)
task = tasks.setup_task(cfg.task)
model = task.build_model(cfg.model)
criterion = task.build_criterion(cfg.criterion)
trainer = Trainer(cfg, task, model, criterion)
tokens = torch.tensor([[4, 5, 2]])
sample = {
    "id": torch.tensor([0]), "nsentences": 1, "ntokens": 3, "target": tokens,
    "net_input": {"src_tokens": tokens, "src_lengths": torch.tensor([3]), "prev_output_tokens": tokens},
}
trainer.train_step([sample])
trainer.consolidate_optimizer()
trainer.save_checkpoint(str(out / "trainer.pt"), {"train_iterator": {"epoch": 1}, "val_loss": 1.5})

state = torch.load(out / "trainer.pt")
state["cfg"] = cfg
torch.save(state, out / "dictconfig.pt")
state["cfg"], state["args"] = None, args
torch.save(state, out / "args.pt")
torch.save(state, out / "legacy.pt", _use_new_zipfile_serialization=False)
optimizer = [value for part in state["last_optimizer_state"]["state"].values() for value in part.values()]
expected = {
    "model": {
        name: [list(value.shape), str(value.dtype), float(value.double().sum())]
        for name, value in state["model"].items()
    },
    "optimizer": sum(map(torch.is_tensor, optimizer)),
}
(out / "expected.json").write_text(json.dumps(expected))
"""

FLAVOURS = {
    "trainer.pt": "cfg",
    "dictconfig.pt": "omegaconf",
    "args.pt": "args",
    "legacy.pt": "args",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fairseq")
    result = subprocess.run(
        [str(PYTHON), "-c", WRITER, str(folder)], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def expected(written: Path) -> dict[str, Any]:
    return json.loads((written / "expected.json").read_text())


@pytest.mark.parametrize("name", FLAVOURS)
def test_every_tensor_of_the_model_is_found_with_its_values(written, expected, name):
    checkpoint = open_checkpoint(written / name)
    assert checkpoint.format == ("torch-legacy" if name == "legacy.pt" else "torch-zip")
    model = checkpoint.section("model")
    assert list(model) == list(expected["model"])
    for tensor, (shape, dtype, total) in expected["model"].items():
        found = model[tensor].read()
        assert [list(found.shape), str(found.dtype)] == [shape, dtype]
        assert float(found.double().sum()) == pytest.approx(total, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", FLAVOURS)
def test_the_options_are_what_the_model_was_built_with(written, name):
    options = fairseq_options(open_checkpoint(written / name).document)
    assert options.flavour == FLAVOURS[name]
    assert options.architecture == "transformer_iwslt_de_en"
    assert options.task_name == "translation"
    assert options.model["encoder_layers"] == 2 and options.model["decoder_layers"] == 1
    assert options.model["encoder_embed_dim"] == 16
    assert options.task["source_lang"] == "en" and options.task["target_lang"] == "de"


def test_the_optimizer_state_is_told_apart_from_the_model(written, expected):
    checkpoint = open_checkpoint(written / "trainer.pt")
    parts = {part.name: part for part in sections(checkpoint)}
    assert parts["model"].tensors == len(expected["model"])
    assert parts["last_optimizer_state"].tensors == expected["optimizer"] > 0
    assert checkpoint.document["extra_state"]["val_loss"] == 1.5
