"""A model directory that carries its code loads where weightport is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from weightport.converters.portable import write_portable_code
from weightport.families.ofa.portable import AUTO_MAPS
from weightport.modeling.ofa.configuration_ofa import OFAConfig
from weightport.modeling.ofa.modeling_ofa import OFAForConditionalGeneration

LOAD = """
import sys
sys.modules["weightport"] = None  # any import of it fails
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

folder, inputs = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "OFAModel"
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[3])
del inputs["decoder_input_ids"]
print(model.generate(**inputs, max_new_tokens=4).tolist())
"""


def load_elsewhere(folder, inputs, scratch) -> tuple[torch.Tensor, list[list[int]]]:
    torch.save(inputs, scratch / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(folder), str(scratch / "inputs.pt"), str(scratch / "logits.pt")]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
    assert finished.returncode == 0, finished.stderr
    return torch.load(scratch / "logits.pt"), json.loads(finished.stdout)


def generated_here(model, inputs) -> list[list[int]]:
    source = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return model.generate(**source, max_new_tokens=4).tolist()


def test_code_copied_beside_the_weights_computes_the_same(make_model, inputs, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    write_portable_code(tmp_path / "model", "weightport.modeling.ofa", AUTO_MAPS)
    logits, sequences = load_elsewhere(tmp_path / "model", inputs, tmp_path)
    with torch.no_grad():
        assert torch.allclose(logits, model(**inputs).logits, atol=1e-5)
    assert sequences == generated_here(model, inputs)


def test_transformers_own_way_of_carrying_code_works_too(make_model, inputs, tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(OFAForConditionalGeneration, "_auto_class", "AutoModelForImageTextToText")
    monkeypatch.setattr(OFAConfig, "_auto_class", "AutoConfig")
    model.save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert settings["auto_map"]["AutoModelForImageTextToText"] == "modeling_ofa.OFAForConditionalGeneration"
    assert (tmp_path / "model" / "positions_ofa.py").is_file()
