"""Reference files: what the original implementation took and gave.

One safetensors file. Tensors are named `<run>/in/<argument>` (the original's own argument names) and
`<run>/out/<seam>`; `<run>/out/<seam>@float64` is the same seam of a float64 run, one without the suffix of a float32
run. The metadata key `weightport.reference` holds JSON:

    {"format": 1, "family": "ofa", "source": {"project": …, "commit": …, "torch": …},
     "runs": {"caption": {"kind": "forward",        forward | train | generate
                          "options": {…},           settings that the family's table knows
                          "slices": {"out/logits": [[0, 2], [0, 8], [0, null, 61]]}}}}     see selection.py

A slice of `out/<seam>` holds for `out/<seam>@float64` too, unless that has its own.

Seams, in forward order, wherever a family has such a place: `pixel_values`, `vision`, `projector`,
`encoder.embeddings`, `encoder.layers.N`, `encoder`, `decoder.embeddings`, `decoder.layers.N`, `logits`, `loss`, `nll`
(mean negative log-likelihood), `grad.<parameter name in the original>`, `grad_norm.<parameter>` (its 2-norm),
`grad_norm` (of all parameters that have one), `after.<buffer name in the original>` (its value after the run),
`sequences`, `scores`, `positional_scores`. Derived ones keep a large tensor small: `<seam>.lse` is the log-sum-exp
over the last axis, `<seam>.argmax` its argmax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weightport.checkpoints.types import TensorRef
from weightport.errors import ReferenceFileError
from weightport.parity.selection import WHOLE, Selection, parse_selection, selection_json

METADATA_KEY = "weightport.reference"
FORMAT = 1
FLOAT64_SUFFIX = "@float64"

Kind = Literal["forward", "train", "generate"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What the original gave at one seam: the kept part of the tensor, and the dtype the original ran in."""

    seam: str
    dtype: torch.dtype
    tensor: TensorRef
    selection: Selection = WHOLE


@dataclass(frozen=True)
class Run:
    """One call of the original: its inputs by the original's argument names, its outputs by seam."""

    name: str
    kind: Kind
    inputs: Mapping[str, TensorRef]
    outputs: tuple[Expected, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """An opened reference file; tensors are read on demand."""

    path: Path
    family: str
    source: Mapping[str, Any]
    runs: tuple[Run, ...]


def read_reference(path: Path) -> Reference:
    """Open and validate a reference file. Raises ReferenceFileError saying what is wrong and where."""
    path = Path(path)
    tensors, metadata = _open(path)
    if METADATA_KEY not in metadata:
        raise ReferenceFileError(
            f"{path} is a safetensors file, but no reference: its metadata lacks {METADATA_KEY!r}.\n"
            "  Reference files are written by scripts/reference/ in the original's environment."
        )
    document = _document(path, metadata[METADATA_KEY])
    placed: dict[str, dict[str, dict[str, TensorRef]]] = {run: {"in": {}, "out": {}} for run in document["runs"]}
    for key, ref in tensors.items():
        run, _, rest = key.partition("/")
        side, _, name = rest.partition("/")
        if run not in placed:
            raise ReferenceFileError(f"{path}: the tensor {key!r} belongs to no run; the runs are {_list(placed)}.")
        if side not in ("in", "out") or not name:
            raise ReferenceFileError(
                f"{path}: the tensor {key!r} is neither {run}/in/<argument> nor {run}/out/<seam>."
            )
        placed[run][side][name] = ref
    runs = tuple(_run(path, name, entry, placed[name]) for name, entry in document["runs"].items())
    return Reference(path, document["family"], document["source"], runs)


def write_reference(
    path: Path,
    family: str,
    source: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, torch.Tensor],
    slices: Mapping[str, Selection] | None = None,
) -> Path:
    """Write a reference file.

    `runs` maps each run's name to its `kind` and `options`; `tensors` has the names that stand in the file; `slices`
    maps such names (`<run>/out/<seam>`) to what was kept of them.
    """
    entries: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in runs.items()}
    for key, selection in (slices or {}).items():
        run, _, name = key.partition("/")
        entries[run].setdefault("slices", {})[name] = selection_json(selection)
    document = {"format": FORMAT, "family": family, "source": dict(source), "runs": entries}
    metadata = {METADATA_KEY: json.dumps(document, ensure_ascii=False)}
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        path,
        metadata=metadata,
    )
    return path


