"""`weightport export`: a model directory back to its original format."""

from __future__ import annotations

import json
from pathlib import Path

import click

from weightport.cli.display import Lines, echo
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option, quiet_option
from weightport.formatting import size

SHOWN = 8
"""How many tensors that are not restored exactly are listed."""


@click.command("export")
@click.argument("directory", type=ExistingPath())
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--part",
    help="Which source to write, where the model was made of several; by default the main one; all: every one.",
)
@click.option("--overwrite", is_flag=True, help="Replace TARGET if it exists.")
@quiet_option
@json_option
@command_body
def export_command(
    directory: Path, target: Path, part: str | None, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    """Write the converted model in DIRECTORY to TARGET in its original format, bit for bit."""
    from weightport.api import export

    lines = Lines(quiet=quiet or as_json)
    with lines.progress("write") as (start, advance):
        result = export(directory, target, part=part, overwrite=overwrite, announce=start, advance=advance)
    if as_json:
        echo(
            json.dumps(
                {
                    "path": str(result.path),
                    "tensors": result.tensors,
                    "bytes": result.nbytes,
                    "lost": dict(result.lost),
                    "left_out": dict(result.left_out),
                }
            )
        )
    for name, what in list(result.lost.items())[:SHOWN]:
        lines.line("lost", f"{name}: {what}")
    for beginning, why in result.left_out.items():
        lines.line("left out", f"{beginning}*: {why} (--part all writes it too)")
    lines.line(str(target), f"{result.tensors} tensors · {size(result.nbytes)}")
