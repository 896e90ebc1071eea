"""What a verification finds, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class Severity(Enum):
    """WRONG: the directory is damaged, or its parts do not belong together. WARNING: it is whole, but made by or meant
    for software that is known to be wrong. UNCHECKED: nothing says what would be right."""

    WRONG = "wrong"
    WARNING = "warning"
    UNCHECKED = "not checked"


@dataclass(frozen=True)
class Finding:
    """One sentence about one part of the directory: `subject` is a file's name or what was looked at."""

    severity: Severity
    subject: str
    text: str

    @property
    def line(self) -> str:
        return f"{self.subject}: {self.text}"


@dataclass(frozen=True)
class Verification:
    """A directory that was looked at. `hashed`: files whose bytes were compared with a recorded hash, `nbytes` of
    them in `seconds`; `sources`: where the hashes were recorded; `checked`: what else was compared, in words."""

    directory: Path
    architecture: str | None
    parameters: int
    tensors: int
    hashed: tuple[str, ...]
    nbytes: int
    seconds: float
    sources: tuple[str, ...]
    checked: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not self.of(Severity.WRONG)

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.severity is severity)

    def to_json(self) -> str:
        found: dict[str, Any] = {
            "directory": str(self.directory),
            "passed": self.passed,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "tensors": self.tensors,
            "hashed": {"files": list(self.hashed), "bytes": self.nbytes, "recorded_in": list(self.sources)},
            "checked": list(self.checked),
            "findings": [
                {"severity": each.severity.value, "subject": each.subject, "text": each.text} for each in self.findings
            ],
        }
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def wrong(subject: str, text: str) -> Finding:
    return Finding(Severity.WRONG, subject, text)


def warning(subject: str, text: str) -> Finding:
    return Finding(Severity.WARNING, subject, text)


def unchecked(subject: str, text: str) -> Finding:
    return Finding(Severity.UNCHECKED, subject, text)


def listed(names: Iterable[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    known = list(names)
    rest = f" and {len(known) - shown} more" if len(known) > shown else ""
    return ", ".join(known[:shown]) + rest
