"""No load of ours runs code of the directory that it loads: every call is read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import weightport

SOURCES = sorted(Path(weightport.__file__).parent.rglob("*.py"))
LOADERS = {"from_pretrained", "pipeline"}
# peft reads an adapter's JSON and tensors and has no such code.
WITHOUT_CODE = {"PeftModel"}


def loads(tree: ast.AST) -> list[ast.Call]:
    """Calls of a loader, those of classes that cannot run code left out."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if name in LOADERS and owner not in WITHOUT_CODE:
            found.append(node)
    return found


def says_no(entries: list[tuple[str | None, ast.expr]], tree: ast.AST) -> bool:
    """Whether keywords or entries hold `trust_remote_code=False`, or a mapping of the same file that does."""
    for key, value in entries:
        if key == "trust_remote_code":
            return isinstance(value, ast.Constant) and value.value is False
        if key is None and isinstance(value, ast.Name):
            literals = [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                if getattr(target, "id", None) == value.id
            ]
            if literals and all(says_no(_entries(each), tree) for each in literals):
                return True
    return False


def _entries(literal: ast.Dict) -> list[tuple[str | None, ast.expr]]:
    keys = [getattr(key, "value", "") if key is not None else None for key in literal.keys]
    return list(zip(keys, literal.values))


def test_every_load_refuses_the_directorys_own_code():
    calls = 0
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in loads(tree):
            calls += 1
            keywords = [(keyword.arg, keyword.value) for keyword in call.keywords]
            assert says_no(keywords, tree), f"{path}:{call.lineno} loads without trust_remote_code=False"
    assert calls >= 10


@pytest.mark.parametrize(
    ("call", "safe"),
    [
        ("AutoModel.from_pretrained(x)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=flag)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=False)", True),
        ("O = {'trust_remote_code': False}\nAutoModel.from_pretrained(x, **O)", True),
        ("O = {'trust_remote_code': True}\nAutoModel.from_pretrained(x, **O)", False),
        ("O = {'a': 1}\nAutoModel.from_pretrained(x, **O)", False),
        ("O = {'trust_remote_code': False}\nP = {'a': 1, **O}\nAutoModel.from_pretrained(x, **P)", True),
    ],
)
def test_the_reading_itself_tells_safe_calls_from_others(call, safe):
    tree = ast.parse(call)
    (found,) = loads(tree)
    assert says_no([(keyword.arg, keyword.value) for keyword in found.keywords], tree) is safe
