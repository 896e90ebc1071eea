"""JSON that was written by somebody else: what no JSON of a checkpoint needs is refused before it costs memory."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from weightport.checkpoints.shown import shown

# A safetensors header has three a tensor.
_MAX_CONTAINERS = 4_000_000


def parse_json(raw: bytes, *, refuse_duplicates: bool = False) -> Any:
    """The value of the JSON text `raw`.

    Raises ValueError for what is no JSON in UTF-8, nests too deep or holds over 4,000,000 lists and objects, for text
    that is not Unicode (JSON can spell half a surrogate pair, which nothing can print or write again), and with
    `refuse_duplicates` for an object that has one key twice.
    """
    if raw.count(b"[") + raw.count(b"{") > _MAX_CONTAINERS:
        raise ValueError(f"it holds more than {_MAX_CONTAINERS:,} lists and objects")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates if refuse_duplicates else None)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("it nests too deep") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {shown(error.object[error.start : error.end])}, which is not Unicode") from error
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"{shown(repeated)} stands twice")
    return found
