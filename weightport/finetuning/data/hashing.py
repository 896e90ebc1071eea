"""Names of things as numbers and hexadecimal digests that are the same in every process and every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np


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


def shares_of(keys: np.ndarray, salt: int) -> np.ndarray:
    """A number from 0 to 1 for each of the keys, int64 [n] as `key_of` gives them: float64 [n], evenly spread, another
    one for another `salt`. Bits are mixed as in SplitMix64, so that keys that were chosen by one salt are evenly
    spread for the next."""
    with np.errstate(over="ignore"):
        mixed = keys.view(np.uint64) + np.uint64(salt) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed.astype(np.float64) / 2.0**64
