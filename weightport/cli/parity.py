"""`port-parity`: a converted model held against the original implementation's numbers."""

from __future__ import annotations

from pathlib import Path

import click

from weightport.cli.running import command_body, quiet_option

FAILED = 1
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


def attention_names(value: str | None) -> tuple[str, ...]:
    """`eager,sdpa` as names; none when the option is not given."""
    names = tuple(name.strip() for name in (value or "").split(",") if name.strip())
    unknown = [name for name in names if name not in ATTENTIONS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)} is not one of {', '.join(ATTENTIONS)}.")
    return names


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
    type=click.Choice(("float32", "float64", "float16", "bfloat16")),
    help="Run in this type only. By default float32 and float64, of which training runs are left out that do not fit "
    "in memory. Repeatable.",
)
@click.option(
    "--attn",
    metavar="NAMES",
    callback=lambda context, parameter, value: attention_names(value),
    help="Attention implementations, each held against the reference: eager, sdpa, flash_attention_2; separated by "
    "commas. By default the model's own.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to run the model.")
@click.option("--no-cache", is_flag=True, help="Generate without cached keys and values.")
@click.option(
    "--invariance",
    is_flag=True,
    help="Also hold each sample alone against itself in the batch, behind more padding, and decoded step by step.",
)
@click.option(
    "--report",
    "page_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the report as one HTML page to this file.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write the report as JSON to this file."
)
@quiet_option
@command_body
def port_parity(
    directory: Path,
    reference: Path,
    dtypes: tuple[str, ...],
    attn: tuple[str, ...],
    device: str,
    no_cache: bool,
    invariance: bool,
    page_file: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Run the converted model in DIRECTORY on the inputs of a reference file and compare every seam with what the
    original gave there. The exit status is 1 when the model departs, 2 when the reference does not fit. docs/parity.md says what
    counts as noise."""
    import torch
    from rich.console import Console
    from transformers.utils import logging

    # A reference's generation settings stand beside the directory's own: transformers warns of each pair.
    logging.set_verbosity_error()
    from weightport.parity import check_parity, render

    report = check_parity(
        directory,
        reference,
        dtypes=[getattr(torch, name) for name in dtypes] or None,
        device=device,
        attn_implementation=attn,
        use_cache=not no_cache,
        invariance=invariance,
    )
    from weightport.converters.record import link_parity
    from weightport.reports.parity_page import page
    from weightport.writing.whole_output import whole_file

    for file, write in ((json_file, lambda: report.to_json()), (page_file, lambda: page(report))):
        if file is not None:
            with whole_file(file, overwrite=True) as path:
                path.write_text(write(), encoding="utf-8")
    written = {"json": json_file, "page": page_file}
    link_parity(directory, report.passed, report.verdict, {kind: file for kind, file in written.items() if file})
    if not quiet:
        render(report, Console())
    if not report.passed:
        click.get_current_context().exit(FAILED)


parity_command = click.Command(
    "parity", params=port_parity.params, callback=port_parity.callback, help=port_parity.help
)
