"""`weightport`: every command under one name."""

from __future__ import annotations

import click

from weightport.cli.adapters import port_adapter_command
from weightport.cli.comparing import compare_command
from weightport.cli.conversion import convert_command
from weightport.cli.evaluation import evaluate_command
from weightport.cli.exporting import export_command
from weightport.cli.families import families_command, family_check_command
from weightport.cli.finetuning import finetune_command, recipes_command
from weightport.cli.generation import generate_command
from weightport.cli.inspection import inspect_command
from weightport.cli.merging import extract_lora_command, merge_lora_command
from weightport.cli.parity import parity_command
from weightport.cli.releasing import release_command
from weightport.cli.verifying import verify_command
from weightport.version import __version__


class Commands(click.Group):
    """The commands. `convert` is made of the families' declarations when it is asked for: a package that offers a
    broken family breaks it, and no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "convert"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "convert":
            command: click.Command = convert_command()
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="weightport")
def main() -> None:
    """Bring a vision-language model's original checkpoint into today's transformers, provably unchanged."""


for command in (
    families_command,
    family_check_command,
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
    verify_command,
):
    main.add_command(command)
