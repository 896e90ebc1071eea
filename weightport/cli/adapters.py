"""`weightport port-adapter`: an adapter trained on the original, for the native model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from weightport.cli.display import Lines, echo, names_in
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option, quiet_option


@click.command("port-adapter")
@click.argument("adapter", type=ExistingPath())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--base",
    required=True,
    type=ExistingPath(),
    help="The original checkpoint that the adapter was trained on, or the directory converted from it.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@quiet_option
@json_option
@command_body
def port_adapter_command(adapter: Path, out: Path, base: Path, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Bring the LoRA adapter in the folder ADAPTER, trained on the original's modules or under the names of an earlier
    transformers, to the native model's: OUT loads in peft on the converted directory and gives the same logits."""
    from weightport.api import port_adapter

    result = port_adapter(adapter, out, base, overwrite=overwrite)
    if as_json:
        found = {
            "directory": str(result.directory),
            "modules": result.modules,
            "saved": result.saved,
            "notes": result.notes,
        }
        echo(json.dumps(found, ensure_ascii=False))
        return
    lines = Lines(quiet=quiet)
    natives = sum(len(names) for names in result.modules.values())
    saved = f" · {len(result.saved)} modules saved as a whole" if result.saved else ""
    lines.heading(f"{adapter} · {len(result.modules)} modules → {natives}{saved}")
    for note in result.notes:
        lines.line("note", note)
    lines.line(f"{out}/", names_in(out))
