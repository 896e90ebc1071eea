"""Registration with transformers' Auto classes, in processes of their own: whatever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
        "import weightport.modeling",
        "import transformers; import weightport.modeling",
        "from transformers import BertModel; import weightport.modeling",
        "import weightport.modeling.ofa.modeling_ofa",
        "import weightport.modeling; from weightport.modeling.registration import register; register()",
    ],
)
def test_auto_classes_know_ofa_whatever_was_imported_first(imports):
    assert run(imports + CHECK) == FOUND


def test_auto_classes_know_moondream():
    code = CHECK.replace('"ofa"', '"moondream"').replace(", AutoModelForSeq2SeqLM)]", ")]")
    assert run("import weightport.modeling" + code) == (
        "MoondreamConfig MoondreamModel MoondreamForConditionalGeneration MoondreamProcessor"
    )


def test_importing_weightport_imports_neither_torch_nor_transformers():
    code = (
        "import sys, weightport; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert run(code) == "[]"


def test_importing_weightport_leaves_the_import_system_alone():
    # transformers installs finders of its own.
    code = "import sys, transformers; before = list(sys.meta_path); import weightport.modeling"
    assert run(f"{code}; print(sys.meta_path == before)") == "True"
