"""The files of a model directory beside its weights, and what a merge makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightport.checkpoints.formats.sharded import read_json
from weightport.errors import AdapterError

RECORD = "merge.json"

_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"}
)  # fmt: skip
# What describes the base as it was and would be wrong of the merged model.
_STALE = frozenset({"README.md", "parity.json", "parity.html", "metrics.json", "training_args.json"})

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip

_PROCESSOR = ("processor_config.json", "preprocessor_config.json")


def companions(base: Path) -> tuple[Path, ...]:
    """The base's files that the merged directory keeps: configuration, tokenizer, processor, code, licence,
    records."""
    return tuple(
        path
        for path in sorted(base.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in _WEIGHTS
        and not path.name.endswith(".index.json")
        and path.name not in _STALE
        and path.name != RECORD
    )


def adapter_tokenizer(adapter: Path) -> dict[str, Path]:
    """The tokenizer saved beside an adapter, by file name; empty when there is none."""
    if not (adapter / "tokenizer_config.json").is_file():
        return {}
    return {name: adapter / name for name in _TOKENIZER if (adapter / name).is_file()}


def adapter_processor(adapters: Sequence[Path]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """(the processor's files that the adapters were trained with, notes): the base's stay where the adapters have
    none, or differ."""
    found = [{name: folder / name for name in _PROCESSOR if (folder / name).is_file()} for folder in adapters]
    given = [files for files in found if files]
    contents = {tuple((name, path.read_bytes()) for name, path in files.items()) for files in given}
    if len(contents) > 1:
        note = "the adapters were trained with different image processors: the base's is kept"
        return {}, (note,)
    return (given[0] if given else {}), ()


def adapter_records(adapters: Sequence[tuple[Path, float]]) -> dict[str, Path]:
    """How an adapter was trained and what was measured: true of the merged model where one adapter went in whole."""
    if len(adapters) != 1 or adapters[0][1] != 1.0:
        return {}
    folder = adapters[0][0]
    return {name: folder / name for name in ("training.json", "metrics.json") if (folder / name).is_file()}


def require_tokenizer_fits(files: Mapping[str, Path], rows: int, adapter: Path) -> None:
    """Raises AdapterError when the adapter's tokenizer gives ids that the merged embedding of `rows` rows lacks."""
    if "tokenizer.json" not in files:
        return
    content = read_json(files["tokenizer.json"])
    model = content.get("model", {}) if isinstance(content, dict) else {}
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = [token["id"] for token in content.get("added_tokens", ())]
    known = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary or ())))
    highest = max([*known, *added], default=-1)
    if highest >= rows:
        raise AdapterError(
            f"{adapter} brings a tokenizer with ids up to {highest}, but the merged embedding has {rows} rows. The "
            "resized embedding was not saved with the adapter: save it again with save_embedding_layers=True, or "
            "train with modules_to_save=['embed_tokens', 'lm_head']."
        )


def write_companions(
    folder: Path,
    base: Path,
    tokenizer: Mapping[str, Path],
    others: Mapping[str, Path],
    config: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> None:
    """Copy what is kept into `folder`; `tokenizer` files take the place of all of the base's, each of `others` that of
    its namesake, `changes` go into config.json."""
    kept = companions(base)
    if tokenizer:
        kept = tuple(path for path in kept if path.name not in _TOKENIZER)
    for path in (*kept, *tokenizer.values(), *others.values()):
        shutil.copyfile(path, folder / path.name)
    if changes:
        text = json.dumps({**config, **changes}, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def resized_vocabulary(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """The changes to config.json for an embedding that grew from `old` to `new` rows, at every level that says
    `old`."""
    changes: dict[str, Any] = {"vocab_size": new} if config.get("vocab_size") == old else {}
    for name in ("text_config", "decoder", "llm_config", "language_config"):
        inner = config.get(name)
        if isinstance(inner, Mapping) and inner.get("vocab_size") == old:
            changes[name] = {**inner, "vocab_size": new}
    return changes


def changed_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The changes to config.json for weights in the dtype `name`, at every level that states one."""
    changes: dict[str, Any] = {}
    for key in ("dtype", "torch_dtype"):
        if key in config:
            changes[key] = name
    if not changes:
        changes["dtype"] = name
    for key, inner in config.items():
        if isinstance(inner, Mapping) and (stated := [k for k in ("dtype", "torch_dtype") if inner.get(k)]):
            changes[key] = {**inner, **dict.fromkeys(stated, name)}
    return changes


def names_of(files: Sequence[Path]) -> list[str]:
    """File names, sorted."""
    return sorted(path.name for path in files)
