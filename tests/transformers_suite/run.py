"""Runs transformers' own common tests on our classes: `python tests/transformers_suite/run.py [pytest arguments]`.

The tests are those of the installed version, taken from its source distribution (pip's index has to be reachable the
first time; later runs find them in .cache). That archive holds the common test modules without the packages that some
of them import mix-ins from: generation and export tests. Those mix-ins are stood in for by empty ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache"
ABSENT_MIXINS = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def fetch_tests(release: str) -> Path:
    """The folder that holds transformers' package `tests` of this release; fetched unless it is there."""
    folder = CACHE / f"transformers-{release}-tests"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        print(f"fetching the source distribution of transformers {release}", flush=True)
        download = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch]
        subprocess.run([sys.executable, "-m", "pip", *download, f"transformers=={release}"], check=True)
        (archive,) = Path(scratch).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as source:
            prefix = archive.name.removesuffix(".tar.gz") + "/tests/"
            source.extractall(
                scratch, [member for member in source.getmembers() if member.name.startswith(prefix)], filter="data"
            )
        tests = Path(scratch) / prefix
        (tests / "__init__.py").touch()
        for path, mixin in ABSENT_MIXINS.items():
            if not (tests / path).exists():
                (tests / path).parent.mkdir(exist_ok=True)
                (tests / path).parent.joinpath("__init__.py").touch()
                (tests / path).write_text(f"class {mixin}:\n    pass\n")
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        shutil.move(tests, unpacked / "tests")
        unpacked.rename(folder)
    return folder


def main(arguments: list[str]) -> int:
    tests = fetch_tests(version("transformers"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])}
    pytest = ["-m", "pytest", "-q", "-c", str(HERE / "pytest.ini"), "-p", "no:cacheprovider", "-n", "2"]
    return subprocess.run([sys.executable, *pytest, *(arguments or [str(HERE)])], env=environment, cwd=HERE).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