def _open(path: Path) -> tuple[dict[str, TensorRef], Mapping[str, str]]:
    """Every tensor, unread, over one open file; and the file's metadata."""
    if not path.is_file():
        raise ReferenceFileError(f"{path} is not a file. Expected a reference file (safetensors).")
    try:
        file = safe_open(path, "pt")
        views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ReferenceFileError(f"{path} is not a readable safetensors file: {error}.") from error
    refs = {}
    for key, view in views.items():
        if view.get_dtype() not in _DTYPES:
            raise ReferenceFileError(f"{path}: {key!r} is {view.get_dtype()}, which no reference holds.")
        refs[key] = TensorRef.of(
            key, tuple(view.get_shape()), _DTYPES[view.get_dtype()], partial(file.get_tensor, key)
        )
    return refs, metadata


def _document(path: Path, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReferenceFileError(f"{path}: the metadata {METADATA_KEY!r} is not JSON: {error}.") from error
    _expect(path, METADATA_KEY, document, dict)
    if document.get("format") != FORMAT:
        raise ReferenceFileError(
            f"{path} has the reference format {document.get('format')!r}; this version reads format {FORMAT}."
        )
    _expect(path, "family", document.get("family"), str)
    document["source"] = _expect(path, "source", document.get("source", {}), dict)
    _expect(path, "runs", document.get("runs"), dict)
    if not document["runs"]:
        raise ReferenceFileError(f"{path} holds no run.")
    return document


def _run(path: Path, name: str, entry: Any, tensors: Mapping[str, Mapping[str, TensorRef]]) -> Run:
    where = f"run {name!r}"
    _expect(path, where, entry, dict)
    kind = entry.get("kind")
    if kind not in get_args(Kind):
        raise ReferenceFileError(f"{path}: {where} has the kind {kind!r}; expected one of {_list(get_args(Kind))}.")
    if not tensors["in"] or not tensors["out"]:
        missing = "input" if not tensors["in"] else "output"
        raise ReferenceFileError(f"{path}: {where} holds no {missing} tensor.")
    options = _expect(path, f"options of {where}", entry.get("options", {}), dict)
    slices = _expect(path, f"slices of {where}", entry.get("slices", {}), dict)
    outputs = tensors["out"]
    unknown = [key for key in slices if key.removeprefix("out/") not in outputs or not key.startswith("out/")]
    if unknown:
        raise ReferenceFileError(f"{path}: {where} has slices of {_list(unknown)}, which it does not hold.")
    expected = []
    for key, ref in outputs.items():
        seam = key.removesuffix(FLOAT64_SUFFIX)
        entry_of = slices.get(f"out/{key}", slices.get(f"out/{seam}"))
        try:
            selection = WHOLE if entry_of is None else parse_selection(entry_of)
        except ValueError as error:
            raise ReferenceFileError(f"{path}: the slice of {ref.name!r} is malformed: {error}.") from error
        if not selection.fits(ref.shape):
            raise ReferenceFileError(
                f"{path}: {ref.name!r} has the shape {list(ref.shape)}, which its slice {json.dumps(entry_of)} "
                "cannot give."
            )
        run_dtype = torch.float64 if key.endswith(FLOAT64_SUFFIX) else torch.float32
        expected.append(Expected(seam, run_dtype, ref, selection))
    return Run(name, kind, tensors["in"], tuple(expected), options)


def _expect(path: Path, what: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ReferenceFileError(f"{path}: {what} should be a JSON {kind.__name__}, found {type(value).__name__}.")
    return value


def _list(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
