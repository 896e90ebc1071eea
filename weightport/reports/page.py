"""What every report page is made of: one document without script or network, sections, and lists that fold."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

FOLDED = 12
"""Longer lists are folded; a click opens them."""


def document(title: str, style: str, body: str, footer: str) -> str:
    """The whole page. `title` is escaped already; `style`, `body` and `footer` are CSS and HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{body}</main>\n"
        f"<footer>{footer}</footer>\n</body>\n</html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """A titled part of the page; nothing where `body` is empty. `note` is plain text above it."""
    if not body:
        return ""
    said = f'<p class="soft">{escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{said}{body}\n</section>\n"


def bullets(items: Iterable[str]) -> str:
    """A list of HTML items, folded where it is long; nothing where there are none."""
    rows = [f"<li>{item}</li>" for item in items]
    if not rows:
        return ""
    whole = f"<ul>{''.join(rows)}</ul>"
    return whole if len(rows) <= FOLDED else f"<details><summary>{len(rows):,} of them</summary>{whole}</details>"
