"""The files of a model directory beside its weights, and what a merge makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightport.checkpoints.formats.sharded import read_json
from weightport.errors import AdapterError
from weightport.local_paths import target_outside

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

_PLACES = ("image_token_id", "image_token_index")

_PROCESSOR = ("processor_config.json", "preprocessor_config.json")


def companions(base: Path) -> tuple[Path, ...]:
    """The base's files that the merged directory keeps: configuration, tokenizer, processor, code, licence,
    records. Raises AdapterError for a link out of the folder."""
    found = tuple(
        path
        for path in sorted(base.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in _WEIGHTS
        and not path.name.endswith(".index.json")
        and path.name not in _STALE
        and path.name != RECORD
    )
    _require_own(found, base)
    return found


def _require_own(files: Iterable[Path], folder: Path) -> None:
    """Raises AdapterError for a link that leads out of the folder: what it names would be copied, and published."""
    for path in files:
        target = target_outside(path, folder)
        if target is not None:
            raise AdapterError(
                f"{path} is a link out of its folder, to {target}: it is not copied. Put the file itself there if it "
                "belongs to the model, or remove the link."
            )


def adapter_tokenizer(adapter: Path) -> dict[str, Path]:
    """The tokenizer saved beside an adapter, by file name; empty when there is none."""
    if not (adapter / "tokenizer_config.json").is_file():
        return {}
    return _present(adapter, _TOKENIZER)


def adapter_processor(adapters: Sequence[Path]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """(the processor's files that the adapters were trained with, notes): the base's stay where the adapters have
    none, or differ."""
    found = [_present(folder, _PROCESSOR) for folder in adapters]
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
    return _present(folder, ("training.json", "metrics.json"))


def _present(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    found = {name: folder / name for name in names if (folder / name).is_file()}
    _require_own(found.values(), folder)
    return found


def require_tokenizer_fits(
    files: Mapping[str, Path], rows: int, adapter: Path, config: Mapping[str, Any] | None = None
) -> None:
    """Raises AdapterError when the adapter's tokenizer gives ids that the merged embedding of `rows` rows lacks. Ids
    that the base's `config` reserves for places of images need none: what stands there is never looked up."""
    if "tokenizer.json" not in files:
        return
    reserved = {value for name, value in (config or {}).items() if name in _PLACES}
    highest = max((each for each in _ids(read_json(files["tokenizer.json"])) if each not in reserved), default=-1)
    if highest >= rows:
        raise AdapterError(
            f"{adapter} brings a tokenizer with ids up to {highest}, but the merged embedding has {rows} rows. The "
            "resized embedding was not saved with the adapter: save it again with save_embedding_layers=True, or "
            "train with modules_to_save=['embed_tokens', 'lm_head']."
        )


def _ids(content: Any) -> Iterator[int]:
    """Every id that a tokenizer.json gives; nothing of what is not laid out as tokenizers does it."""
    content = content if isinstance(content, dict) else {}
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from (value for value in vocabulary.values() if type(value) is int)
    elif isinstance(vocabulary, list):
        yield len(vocabulary) - 1
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield token["id"]


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
