"""Which hashes of a model directory's files are on record, and where: one reader a kind of record.

A directory that weightport wrote lists every file. A conversion, a merge and a release say more of what they wrote,
and a download from the Hub leaves beside its files what the Hub had.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightport.integrity.findings import Finding, wrong
from weightport.writing.ownership import RECORD, is_intact, read_record

HUB = "the Hub"
SUMS = "SHA256SUMS"
"""What a release says of its files, in the form that `sha256sum --check` reads."""
SUMS_HEAD = "# made by weightport for sha256sum --check SHA256SUMS"

_SUM = re.compile(r"([0-9a-f]{64})  (\S.*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT = re.compile(r"[0-9a-f]{40}")
_DOWNLOADS = Path(".cache/huggingface/download")


@dataclass(frozen=True)
class RecordedHash:
    """What the file `file` (its path within the directory) should be: `kind` "sha256", or "git" for the SHA-1 by which
    git names it; `source` is the record that says so."""

    file: str
    kind: str
    digest: str
    source: str


def recorded_hashes(directory: Path) -> tuple[list[RecordedHash], list[Finding]]:
    """(every hash on record, what is wrong with the records themselves)."""
    findings: list[Finding] = []
    own = list(_own(directory, findings))
    # A release's sums are of the files as they were published; the directory's own record goes on.
    sums = [] if own else list(_sums(directory, findings))
    return [*own, *sums, *_work(directory), *_hub_folder(directory), *_hub_snapshot(directory)], findings


def _own(directory: Path, findings: list[Finding]) -> Iterator[RecordedHash]:
    if not (directory / RECORD).is_file():
        return
    record = read_record(directory)
    if record is None or not is_intact(directory):
        findings.append(wrong(RECORD, "is damaged, or was edited: it is not as weightport wrote it"))
    elif record.hashes:
        yield from (RecordedHash(name, "sha256", value, RECORD) for name, value in record.hashes.items())


def _sums(directory: Path, findings: list[Finding]) -> Iterator[RecordedHash]:
    path = directory / SUMS
    if not path.is_file():
        return
    head, *lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    if head != SUMS_HEAD or not lines or lines.pop():
        findings.append(wrong(SUMS, "is not laid out as port-release writes it"))
    for number, line in enumerate(lines, 2):
        found = _SUM.fullmatch(line)
        if found is None or found[2].startswith("/") or ".." in Path(found[2]).parts:
            findings.append(wrong(SUMS, f"line {number} is not a SHA-256 and the name of a file"))
        else:
            yield RecordedHash(found[2], "sha256", found[1], SUMS)


def sums(hashes: Mapping[str, str]) -> str:
    """The text of SHA256SUMS for SHA-256 by file."""
    return "\n".join([SUMS_HEAD, *(f"{value}  {name}" for name, value in sorted(hashes.items())), ""])


def weights_record(directory: Path) -> str | None:
    """The record that speaks of the weights as they are now: that of the last step, where it holds hashes."""
    if (directory / "merge.json").is_file():
        return "merge.json"
    # Training writes other weights beside the conversion's record.
    trained = (directory / "training.json").is_file()
    return "conversion.json" if (directory / "conversion.json").is_file() and not trained else None


def _work(directory: Path) -> Iterator[RecordedHash]:
    name = weights_record(directory)
    record = _json(directory / name) if name is not None else None
    files = record.get("files") if isinstance(record, Mapping) else None
    for entry in files if isinstance(files, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("file"), str) and "/" not in entry["file"]:
            yield RecordedHash(entry["file"], "sha256", str(entry.get("sha256")), str(name))


def _hub_folder(directory: Path) -> Iterator[RecordedHash]:
    """What `hf download --local-dir` leaves: commit, name of the content and time, a line each."""
    folder = directory / _DOWNLOADS
    for path in sorted(folder.rglob("*.metadata")) if folder.is_dir() else ():
        name = str(path.relative_to(folder)).removesuffix(".metadata")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        # Of what the user removed since, the Hub's word is no record.
        if len(lines) > 1 and (directory / name).is_file():
            yield from _of_the_hub(name, lines[1].strip())


def _hub_snapshot(directory: Path) -> Iterator[RecordedHash]:
    """A snapshot in the Hub's cache is links to files that are named by their content."""
    if directory.resolve().parent.name == "snapshots":
        for path in sorted(directory.rglob("*")):
            if path.is_symlink():
                yield from _of_the_hub(str(path.relative_to(directory)), path.resolve().name)


def _of_the_hub(file: str, name: str) -> Iterator[RecordedHash]:
    if _SHA256.fullmatch(name):
        yield RecordedHash(file, "sha256", name, HUB)
    elif _GIT.fullmatch(name):
        yield RecordedHash(file, "git", name, HUB)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
