"""The registry of families: what is offered, what a broken offer does, and what loading a declaration imports."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest

from weightport.errors import FamilyError, UnknownFamilyError
from weightport.families import registry as module
from weightport.families.ofa import FAMILY
from weightport.families.registry import FamilyRegistry, registry


def offering(monkeypatch, *points: EntryPoint) -> FamilyRegistry:
    monkeypatch.setattr(module, "entry_points", lambda group: points)
    return FamilyRegistry({"ofa": "weightport.families.ofa:FAMILY"})


def test_declarations_import_neither_torch_nor_transformers():
    code = (
        "import sys; from weightport.families.registry import registry; families = list(registry()); "
        "print(*[name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == ""


def test_a_name_that_is_built_in_cannot_be_taken_by_another_package(monkeypatch):
    families = offering(monkeypatch, EntryPoint("ofa", "weightport.families.florence2:FAMILY", module.GROUP))
    with pytest.raises(FamilyError, match="offers a family 'ofa', which there is already"):
        families.names  # noqa: B018 - looking is what fails


def test_a_declaration_that_cannot_be_loaded_breaks_no_other_family(monkeypatch):
    families = offering(monkeypatch, EntryPoint("broken", "absent_package:FAMILY", module.GROUP))
    assert families["ofa"] is FAMILY
    with pytest.raises(FamilyError, match=r"'broken' .*cannot be loaded"):
        families["broken"]


def test_a_declaration_of_another_interface_is_refused(monkeypatch):
    monkeypatch.setattr("weightport.families.ofa.FAMILY", replace(FAMILY, interface=99))
    with pytest.raises(FamilyError, match="written for version 99 of the family interface"):
        offering(monkeypatch)["ofa"]


def test_what_is_no_declaration_is_refused(monkeypatch):
    monkeypatch.setattr("weightport.families.ofa.FAMILY", "ofa")
    with pytest.raises(FamilyError, match="is no weightport Family, but 'ofa'"):
        offering(monkeypatch)["ofa"]


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UnknownFamilyError, match="There is no family 'llava'; there are ofa, florence2"):
        registry()["llava"]


def test_a_stage_that_a_family_does_not_have_is_named():
    with pytest.raises(FamilyError, match="The family 'ofa' has no parity"):
        replace(FAMILY, parity_stage=None).parity  # noqa: B018 - looking is what fails
