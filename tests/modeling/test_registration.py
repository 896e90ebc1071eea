"""Registration with transformers' Auto classes, in processes of their own: whatever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from weightport.modeling.registration import REGISTRATIONS, AutoRegistrar, Registration

CHECK = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

config = AutoConfig.for_model("ofa")
found = [auto._model_mapping[type(config)] for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForSeq2SeqLM)]
print(type(config).__name__, *(cls.__name__ for cls in found), PROCESSOR_MAPPING[type(config)].__name__)
"""
FOUND = "OFAConfig OFAModel OFAForConditionalGeneration OFAForConditionalGeneration OFAProcessor"


def run(code: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import weightport",
        "import transformers; import weightport",
        # modeling_bert imports the Auto classes before the base classes of ours are whole.
        "import weightport; from transformers import BertModel",
        "import weightport.modeling.ofa.modeling_ofa",
    ],
)
def test_auto_classes_know_ofa_whatever_was_imported_first(imports):
    assert run(imports + CHECK) == FOUND


def test_importing_weightport_imports_neither_torch_nor_transformers():
    code = (
        "import sys, weightport; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert run(code) == "[]"


def test_modules_keep_their_own_loaders():
    code = "import weightport; import transformers.models.auto.configuration_auto as module; "
    assert "SourceFileLoader" in run(code + "print(type(module.__spec__.loader), type(module.__loader__))")


def test_a_registration_that_fails_warns_and_leaves_the_others(monkeypatch):
    import transformers.models.auto.configuration_auto  # noqa: F401

    broken = Registration("transformers.models.auto.configuration_auto:AutoConfig", "absent:A", "absent:A", "config")
    applied = []
    monkeypatch.setattr(Registration, "apply", lambda self: applied.append(self) or (self is broken and 1 / 0))
    registrar = AutoRegistrar([broken, REGISTRATIONS[0]])
    with pytest.warns(UserWarning, match="could not register absent:A: ZeroDivisionError"):
        registrar.register()
    assert applied == [broken, REGISTRATIONS[0]]
    assert registrar.pending == []


def test_nothing_is_registered_while_a_watched_module_is_being_imported():
    import transformers.models.auto.configuration_auto  # noqa: F401

    registrar = AutoRegistrar(REGISTRATIONS[:1])
    registrar.executing.add("transformers.modeling_layers")
    registrar.register()
    assert registrar.pending == [REGISTRATIONS[0]]
