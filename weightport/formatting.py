"""Amounts in words."""

from __future__ import annotations


def size(count: float) -> str:
    """1.3 GB, 640 MB, 12 kB, 300 bytes: decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count:.0f} bytes"


def samples(number: float) -> str:
    """12 samples, 1 sample, 3.4 samples."""
    if number == 1:
        return "1 sample"
    return f"{number:,.0f} samples" if number == int(number) or number >= 100 else f"{number:.1f} samples"


def count(number: int) -> str:
    """159.9 M, 2.3 B, 12.0 k: parameters as papers print them."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return str(number)


def shortened(text: str, limit: int = 80) -> str:
    """The first `limit` characters of a longer text, and an ellipsis."""
    return text if len(text) <= limit else text[:limit] + "…"
