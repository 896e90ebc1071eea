"""Command lines. Each parses, calls one function, shows progress and prints the result.

Nothing heavy is imported here or at the top of any module below: `--help` answers without torch.
"""

from __future__ import annotations

from weightport.cli.app import main
from weightport.cli.conversion import port_florence2, port_ofa
from weightport.cli.finetuning import port_finetune
from weightport.cli.merging import port_merge_lora
from weightport.cli.parity import port_parity
from weightport.cli.releasing import port_release

__all__ = ["main", "port_finetune", "port_florence2", "port_merge_lora", "port_ofa", "port_parity", "port_release"]
