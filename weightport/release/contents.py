"""The files of a release as the Hub gets them: the directory's own, card and code, and no path of this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightport.converters.portable import write_portable_code
from weightport.errors import CheckpointError, UsageError
from weightport.hub import without_secrets
from weightport.integrity.recorded_hashes import SUMS, sums
from weightport.local_paths import shortened, shortened_values
from weightport.release.belonging import CONFIGURATION, RECORDS, REPORTS
from weightport.release.checking import CheckedDirectory
from weightport.writing import own_file
from weightport.writing.ownership import is_own_file

CARD = "README.md"
_SEAL = "<!-- Written by port-release; SHA-256 of the text above: {} -->"
_TEXTS = (*CONFIGURATION, *RECORDS, *REPORTS)


@dataclass(frozen=True)
class PublishedFile:
    """One file on the Hub: the bytes at `path`, or `content`. `sha256` where it is known; `note` says what differs
    from the directory's file; `made`: a release writes it, into the directory too."""

    name: str
    size: int
    path: Path | None = None
    content: bytes | None = None
    sha256: str | None = None
    note: str | None = None
    made: bool = False


def contents(checked: CheckedDirectory, card: str) -> tuple[PublishedFile, ...]:
    """Every file of the release, in the order of their names. Raises CheckpointError for a text that holds an access
    token."""
    made = {**_code(checked), CARD: card.encode("utf-8")}
    found = []
    for name in sorted({*checked.published, *made}):
        path = checked.published.get(name)
        content, note = made.get(name), None
        if name in _TEXTS and path is not None:
            before = content if content is not None else path.read_bytes()
            after = _without_paths(name, before)
            _require_no_token(path, after)
            if after != before:
                content, note = after, "local paths shortened"
        if content is not None:
            found.append(PublishedFile(name, len(content), content=content, note=note, made=name in made))
        elif path is not None:
            found.append(PublishedFile(name, path.stat().st_size, path=path, sha256=checked.hashes.get(name)))
    hashes = sums({file.name: file.sha256 or _sha256(file) for file in found}).encode("utf-8")
    found.append(PublishedFile(SUMS, len(hashes), content=hashes, made=True))
    return tuple(sorted(found, key=lambda file: file.name))


def write_into(checked: CheckedDirectory, files: Sequence[PublishedFile]) -> None:
    """Put what the release made (card, code, hashes) into the directory as well, so that it is what was published."""
    for file in files:
        if file.made and file.content is not None:
            with own_file(checked.path / file.name) as work:
                work.write_bytes(file.content)


def _sha256(file: PublishedFile) -> str:
    if file.content is not None:
        return hashlib.sha256(file.content).hexdigest()
    with Path(str(file.path)).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sealed(card: str) -> str:
    """The card with a last line by which a later release knows that nobody has edited it."""
    return f"{card.rstrip()}\n\n{_SEAL.format(hashlib.sha256(card.strip().encode('utf-8')).hexdigest())}\n"


def require_own_card(checked: CheckedDirectory) -> None:
    """Raises UsageError when the directory's README.md is somebody else's, or was edited: it would be lost."""
    path = checked.path / CARD
    if not path.exists():
        return
    found = path.read_text(encoding="utf-8", errors="replace")
    if found != sealed(found.rstrip().rpartition("\n")[0]):
        raise UsageError(
            f"{path} is not a card that port-release wrote, or was edited since, and would be replaced. Move it away; "
            "what it says can be added to the card on the Hub."
        )


def require_own_sums(checked: CheckedDirectory) -> None:
    """Raises UsageError when the directory's SHA256SUMS is somebody else's: it would be lost."""
    path = checked.path / SUMS
    if path.exists() and not is_own_file(path):
        raise UsageError(f"{path} is not one that port-release wrote, and would be replaced. Move it away.")


def _code(checked: CheckedDirectory) -> Mapping[str, bytes]:
    """The modeling files that the release gets because transformers has none for the family, and the settings that
    name them."""
    family = checked.family
    if family is None or family.portable_code is None or not checked.code:
        return {}
    with tempfile.TemporaryDirectory(prefix="weightport-code-") as name:
        folder = Path(name)
        for settings in {entry.file for entry in checked.code}:
            if (checked.path / settings).is_file():
                shutil.copyfile(checked.path / settings, folder / settings)
        write_portable_code(folder, family.portable_code, checked.code)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _without_paths(name: str, content: bytes) -> bytes:
    text = content.decode("utf-8", errors="surrogateescape")
    if not name.endswith(".json"):
        return shortened(text).encode("utf-8", errors="surrogateescape")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return content
    changed = shortened_values(parsed)
    indent = 1 if name in RECORDS else 2
    return content if changed == parsed else (json.dumps(changed, indent=indent, ensure_ascii=False) + "\n").encode()


def _require_no_token(path: Path, content: bytes) -> None:
    text = content.decode("utf-8", errors="replace")
    if without_secrets(text) != text:
        raise CheckpointError(
            f"{path} holds an access token, or an address with a password: everybody could read it. Remove it from "
            "the file, and revoke the token if the file was shared before."
        )
