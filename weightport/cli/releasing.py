"""`port-release`: a model directory, checked and described, to the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightport.cli.display import Lines, echo
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option, quiet_option
from weightport.formatting import count, size

if TYPE_CHECKING:
    from weightport.release import CheckedDirectory
    from weightport.release.contents import PublishedFile

SHOWN = 12
"""Names of files that are left out, before the rest is counted."""


@click.command("port-release", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", type=ExistingPath())
@click.option("--repo", required=True, metavar="ORG/NAME", help="Repository on the Hub; made when there is none.")
@click.option("--licence", "--license", "licence", help="As the Hub names it; by default the family's own.")
@click.option("--base-model", metavar="ORG/NAME", help="The model on the Hub that this one was made from.")
@click.option("--language", multiple=True, help="Language code, zh or en. Repeatable.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", help="Branch to upload to; made when there is none.")
@click.option(
    "--include",
    multiple=True,
    metavar="NAME",
    help="Publish this file of DIRECTORY too. Repeatable. Without it, only files that belong to a model go out.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be public, to the byte; change nothing.")
@quiet_option
@json_option
@command_body
def port_release(
    directory: Path,
    repo: str,
    licence: str | None,
    base_model: str | None,
    language: tuple[str, ...],
    private: bool,
    revision: str | None,
    include: tuple[str, ...],
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check the model DIRECTORY, write its model card from what its records say, and upload it."""
    from weightport.api import release
    from weightport.hub import bars, endpoint
    from weightport.release import ReleaseOptions

    lines = Lines(quiet=quiet or as_json)

    def announce(checked: CheckedDirectory, files: Sequence[PublishedFile]) -> None:
        dtype = str(checked.dtype).removeprefix("torch.")
        total = size(sum(file.size for file in files))
        lines.heading(f"{directory} · {count(checked.parameters)} parameters · {dtype} · {total}")
        lines.line("checked", "config, tensors on the meta device, tokenizer, processor, index, hashes")
        for text in checked.warnings:
            lines.line("warning", text)
        if checked.needs_code:
            lines.line("code", "transformers has no class for this model: its modeling code goes along")
        for file in files:
            lines.line("file", f"{file.name} · {size(file.size)}" + (f" · {file.note}" if file.note else ""))
        if checked.left_out:
            lines.line("left out", _some(checked.left_out))
        lines.line("to", f"{endpoint()}/{repo} · " + ("private" if private else "public"))

    options = ReleaseOptions(repo, licence, base_model, language, private, revision, include, dry_run)
    with bars(shown=not (quiet or as_json)):
        result = release(directory, options, announce=announce)
    if as_json:
        found = {
            "files": [file.name for file in result.files],
            "left_out": list(result.checked.left_out),
            "warnings": list(result.checked.warnings),
            "card": result.card,
            "url": result.url,
        }
        echo(json.dumps(found, ensure_ascii=False))
        return
    if dry_run:
        lines.heading(f"\nREADME.md\n\n{result.card}")
        lines.line("dry run", "nothing was written or uploaded")
    else:
        lines.line("released", str(result.url))


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest + " (--include NAME publishes one)"


release_command = click.Command(
    "release", params=port_release.params, callback=port_release.callback, help=port_release.help
)
