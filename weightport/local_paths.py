"""Paths of this machine: told from other text in what may be published, and links that lead out of a folder."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

# Two names at least; not the rest of an address, a tag, or a relative path.
_ABSOLUTE = re.compile(r"(?<![\w/.:<~*-])(?:~|/[\w.@+%=-]+)(?:/[\w.@+%=-]+)+")
_UPWARDS = re.compile(r"(?<![\w/.])(?:\.\./)+[\w./@+%=-]+")
_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:[\\/][^\s\"']+")

# Roots of other machines, where this one has no such folder.
_ROOTS = frozenset({"home", "Users", "root", "mnt", "media", "data", "scratch", "workspace", "content", "tmp", "var"})


def shortened(text: str) -> str:
    """`text` with every local path in it reduced to its last name."""
    text = _ABSOLUTE.sub(lambda found: _last(found[0]), text)
    text = _UPWARDS.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)
    return _WINDOWS.sub(lambda found: PureWindowsPath(found[0]).name, text)


def shortened_values(value: Any) -> Any:
    """Parsed JSON with local paths in its texts shortened."""
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, dict):
        return {key: shortened_values(item) for key, item in value.items()}
    return [shortened_values(item) for item in value] if isinstance(value, list) else value


def target_outside(path: Path, folder: Path) -> Path | None:
    """Where a link in `folder` leads, if not to a file of the folder; None for everything else.

    The Hub's cache is a folder of links to the blobs beside it: those are the folder's own.
    """
    if not path.is_symlink():
        return None
    real, inside = path.resolve(), folder.resolve()
    own = [inside, *([inside.parents[1] / "blobs"] if inside.parent.name == "snapshots" else [])]
    return None if any(real.is_relative_to(place) for place in own) else real


def _last(path: str) -> str:
    first = path.split("/")[1]
    local = path.startswith("~") or first in _ROOTS or Path("/", first).is_dir()
    return path.rpartition("/")[2] if local else path
