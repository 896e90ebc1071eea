"""The fast tests at the ends of the stated ranges: `python tests/versions/run.py [--only NAME] [-- pytest arguments]`.

Each environment is made, used and removed before the next one: its own interpreter (found as `python3.N`, among
pyenv's versions, or told with --python 3.N=PATH), the package, its tests, and directories that other environments
wrote. The results go into docs/versions.md; those of environments that were not run this time stay.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / ".cache" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
SHOWN = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "peft", "accelerate", "numpy")
DISK = {"cpu": 4e9, "cuda": 16e9}
"""Bytes that have to be free for an environment, by the kind of torch in it."""
CURRENT = "as developed"
MATRIX = "## Matrix\n"


@dataclass(frozen=True)
class Environment:
    """One end of the ranges: a version of Python, and whether the lowest or the newest packages are wanted."""

    name: str
    python: str
    lowest: bool = False


ENVIRONMENTS = (
    Environment("lowest", "3.11", lowest=True),
    Environment("newest, 3.12", "3.12"),
    Environment("newest, 3.13", "3.13"),
)


def lower_bounds() -> dict[str, str]:
    """The lowest version of every requirement in setup.cfg that states one, but for tools of the tests."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = "\n".join([setup["options"]["install_requires"], extras["finetune"], extras["zarr"]]).splitlines()
    found = (re.match(r"([\w.-]+)>=([\d.]+)", line.strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


def requirements(environment: Environment, torch: str | None) -> list[str]:
    """What is installed beside the package: the lower bounds, or nothing but a given torch."""
    pins = lower_bounds() if environment.lowest else {}
    pins.pop("torch", None) if torch else None
    return [*([torch] if torch else []), *(f"{name}=={version}" for name, version in pins.items())]


def interpreter(version: str, told: Mapping[str, str]) -> str | None:
    """The path of `python3.N`; None where this machine has none."""
    if version in told:
        return told[version]
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(pyenv[-1]) if pyenv else shutil.which(f"python{version}")


def run(environment: Environment, arguments: argparse.Namespace, exchange: Path) -> dict[str, Any]:
    """What came of one environment, as plain data."""
    python = interpreter(environment.python, dict(each.split("=", 1) for each in arguments.python))
    if python is None:
        return {"not run": f"no Python {environment.python} here"}
    needed = DISK["cpu" if arguments.torch else "cuda"]
    if shutil.disk_usage(exchange).free < needed:
        return {"not run": f"needs {needed / 1e9:.0f} GB of free disk"}
    with tempfile.TemporaryDirectory(prefix="weightport-versions-", dir=exchange.parent) as folder:
        own = Path(folder) / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "venv", str(Path(folder) / "venv")], check=True)
        wanted = requirements(environment, arguments.torch)
        print(
            f"{environment.name}: Python {environment.python}, {', '.join(wanted) or 'the newest of all'}", flush=True
        )
        # Most of an environment is the same wheels as the one before: fetched once, and compiled as they are used.
        pip = [
            str(own),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            "--cache-dir",
            str(exchange.parent / "pip"),
        ]
        package = ["--editable", f"{ROOT}[test,adapters]"]
        done = subprocess.run([*pip, *wanted, *package], capture_output=True, text=True, check=False)
        if done.returncode:
            return {"not run": f"pip: {_last(done.stderr, 'ERROR')}"}
        return tried(str(own), environment.name, exchange, arguments.pytest)


