"""What transformers' common tests need and its source archive lacks: two files of its repository, and the network."""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from PIL import Image

SAMPLE_TEXT = "This is a sample text.\nIt has a few lines, with numbers such as 12.\n\nThis is the last one.\n"


@cache
def picture() -> str:
    """Path of a picture that stands in for those of the Hub."""
    path = Path(tempfile.mkdtemp()) / "picture.png"
    Image.radial_gradient("L").convert("RGB").save(path)
    return str(path)


@cache
def tests_folder() -> str:
    """A folder that holds fixtures/sample_text.txt, which the tokenizers' tests read."""
    folder = Path(tempfile.mkdtemp())
    (folder / "fixtures").mkdir()
    (folder / "fixtures" / "sample_text.txt").write_text(SAMPLE_TEXT)
    return str(folder)


def install() -> None:
    """Provide `fetch_hub_objects_for_ci` of transformers' utils/, unless it is there."""
    if "fetch_hub_objects_for_ci" not in sys.modules:
        module = ModuleType("fetch_hub_objects_for_ci")
        module.url_to_local_path = lambda url: picture() if url.endswith((".png", ".jpg")) else url
        sys.modules[module.__name__] = module
