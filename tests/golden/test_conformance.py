"""The built-in families pass the conformance kit that families of other packages are judged by."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from golden_case import Case
from needs import is_of_the_model_alone, judges

from weightport.conformance import check_family, family_of_case, read_case
from weightport.families.registry import registry

CHECKS = ("declaration", "recognition", "coverage", "round trip", "parity", "planted mistakes", "training step")
SMALLEST = ("cn-tiny-dictconfig-fp16", "tiny-vocab-4k", "tiny-gemma1")
"""One case a family: the kit takes half a minute each."""


def is_smallest(case: Case) -> bool:
    return case.path.name in SMALLEST


@judges(is_of_the_model_alone, is_smallest)
def test_built_in_family_keeps_its_word(case: Case, table: ModuleType, tmp_path: Path) -> None:
    checkpoint = case.materialize(tmp_path / "original")
    table.write_case(case, tmp_path / "reference.safetensors")
    # A folder whose files belong together, or a checkpoint alone.
    source = checkpoint.parent if case.family == "florence2" else checkpoint
    stated = {"sources": {"checkpoint": str(source.relative_to(tmp_path))}}
    if not (case.path / "companions").is_dir():
        stated["options"] = {"vocabulary": "none"}
    (tmp_path / "case.json").write_text(json.dumps(stated))
    assert family_of_case(tmp_path) == case.family
    checks = check_family(registry()[case.family], registry(), [read_case(tmp_path)])
    assert [f"{each.name}: {each.detail}" for each in checks if not each.passed] == []
    assert tuple(each.name for each in checks) == CHECKS
