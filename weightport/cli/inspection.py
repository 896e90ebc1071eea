"""`weightport inspect`: what a checkpoint holds, without reading its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightport.cli.display import Lines, echo
from weightport.cli.paths import ExistingPath
from weightport.cli.running import command_body, json_option, uncollected
from weightport.formatting import count, size

if TYPE_CHECKING:
    from weightport.checkpoints import Checkpoint, TensorRef


@click.command("inspect")
@click.argument("source", type=ExistingPath())
@click.option("--tensors", is_flag=True, help="List every tensor with its shape and type.")
@json_option
@command_body
def inspect_command(source: Path, tensors: bool, as_json: bool) -> None:
    """Show what the checkpoint SOURCE holds: family, size, types, and what else is in it.

    No weight is read, and nothing in the file is executed.
    """
    # A header of many tensors makes many small objects, none of which is garbage.
    with uncollected():
        from weightport.checkpoints import open_checkpoint
        from weightport.families.registry import registry

        checkpoint = open_checkpoint(source)
    family = registry().recognised(checkpoint)
    found = describe(checkpoint, family.name if family else None, registry().looks_like(checkpoint), tensors=tensors)
    if family is not None and (about := family.about(checkpoint)):
        found["about"] = list(about)
    found |= _directory(source)
    if as_json:
        echo(json.dumps(found, ensure_ascii=False))
        return
    _show(found)


def _directory(source: Path) -> dict[str, Any]:
    """Of a model directory: what is known of the versions that made it, and what changed since weightport wrote it,
    by size and time. No file's bytes are read but those of configurations."""
    from weightport.integrity.notices import noticed

    return {key: list(texts) for key, texts in noticed(source).items() if texts} if source.is_dir() else {}


def describe(checkpoint: Checkpoint, family: str | None, kind: str | None, *, tensors: bool) -> dict[str, Any]:
    """The inspection as plain data."""
    from weightport.checkpoints import plain, sections

    found: dict[str, Any] = {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": family,
        "looks_like": kind,
        "file_bytes": sum(path.stat().st_size for path in checkpoint.files),
        "sections": {
            section.name or "(tensors)": {
                "tensors": section.tensors,
                "values": section.values,
                "bytes": section.nbytes,
                "dtypes": dict(section.dtypes),
            }
            for section in sections(checkpoint)
        },
        "document": plain(checkpoint.document),
    }
    if tensors:
        found["tensors"] = {name: _tensor(ref) for name, ref in checkpoint.items()}
    return found


def _tensor(ref: TensorRef) -> dict[str, Any]:
    return {"shape": list(ref.shape), "dtype": ref.element.name}


def _show(found: Mapping[str, Any]) -> None:
    lines = Lines(quiet=False)
    lines.heading(f"{found['path']} · {found['format']} · {size(found['file_bytes'])}")
    lines.line("family", found["looks_like"] or "not one that weightport knows")
    for text in found.get("about", ()):
        lines.line("about", text)
    for key in ("warning", "changed"):
        for text in found.get(key, ()):
            lines.line(key, text)
    for name, section in found["sections"].items():
        dtypes = ", ".join(f"{dtype} × {number}" for dtype, number in section["dtypes"].items())
        lines.line(
            "holds",
            f"{name}: {section['tensors']} tensors · {count(section['values'])} values · "
            f"{size(section['bytes'])} · {dtypes}",
        )
    for text in _document_lines(found["document"], set(found["sections"])):
        lines.line("document", text)
    for name, tensor in found.get("tensors", {}).items():
        echo(f"{name}  {tensor['shape']}  {tensor['dtype']}")


def _document_lines(document: Any, sections: set[str]) -> list[str]:
    """One short line a top-level entry of the rest of the file, those that only hold tensors left out."""
    if not isinstance(document, Mapping):
        return []
    shown = []
    for key, value in document.items():
        if key in sections or value is None or (isinstance(value, Mapping) and not value):
            continue
        text = re.sub(r"\s+", " ", json.dumps(value, ensure_ascii=False))
        shown.append(f"{key}: {text if len(text) <= 100 else text[:97] + '…'}")
    return shown
