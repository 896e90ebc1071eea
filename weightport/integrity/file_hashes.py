"""The files' bytes against the hashes on record, several files at a time."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weightport.errors import CheckpointError
from weightport.file_state import FileState
from weightport.hashing import BLOCK_BYTES
from weightport.integrity.findings import Finding, unchecked, wrong
from weightport.integrity.recorded_hashes import HUB, RecordedHash, recorded_hashes

Advance = Callable[[int], None]

NO_MODEL = frozenset({".gitattributes", ".gitignore", ".git", ".cache", ".DS_Store"})
"""What stands in a directory and is no part of its model."""


def present(directory: Path, recorded: Sequence[RecordedHash]) -> dict[str, list[RecordedHash]]:
    """The hashes on record by file, of the files that are there."""
    found: dict[str, list[RecordedHash]] = {}
    for each in recorded:
        if (directory / each.file).is_file():
            found.setdefault(each.file, []).append(each)
    return found


def check_hashes(
    directory: Path, recorded: Sequence[RecordedHash], known: Mapping[str, str], advance: Advance
) -> list[Finding]:
    """What is missing, and whose bytes are not those on record; `advance` is told of bytes that were read.

    `known` are SHA-256 by file that were computed from these bytes already.
    """
    files = present(directory, recorded)
    missing = dict.fromkeys((each.file, each.source) for each in recorded if each.file not in files)
    findings = [wrong(name, f"is missing; {source} lists it") for name, source in missing]
    lock, stopped = threading.Lock(), threading.Event()

    def counted(amount: int) -> None:
        if stopped.is_set():
            raise InterruptedError("stopped")
        with lock:
            try:
                advance(amount)
            except BaseException:
                stopped.set()
                raise

    def judged(name: str) -> Finding | None:
        return _judged(directory, name, files[name], known.get(name), counted)

    largest_first = sorted(files, key=lambda name: -(directory / name).stat().st_size)
    if len(files) < 2:
        return [*findings, *(found for name in files if (found := judged(name)) is not None)]
    with ThreadPoolExecutor(max_workers=min(4, len(files), os.cpu_count() or 1)) as workers:
        try:
            results = dict(zip(largest_first, workers.map(judged, largest_first)))
        except BaseException:
            # Ctrl-C does not wait for the files that are being read.
            stopped.set()
            raise
    return [*findings, *(found for name in files if (found := results[name]) is not None)]


def require_recorded(directory: Path, weights: Mapping[str, str], others: Collection[str] = ()) -> list[str]:
    """Hold weights, by file with the SHA-256 of what was read, against the hashes on record; `others` are read here.

    What was downloaded may have been trained on in its place: the Hub's word does not count here. Returns which of the
    others are not as recorded. Raises CheckpointError for weights.
    """
    recorded = [
        each
        for each in recorded_hashes(directory)[0]
        if each.source != HUB and (each.file in weights or each.file in others)
    ]
    changed = []
    for each in check_hashes(directory, recorded, weights, lambda amount: None):
        if each.subject in weights:
            raise CheckpointError(
                f"{directory / each.subject} {each.text}: the weights changed since (damaged, or written over). "
                "Remove that record if it was meant."
            )
        changed.append(each.subject)
    return changed


def without_record(directory: Path, recorded: Sequence[RecordedHash], own_record: str) -> list[Finding]:
    """The files whose hash nobody recorded."""
    known = {each.file.partition("/")[0] for each in recorded} | NO_MODEL | {own_record}
    if any(each.source != own_record for each in recorded):
        known.add("SHA256SUMS")
    return [
        unchecked(path.name, "no hash is on record")
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name not in known
    ]


def _judged(
    directory: Path, name: str, recorded: Sequence[RecordedHash], known: str | None, advance: Advance
) -> Finding | None:
    try:
        found = {"sha256": known} if known is not None and {each.kind for each in recorded} == {"sha256"} else None
        digests = found or _digests(directory / name, {each.kind for each in recorded}, advance)
    except CheckpointError as error:
        return wrong(name, str(error).removeprefix(f"{directory / name}: "))
    except OSError as error:
        return wrong(name, f"cannot be read ({error.strerror or error})")
    for each in recorded:
        if digests[each.kind] != each.digest:
            return wrong(
                name,
                f"is not what {each.source} recorded: its {'SHA-256' if each.kind == 'sha256' else 'git hash'} should "
                f"be {each.digest[:12]}… and is {str(digests[each.kind])[:12]}…",
            )
    return None


def _digests(path: Path, kinds: set[str], advance: Advance) -> dict[str, str]:
    """The file's hash of each kind, in one pass. Raises OSError, CheckpointError when it changes meanwhile."""
    block = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        state = FileState.of(file.fileno())
        running = {kind: hashlib.sha256() if kind == "sha256" else hashlib.sha1() for kind in kinds}
        if "git" in running:
            running["git"].update(f"blob {state.size}\0".encode())
        while count := file.readinto(block):
            for digest in running.values():
                digest.update(block[:count])
            advance(count)
        state.require_same(FileState.of(file.fileno()), path)
    return {kind: digest.hexdigest() for kind, digest in running.items()}
