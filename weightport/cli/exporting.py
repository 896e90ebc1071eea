"""`weightport export`: a model directory back to its original format."""

from __future__ import annotations

import json
from pathlib import Path

import click

from weightport.cli.display import Lines, echo
from weightport.cli.running import command_body, json_option, quiet_option
from weightport.formatting import size


@click.command("export")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace TARGET if it exists.")
@quiet_option
@json_option
@command_body
def export_command(directory: Path, target: Path, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Write the converted model in DIRECTORY to TARGET in its original format, bit for bit."""
    from weightport.converters import export

    lines = Lines(quiet=quiet or as_json)
    with lines.progress("write") as (start, advance):
        result = export(directory, target, overwrite=overwrite, announce=start, advance=advance)
    if as_json:
        echo(json.dumps({"path": str(result.path), "tensors": result.tensors, "bytes": result.nbytes}))
    lines.line(str(target), f"{result.tensors} tensors · {size(result.nbytes)}")
