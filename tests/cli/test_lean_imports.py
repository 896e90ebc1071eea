"""Conversion without torch's compiler and distributed tensors: nothing of them is loaded, and nothing is different."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))

from golden_case import Case  # noqa: E402

from weightport.api import convert  # noqa: E402

HEAVY = ("torch._dynamo.symbolic_convert", "torch.distributed.tensor", "sympy", "torch._inductor")


def in_a_process(program: str, *arguments: str) -> str:
    """What `program` prints; the modules it is told to look for are in HEAVY."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_conversion_loads_neither_and_writes_the_same(tmp_path: Path) -> None:
    case = Case(GOLDEN / "cases" / "ofa" / "cn-tiny", "ofa/cn-tiny")
    source = case.materialize(tmp_path / "original")
    program = f"""
import json, sys
from weightport.cli import port_ofa
port_ofa.main([*sys.argv[1:], "-q"], standalone_mode=False)
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    loaded = in_a_process(program, str(source), str(tmp_path / "lean"), "--vocab", "none")
    assert json.loads(loaded.splitlines()[-1]) == []
    convert(source, tmp_path / "full", "ofa", vocabulary="none")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "lean" / name).read_bytes() == (tmp_path / "full" / name).read_bytes(), name


def test_what_the_block_changes_is_put_back() -> None:
    program = """
import sys, torch
from weightport.cli.lean_imports import without_compiler
before = torch.distributed.is_available()
with without_compiler():
    import transformers.modeling_utils
    assert not torch.distributed.is_available()
assert torch.distributed.is_available() == before
assert "torch._dynamo" not in sys.modules
import torch._dynamo
assert torch._dynamo.symbolic_convert
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())
"""
    assert in_a_process(program).strip() == "[2.0, 2.0]"


def test_nothing_happens_where_the_model_classes_are_loaded() -> None:
    program = """
import sys, torch, transformers.modeling_utils
from weightport.cli.lean_imports import without_compiler
compiler = sys.modules["torch._dynamo"]
with without_compiler():
    assert sys.modules["torch._dynamo"] is compiler and torch.distributed.is_available()
assert sys.modules["torch._dynamo"] is compiler
"""
    in_a_process(program)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["florence2", "paligemma2", "moondream2", "blip2"])
def test_model_classes_of_every_family_are_built_without_them(family: str) -> None:
    program = f"""
import sys
from weightport.cli.lean_imports import without_compiler
with without_compiler():
    from weightport import modeling
from transformers import AutoConfig
from weightport.families.registry import registry
import weightport.modeling.blip2_lavis.configuration_blip2_lavis as b
import weightport.modeling.moondream.configuration_moondream as m
from transformers import Blip2Config, Florence2Config, PaliGemmaConfig
config = dict(florence2=Florence2Config, paligemma2=PaliGemmaConfig, moondream2=m.MoondreamConfig, blip2=Blip2Config)
print(len(registry()["{family}"].conversion.targets(config["{family}"]()).shapes))
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    count, loaded = in_a_process(program).splitlines()[-2:]
    assert int(count) > 100 and loaded == "[]"
