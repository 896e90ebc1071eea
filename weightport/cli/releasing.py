"""`port-release`: a model directory, checked and described, to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightport.cli.display import Lines, echo
from weightport.cli.running import command_body, json_option, quiet_option
from weightport.formatting import count, size

if TYPE_CHECKING:
    from weightport.release import CheckedDirectory


@click.command("port-release", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--repo", required=True, metavar="ORG/NAME", help="Repository on the Hub; made when there is none.")
@click.option("--licence", "--license", "licence", help="As the Hub names it; by default the family's own.")
@click.option("--base-model", metavar="ORG/NAME", help="The model on the Hub that this one was made from.")
@click.option("--language", multiple=True, help="Language code, zh or en. Repeatable.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", help="Branch to upload to; made when there is none.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card; change nothing and use no network.")
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
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check the model DIRECTORY, write its model card from what its records say, and upload it."""
    from weightport.release import ReleaseOptions, release

    lines = Lines(quiet=quiet or as_json)

    def announce(checked: CheckedDirectory) -> None:
        dtype = str(checked.dtype).removeprefix("torch.")
        lines.heading(f"{directory} · {count(checked.parameters)} parameters · {dtype} · {size(checked.nbytes)}")
        lines.line("checked", "config, tensors on the meta device, tokenizer, index, hashes")
        if checked.needs_code:
            lines.line("code", "transformers has no class for this family: its modeling code goes along")

    options = ReleaseOptions(repo, licence, base_model, language, private, revision, dry_run)
    result = release(directory, options, announce=announce)
    if as_json:
        echo(json.dumps({"files": list(result.files), "card": result.card, "url": result.url}, ensure_ascii=False))
        return
    for name in result.files:
        path = directory / name
        lines.line("file", f"{name} · {size(path.stat().st_size)}" if path.is_file() and name != "README.md" else name)
    if dry_run:
        lines.heading(f"\nREADME.md\n\n{result.card}")
        lines.line("dry run", "nothing was written or uploaded")
    else:
        lines.line("released", str(result.url))


release_command = click.Command(
    "release", params=port_release.params, callback=port_release.callback, help=port_release.help
)
