"""Text of a file for a reader: cut, quoted, and without what a terminal would obey."""

from __future__ import annotations


def shown(value: object, limit: int = 120) -> str:
    """`value` for an error message: quoted if it is text, control characters escaped, cut at `limit` characters."""
    if isinstance(value, tuple):
        items = [type(item).__name__ if isinstance(item, tuple) else shown(item, 24) for item in value[:16]]
        return "[" + ", ".join(items) + (", …]" if len(value) > 16 else "]")
    if isinstance(value, (str, bytes)):
        return ascii(value[:limit]) + ("…" if len(value) > limit else "")
    text = ascii(value) if isinstance(value, (int, float, type(None))) else type(value).__name__
    return text if len(text) <= limit else text[:limit] + "…"


def printable(name: str) -> str:
    """`name` with every character that prints nothing, or makes a terminal act, as its escape: ESC is \\x1b."""
    if name.isprintable():
        return name
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in name)
