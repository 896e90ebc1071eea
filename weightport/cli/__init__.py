"""Command lines. Each parses, calls one function, shows progress and prints the result.

Nothing heavy is imported here or at the top of any module below: `--help` answers without torch.
"""

from __future__ import annotations

from .app import main
from .conversion import port_florence2, port_ofa
from .finetuning import port_finetune
from .merging import port_merge_lora
from .parity import port_parity
from .releasing import port_release

__all__ = ["main", "port_finetune", "port_florence2", "port_merge_lora", "port_ofa", "port_parity", "port_release"]