def tried(python: str, name: str, exchange: Path, pytest: Sequence[str]) -> dict[str, Any]:
    """Write directories, read those of the environments before, run the tests."""
    found: dict[str, Any] = {"versions": versions(python)}
    found["wrote"] = _exchange(python, "write", exchange / re.sub(r"\W+", "-", name))
    found["read"] = _exchange(python, "read", exchange)
    begun = time.monotonic()
    done = _process(python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadscope", "-p", "no:cacheprovider", *pytest)
    (exchange.parent / f"versions-{re.sub(r'[^a-z0-9.]+', '-', name)}.log").write_text(done.stdout + done.stderr)
    summary = re.findall(r"(\d+) (passed|failed|error|skipped)", _last(done.stdout, " in "))
    found["tests"] = {kind: int(number) for number, kind in summary}
    found["failed"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    found["seconds"] = round(time.monotonic() - begun)
    return found


def versions(python: str) -> dict[str, str]:
    program = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'python': platform.python_version(), **{n: version(n) for n in sys.argv[1:]}}))"
    )
    found: dict[str, str] = json.loads(_process(python, "-c", program, *SHOWN).stdout)
    return found


def _exchange(python: str, verb: str, folder: Path) -> dict[str, str]:
    done = _process(python, str(HERE / "exchange.py"), verb, str(folder))
    try:
        found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        found = {"all": _last(done.stderr, "Error") or f"status {done.returncode}"}
    return found


def _process(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _last(text: str, word: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if word in line), "")


def page(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/versions.md with the matrix of `results` between its headings "Matrix" and the next; the rest stays."""
    before, heading, after = text.partition(MATRIX)
    if not heading:
        raise ValueError(f"{PAGE.name} has no heading {MATRIX.strip()!r}")
    rest = after[after.index("\n## ") :] if "\n## " in after else ""
    return f"{before}{heading}\n{matrix(results)}{rest}"


def matrix(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each environment, and below them what failed."""
    lines = [
        "| environment | " + " | ".join(("Python", *SHOWN, "tests", "wrote", "read")) + " |",
        "|" + "---|" * (len(SHOWN) + 5),
    ]
    notes = []
    for name, found in results.items():
        if "not run" in found:
            notes.append(f"- {name}: not run ({found['not run']}).")
            continue
        tests = ", ".join(f"{number} {kind}" for kind, number in found["tests"].items()) or "not run"
        cells = [found["versions"]["python"], *(found["versions"][each] for each in SHOWN), tests]
        cells += ["all" if not found[key] else f"{len(found[key])} errors" for key in ("wrote", "read")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        notes += [f"- {name}: {test} fails." for test in found["failed"]]
        notes += [f"- {name}: {case}: {text}" for key in ("wrote", "read") for case, text in found[key].items()]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [each.name for each in ENVIRONMENTS]
    parser.add_argument("--only", action="append", choices=names, help="run this environment; repeatable")
    parser.add_argument("--python", action="append", default=[], metavar="3.N=PATH")
    parser.add_argument("--torch", help="the torch of every environment, such as torch==2.13.0+cpu; by default the "
                        "end of the range, which brings CUDA's libraries along")  # fmt: skip
    parser.add_argument("pytest", nargs="*", default=["tests"], help="what pytest runs, by default all fast tests")
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="exchange-", dir=RESULTS.parent) as folder:
        exchange = Path(folder) / "directories"
        exchange.mkdir()
        wrote = _exchange(sys.executable, "write", exchange / "as-developed")
        for environment in ENVIRONMENTS:
            if not arguments.only or environment.name in arguments.only:
                results[environment.name] = run(environment, arguments, exchange)
                for log in Path(folder).glob("*.log"):
                    shutil.copy(log, RESULTS.parent)
        read = _exchange(sys.executable, "read", exchange)
    tests = results.get(CURRENT, {}).get("tests", {})
    results[CURRENT] = {
        "versions": versions(sys.executable), "wrote": wrote, "read": read, "tests": tests, "failed": [],
    }  # fmt: skip
    order = [*(name for name in names if name in results), CURRENT]
    RESULTS.write_text(json.dumps({name: results[name] for name in order}, indent=1))
    PAGE.write_text(page(PAGE.read_text(), {name: results[name] for name in order}))
    bad = [name for name, found in results.items() if any(found.get(key) for key in ("failed", "wrote", "read"))]
    print(f"{PAGE.relative_to(ROOT)} is written; " + (f"errors in {', '.join(bad)}" if bad else "no errors"))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
