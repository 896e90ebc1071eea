"""`weightport generate`: try a converted model on an image."""

from __future__ import annotations

import json
from pathlib import Path

import click

from weightport.cli.display import echo
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option


@click.command("generate")
@click.argument("directory", type=ExistingPath())
@click.argument("image", required=False, type=ExistingPath())
@click.option("--prompt", help="What to ask. By default the model's own captioning prompt.")
@click.option("--task", default="caption", show_default=True, help="Prompt by task name, when --prompt is not given.")
@click.option("--beams", type=click.IntRange(min=1), help="Beams; by default what the model's generation_config says.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer in tokens.")
@click.option("--device", default="cpu", show_default=True, help="Where to run the model.")
@json_option
@command_body
def generate_command(
    directory: Path,
    image: Path | None,
    prompt: str | None,
    task: str,
    beams: int | None,
    max_new_tokens: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Print what the converted model in DIRECTORY says about IMAGE (or about the prompt alone)."""
    from weightport.api import generate

    answer = generate(
        directory, image, prompt=prompt, task=task, beams=beams, max_new_tokens=max_new_tokens, device=device
    )
    echo(json.dumps(answer.__dict__, ensure_ascii=False) if as_json else answer.text)
