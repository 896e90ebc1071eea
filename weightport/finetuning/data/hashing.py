"""Names of things as numbers and hexadecimal digests that are the same in every process and every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable


def key_of(*parts: bytes) -> int:
    """A signed 64-bit number for a sequence of byte strings (Python's own hash differs from process to process)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def fingerprint_of(parts: Iterable[object]) -> str:
    """64 hexadecimal digits for a sequence of plain values: strings, numbers, None, and lists or dicts of them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
