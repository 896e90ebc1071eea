"""The scripts that run in an original's environment: what they write is what the product reads.

The originals cannot be installed here. Stand-ins with their module names and layouts take their place: they show that
hooks, axes and names are right, and say nothing about the originals' numbers.
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from original_stand_ins import BATCH, SCRIPTS, SOURCE, TARGET, StandInFlorence2, StandInOFA, ids, script

from weightport.families.registry import registry
from weightport.parity import read_reference


@pytest.fixture
def ofa(tmp_path) -> Path:
    dump, model = script("dump_ofa"), StandInOFA()
    inputs = {
        "src_tokens": ids(SOURCE), "src_lengths": torch.full((BATCH,), SOURCE), "prev_output_tokens": ids(TARGET),
    }  # fmt: skip
    stated = {name: inputs[name] for name in ("src_tokens", "prev_output_tokens")}
    hypotheses = [[{"tokens": torch.tensor([5, 6, 2]), "score": torch.tensor(-1.0)},
                   {"tokens": torch.tensor([5, 2]), "score": torch.tensor(-2.0)}]] * BATCH  # fmt: skip
    generator = SimpleNamespace(generate=lambda models, sample: hypotheses)
    tensors = {**dump.given("forward", stated), **dump.given("train", {**stated, "target": ids(TARGET)})}
    tensors |= {**dump.forward(model, inputs), **dump.train(model, inputs, ids(TARGET), 0.1)}
    tensors |= {**dump.given("beam", {"src_tokens": ids(SOURCE)}), **dump.generate(generator, model, inputs, "beam")}
    model.double()
    tensors |= dump.forward(model, inputs, float64=True)
    runs = {"forward": {"kind": "forward"},
            "train": {"kind": "train", "options": {"mode": "eval", "label_smoothing": 0.1}},
            "beam": {"kind": "generate", "options": {"beam": 2}}}  # fmt: skip
    dump.write(str(tmp_path / "ofa.safetensors"), "ofa", {"project": "stand-in"}, runs, tensors)
    return tmp_path / "ofa.safetensors"


@pytest.fixture
def florence2(tmp_path) -> Path:
    dump, model = script("dump_florence2"), StandInFlorence2()
    inputs = {"input_ids": ids(SOURCE), "decoder_input_ids": ids(TARGET)}
    given = {"input_ids": ids(SOURCE), "labels": ids(TARGET)}
    tensors = {**dump.given("forward", inputs), **dump.given("train", given), **dump.forward(model, inputs)}
    tensors |= {**dump.train(model, given), **dump.generate(model, {"input_ids": ids(SOURCE)}, "beam", num_beams=2)}
    tensors |= dump.given("beam", {"input_ids": ids(SOURCE)})
    runs = {"forward": {"kind": "forward"}, "train": {"kind": "train", "options": {"mode": "eval"}},
            "beam": {"kind": "generate", "options": {"num_beams": 2}}}  # fmt: skip
    dump.write(str(tmp_path / "florence2.safetensors"), "florence2", {"project": "stand-in"}, runs, tensors)
    return tmp_path / "florence2.safetensors"


@pytest.mark.parametrize("name", ["ofa", "florence2"])
def test_what_a_script_writes_is_a_reference_that_the_family_knows(name: str, request) -> None:
    reference = read_reference(request.getfixturevalue(name))
    family = registry()[name].parity
    assert reference.family == name
    assert {run.kind for run in reference.runs} == {"forward", "train", "generate"}
    seams = {each.seam for run in reference.runs for each in run.outputs}
    assert {
        "encoder.embeddings",
        "encoder.layers.1",
        "encoder.layers.1.self_attn",
        "encoder",
        "logits",
        "loss",
    } <= seams
    later = ("grad_norm.", "grad.", "sequences", "scores", *family.losses)
    unknown = [
        seam
        for seam in seams
        if not seam.startswith(later) and not any(each.layer_of(seam) is not None for each in family.seams)
    ]
    assert not unknown
    for run in reference.runs:
        assert set(run.inputs) <= {argument.original for argument in family.arguments}
        assert set(family.required[run.kind]) <= set(run.inputs)
        assert set(run.options) <= set(family.options[run.kind])


@pytest.mark.parametrize("name", ["ofa", "florence2"])
def test_every_seam_of_a_layer_is_batch_first(name: str, request) -> None:
    reference = read_reference(request.getfixturevalue(name))
    for each in reference.runs[0].outputs:
        length = TARGET if each.seam.startswith(("decoder", "logits")) else SOURCE
        assert each.tensor.shape[:2] == (BATCH, length), each.seam


def test_float64_run_stands_beside_the_float32_one(ofa) -> None:
    outputs = read_reference(ofa).runs[0].outputs
    assert {each.dtype for each in outputs if each.seam == "logits"} == {torch.float32, torch.float64}
    assert all(each.tensor.dtype == each.dtype for each in outputs)


def test_hypotheses_are_padded_and_ordered(ofa) -> None:
    beam = next(run for run in read_reference(ofa).runs if run.name == "beam")
    found = {each.seam: each.tensor.read() for each in beam.outputs}
    assert found["sequences"].tolist() == [[[5, 6, 2], [5, 2, 1]]] * BATCH
    assert found["scores"].tolist() == [[-1.0, -2.0]] * BATCH


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_script_stands_alone_in_old_pythons(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 7))
    imported = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}  # fmt: skip
    imported |= {(node.module or "").partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "weightport" not in imported
    pinned = sorted(each.name for each in SCRIPTS.glob(f"requirements-{path.stem.removeprefix('dump_')}*.txt"))
    assert pinned and all(name in ast.get_docstring(tree) for name in pinned)
