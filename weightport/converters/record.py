"""conversion.json: what was read, what was done to it, and what it takes to go back."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.checkpoints.sources import MAIN, Sources
from weightport.converters.family import SourceModel
from weightport.converters.plan import Plan
from weightport.errors import CheckpointError
from weightport.hashing import FileDigest
from weightport.version import __version__
from weightport.writing import own_file
from weightport.writing.safetensors_shards import WrittenFile

if TYPE_CHECKING:
    import torch

    from weightport.tokenizers.provenance import Provenance

FILE = "conversion.json"
FORMAT = 2
CHANGED = "changed"


def conversion_record(
    sources: Sources,
    model: SourceModel,
    plan: Plan,
    files: Sequence[WrittenFile],
    digests: Sequence[FileDigest],
    vocabulary: Provenance | None = None,
) -> dict[str, Any]:
    """The record of one conversion, as plain data. `digests` are of the sources' files, in their order."""
    digest_of = dict(zip(sources.files, digests, strict=True))
    return {
        "format": FORMAT,
        "family": model.family,
        "layout": model.layout,
        "title": model.title,
        "sources": {
            name: {
                "name": checkpoint.path.name,
                "format": checkpoint.format,
                "section": model.sections.get(name, ""),
                "files": [
                    {**asdict(digest_of[file]), "name": _name_in(checkpoint.path, file)}
                    for file in dict.fromkeys(checkpoint.files)
                ],
                "tensors": {tensor: _name(ref.dtype) for tensor, ref in model.tensors_of(name).items()},
            }
            for name, checkpoint in sources.checkpoints.items()
        },
        "options": dict(model.options),
        "vocabulary": asdict(vocabulary) if vocabulary is not None else None,
        "dtype": _name(plan.dtype),
        "parameters": plan.parameters,
        "files": [asdict(file) for file in files],
        "steps": [
            {
                "operation": step.operation,
                "from": [ref.name for ref in step.sources],
                **({"tied": [ref.name for ref in step.aliases]} if step.aliases else {}),
                "to": [target.name for target in step.targets],
            }
            for step in plan.steps
        ],
        "dropped": [
            {
                "name": item.ref.name,
                "shape": list(item.ref.shape),
                "dtype": _name(item.ref.dtype),
                "because": item.because,
            }
            for item in plan.dropped
        ],
        "unused": dict(model.unused),
        "notes": list(model.notes),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "weightport": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "tokenizers", "numpy")},
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `record` into `folder`."""
    (folder / FILE).write_text(_text(record), encoding="utf-8")


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def note_changes(folder: Path, names: Iterable[str]) -> None:
    """Note in a directory's record which of its tensors are no longer those that the conversion wrote, beside those
    noted before: an export of one source takes them along, whichever source gave them. Nothing where there is no
    record, or one source."""
    record = read_record(folder)
    if record is None or len(record["sources"]) < 2:
        return
    record[CHANGED] = sorted({*record.get(CHANGED, ()), *names})
    with own_file(folder / FILE) as path:
        path.write_text(_text(record), encoding="utf-8")


def link_parity(folder: Path, passed: bool, verdict: str, files: Mapping[str, Path]) -> None:
    """Note in a directory's record what a parity check found, and where its reports stand; nothing without either."""
    record = read_record(folder)
    if record is None or not files:
        return
    links = {kind: os.path.relpath(file, folder) for kind, file in files.items()}
    record["parity"] = {"passed": passed, "verdict": verdict, **links}
    with own_file(folder / FILE) as path:
        path.write_text(_text(record), encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a converted directory, or None when it has none (re-saved by a trainer, say).

    A record of format 1 is returned as format 2. Raises CheckpointError when it is of a newer format or not a record
    at all.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if isinstance(record, dict) and record.get("format") == FORMAT and isinstance(record.get("sources"), dict):
        return record
    if isinstance(record, dict) and record.get("format") == 1 and isinstance(record.get("source"), dict):
        return _from_format_1(record)
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    raise CheckpointError(
        f"{path} is not laid out as weightport writes it: its format is {found!r}, and 1 and {FORMAT} are read."
    )


def _from_format_1(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of one source, whose dropped tensors and steps had the file's names, section and all."""
    source = record["source"]
    options = dict(source.get("options", {}))
    tensors = record.get("source_tensors", {})
    section = str(options.get("section") or options.get("prefix") or "")

    def own(name: str) -> str:
        shorter = name.removeprefix(f"{section}.") if section else name
        return shorter if shorter in tensors else name

    kept = {key: value for key, value in record.items() if key not in ("source", "source_tensors")}
    return {
        **kept,
        "format": FORMAT,
        "sources": {
            MAIN: {
                **{key: source.get(key) for key in ("name", "format")},
                "section": section,
                "files": source.get("files", []),
                "tensors": tensors,
            }
        },
        "options": options,
        "steps": [
            {key: list(map(own, value)) if key in ("from", "tied") else value for key, value in step.items()}
            for step in record.get("steps", ())
        ],
        "dropped": [{**item, "name": own(item["name"])} for item in record.get("dropped", ())],
        "unused": {},
    }


def _name_in(source: Path, file: Path) -> str:
    """A file's name; its path below a source that is a folder of folders."""
    return file.relative_to(source).as_posix() if source in file.parents else file.name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
