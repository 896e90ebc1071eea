"""Which files of a folder belong to a model: a list of names. Whatever else lies there is not published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightport.converters.side_file import SIDE_FILE
from weightport.errors import CheckpointError, UsageError
from weightport.integrity.recorded_hashes import SUMS
from weightport.local_paths import target_outside

CONFIGURATION = frozenset({
    "config.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
})  # fmt: skip
TOKENIZER = frozenset({
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "source.spm",
    "target.spm", "sentencepiece.bpe.model", "chat_template.jinja",
})  # fmt: skip
RECORDS = ("conversion.json", "merge.json", "parity.json", "metrics.json", "training.json")
REPORTS = frozenset({"parity.html", "report.html"})
_TERMS = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY)(\.txt|\.md)?", re.IGNORECASE)
_TEMPLATES = "additional_chat_templates"

_CODE_OF = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_REFERENCE = re.compile(r"(\w+)\.\w+")
_RELATIVE = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)


def belonging(folder: Path, weights: Sequence[Path], include: Sequence[str] = ()) -> dict[str, Path]:
    """The model's files by the name they get on the Hub, in the order of the names; README.md is written anew.

    `include` are names of further files, given by the user. Raises UsageError for one that is not there,
    CheckpointError for a link that leads out of the folder.
    """
    named = {
        *CONFIGURATION,
        *TOKENIZER,
        *RECORDS,
        *REPORTS,
        SIDE_FILE,
        *(path.name for path in weights),
        *_code(folder),
    }
    found = {
        path.name: path
        for path in folder.iterdir()
        if path.is_file() and (path.name in named or _TERMS.fullmatch(path.name))
    }
    if (folder / _TEMPLATES).is_dir():
        found |= {f"{_TEMPLATES}/{path.name}": path for path in (folder / _TEMPLATES).glob("*.jinja")}
    for name in include:
        found[_plain(folder, name)] = folder / name
    for name, path in found.items():
        target = target_outside(path, folder)
        if target is not None:
            raise CheckpointError(
                f"{folder / name} is a link out of the folder, to {target}: it is not published. Put the file itself "
                "there if it belongs to the model, or remove the link."
            )
    return dict(sorted(found.items()))


def left_out(folder: Path, published: Mapping[str, Path]) -> tuple[str, ...]:
    """What lies in the folder and is not published; folders end with a slash."""
    inside = {name.partition("/")[0] for name in published} | {"README.md", SUMS}
    return tuple(
        f"{path.name}/" if path.is_dir() else path.name for path in sorted(folder.iterdir()) if path.name not in inside
    )


def _plain(folder: Path, name: str) -> str:
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise UsageError(f"--include {name}: expected the name of a file in {folder}, without a folder.")
    if not path.is_file():
        raise UsageError(f"--include {name}: there is no such file in {folder}.")
    return name


def _code(folder: Path) -> set[str]:
    """The Python files that the configurations name for trust_remote_code, with what those import from one another.
    They are read as text."""
    waiting = sorted({module for name in _CODE_OF for module in _modules(folder / name)})
    found: set[str] = set()
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found and (folder / name).is_file():
            found.add(name)
            waiting += _RELATIVE.findall((folder / name).read_text(encoding="utf-8", errors="replace"))
    return found


def _modules(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    for references in _auto_maps(content):
        for reference in references if isinstance(references, list) else [references]:
            if isinstance(reference, str) and (match := _REFERENCE.fullmatch(reference)):
                yield match[1]


def _auto_maps(content: Any) -> Iterator[Any]:
    """Every value of an auto_map, of the object itself or of one inside it."""
    if isinstance(content, dict):
        for part in (content, *(value for value in content.values() if isinstance(value, dict))):
            if isinstance(part.get("auto_map"), dict):
                yield from part["auto_map"].values()
