"""`weightport verify`: whether a model directory is whole, and its parts belong together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightport.cli.display import Lines, echo
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option, quiet_option, uncollected
from weightport.formatting import count, size

if TYPE_CHECKING:
    from weightport.integrity.findings import Verification

FAILED = 1
SHOWN = 12
"""Files without a recorded hash that are named; the rest is counted."""


@click.command("verify")
@click.argument("directory", metavar="DIR", type=ExistingPath())
@quiet_option
@json_option
@command_body
def verify_command(directory: Path, quiet: bool, as_json: bool) -> None:
    """Verify the model directory DIR: files against recorded hashes, tensors and names against the native class on the
    meta device, tokenizer and processor against the model, versions against those known to be wrong.

    Nothing is written and no code of DIR is run. The exit status is 1 when something is wrong, one line a finding.
    """
    lines = Lines(quiet=quiet or as_json)
    with uncollected():
        from weightport.api import verify
    with lines.progress("hashes") as (start, advance):
        found = verify(directory, start=start, advance=advance)
    if as_json:
        echo(found.to_json(), nl=False)
    else:
        _show(lines, found, quiet=quiet)
    if not found.passed:
        click.get_current_context().exit(FAILED)


def _show(lines: Lines, found: Verification, *, quiet: bool) -> None:
    from weightport.integrity.findings import Severity

    name = found.architecture or "no architecture"
    lines.heading(f"{found.directory} · {name} · {count(found.parameters)} parameters · {found.tensors} tensors")
    wrong = found.of(Severity.WRONG)
    if found.hashed:
        rate = f" · {size(found.nbytes / found.seconds)}/s" if found.seconds else ""
        amount = f"{len(found.hashed)} files, {size(found.nbytes)}"
        lines.line("hashes", f"{amount} against {', '.join(found.sources)}{rate}")
    for text in found.checked:
        lines.line("checked", text)
    for each in found.of(Severity.WARNING):
        lines.line("warning", each.line)
    unchecked = found.of(Severity.UNCHECKED)
    for each in unchecked[:SHOWN]:
        lines.line("unknown", each.line)
    if len(unchecked) > SHOWN:
        lines.line("unknown", f"{len(unchecked) - SHOWN} more (--json has them all)")
    for each in wrong:
        if quiet:
            echo(f"{found.directory}: {each.line}", err=True)
        else:
            lines.line("wrong", each.line)
    lines.heading(f"{len(wrong)} finding{'s' if len(wrong) > 1 else ''}" if wrong else "nothing is wrong")
