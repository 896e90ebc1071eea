"""`weightport`: every command under one name."""

from __future__ import annotations

import click

from .. import __version__
from .adapters import port_adapter_command
from .comparing import compare_command
from .conversion import convert_command
from .evaluation import evaluate_command
from .exporting import export_command
from .finetuning import finetune_command, recipes_command
from .generation import generate_command
from .inspection import inspect_command
from .merging import extract_lora_command, merge_lora_command
from .parity import parity_command
from .releasing import release_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="weightport")
def main() -> None:
    """Bring a vision-language model's original checkpoint into today's transformers, provably unchanged."""


for command in (
    convert_command,
    inspect_command,
    export_command,
    parity_command,
    compare_command,
    generate_command,
    finetune_command,
    evaluate_command,
    recipes_command,
    port_adapter_command,
    merge_lora_command,
    extract_lora_command,
    release_command,
):
    main.add_command(command)
