"""`port-parity`: a converted model held against the original implementation's numbers."""

from __future__ import annotations

from pathlib import Path

import click

from weightport.cli.display import output_console
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, quiet_option
from weightport.errors import UsageError

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
@click.argument("directory", type=ExistingPath())
@click.option(
    "--reference",
    required=True,
    type=ExistingPath(),
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
    type=click.Path(path_type=Path),
    help="Also write the report as one HTML page to this file; - is standard output.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Also write the report as JSON to this file; - is standard output.",
)
@click.option("--overwrite", is_flag=True, help="Replace the reports of an earlier check.")
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
    overwrite: bool,
    quiet: bool,
) -> None:
    """Run the converted model in DIRECTORY on the inputs of a reference file and compare every seam with what the
    original gave there. The exit status is 1 when the model departs, 2 when the reference does not fit.
    docs/parity.md says what counts as noise."""
    import torch
    from transformers.utils import logging

    # A reference's generation settings stand beside the directory's own: transformers warns of each pair.
    logging.set_verbosity_error()
    from weightport.api import check_parity
    from weightport.devices import usable_device
    from weightport.parity import render
    from weightport.writing import require_text_output, write_text
    from weightport.writing.text_output import is_stdout

    wanted = {kind: file for kind, file in (("json", json_file), ("page", page_file)) if file is not None}
    printed = [file for file in wanted.values() if is_stdout(file)]
    if len(printed) == 2 or (json_file is not None and json_file == page_file):
        raise UsageError(f"--json and --report both go to {json_file}: give each a file of its own.")
    for file in wanted.values():
        require_text_output(file, overwrite=overwrite, beside=[reference])
    report = check_parity(
        directory,
        reference,
        dtypes=[getattr(torch, name) for name in dtypes] or None,
        device=str(usable_device(device)),
        attn_implementation=attn,
        use_cache=not no_cache,
        invariance=invariance,
    )
    from weightport.converters.record import link_parity
    from weightport.parity.page import page

    files: dict[str, Path] = {}
    for kind, file in wanted.items():
        text = report.to_json() if kind == "json" else page(report)
        if write_text(file, text, overwrite=overwrite, beside=[reference]):
            files[kind] = file
    link_parity(directory, report.passed, report.verdict, files)
    # A report on standard output is all that stands there.
    if not quiet and not printed:
        render(report, output_console())
    if not report.passed:
        click.get_current_context().exit(FAILED)


parity_command = click.Command(
    "parity", params=port_parity.params, callback=port_parity.callback, help=port_parity.help
)
