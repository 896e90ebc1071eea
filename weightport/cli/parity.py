"""`port-parity`: a converted model held against the original implementation's numbers."""

from __future__ import annotations

from pathlib import Path

import click

from .running import command_body, quiet_option

FAILED = 1


@click.command("port-parity", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    required=True,
    type=click.Path(path_type=Path),
    help="Inputs and outputs of the original implementation (a safetensors file of the reference format).",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(("float32", "float64")),
    help="Run in this type only. By default float32, and float64 too when the model fits in memory. Repeatable.",
)
@click.option(
    "--attn", type=click.Choice(("eager", "sdpa")), help="Attention implementation; by default the model's own."
)
@click.option("--device", default="cpu", show_default=True, help="Where to run the model.")
@click.option("--no-cache", is_flag=True, help="Generate without cached keys and values.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write the report as JSON to this file."
)
@quiet_option
@command_body
def port_parity(
    directory: Path,
    reference: Path,
    dtypes: tuple[str, ...],
    attn: str | None,
    device: str,
    no_cache: bool,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Run the converted model in DIRECTORY on the inputs of a reference file and compare every seam with what the
    original gave there. The exit status is 1 when a seam departs, 2 when the reference does not fit."""
    import torch
    from rich.console import Console

    from ..parity import check_parity, render

    report = check_parity(
        directory,
        reference,
        dtypes=[getattr(torch, name) for name in dtypes] or None,
        device=device,
        attn_implementation=attn,
        use_cache=not no_cache,
    )
    if json_file is not None:
        from ..converters.output import whole_file

        with whole_file(json_file, overwrite=True) as path:
            path.write_text(report.to_json(), encoding="utf-8")
    if not quiet:
        render(report, Console())
    if not report.passed:
        click.get_current_context().exit(FAILED)


parity_command = click.Command(
    "parity", params=port_parity.params, callback=port_parity.callback, help=port_parity.help
)
