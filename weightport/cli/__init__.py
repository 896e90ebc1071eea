"""Command lines. Each parses, calls one function, shows progress and prints the result.

Nothing heavy is imported here or at the top of any module below: `--help` answers without torch.
"""

from __future__ import annotations

from typing import Any

from weightport.cli.app import main
from weightport.cli.conversion import port_command
from weightport.cli.finetuning import port_finetune
from weightport.cli.merging import port_merge_lora
from weightport.cli.parity import port_parity
from weightport.cli.releasing import port_release
from weightport.families.registry import registry

__all__ = ["main", "port_finetune", "port_merge_lora", "port_parity", "port_release"]


def __getattr__(name: str) -> Any:
    """`port_ofa` and its like: a command for every family, also of other packages (their console scripts name it)."""
    family = name.removeprefix("port_")
    if family != name and family in registry().names:
        return port_command(registry()[family])
    raise AttributeError(f"module 'weightport.cli' has no attribute {name!r}")
