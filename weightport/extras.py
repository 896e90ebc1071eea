"""How the optional libraries are installed, in one place for every message."""

from __future__ import annotations


def install_command(extra: str) -> str:
    """The command for an extra of setup.cfg. weightport is installed from its checkout; no index has the name."""
    return f"pip install '.[{extra}]' in weightport's checkout"
