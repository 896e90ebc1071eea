"""The two types that every reader returns and everything else consumes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.checkpoints.dtypes import ElementType, element_type
from weightport.checkpoints.layout import StoredTensor
from weightport.errors import CheckpointError
from weightport.file_state import FileState

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorRef:
    """One tensor of a checkpoint, not yet read.

    `element` is the type of its elements, known without torch; `dtype` is torch's own of it. `read()` touches only the
    tensor's own bytes and returns a tensor of exactly `shape` and `dtype`, in memory of its own; `pieces()` gives the
    same values without holding them all. `storage` identifies the bytes: it is (file, storage in the file, first byte
    in the storage, strides). Two refs of equal `storage`, `shape` and `element` are one tensor stored once; two refs
    that agree in `storage[:2]` share a storage.
    """

    name: str
    shape: tuple[int, ...]
    element: ElementType
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    storage: tuple[Any, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        load: Callable[[], torch.Tensor],
        storage: tuple[Any, ...] = (),
    ) -> TensorRef:
        """A tensor of torch's `dtype`."""
        return cls(name, shape, element_type(dtype), load, storage)

    @property
    def dtype(self) -> torch.dtype:
        return self.element.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values, laid out contiguously."""
        return self.numel * self.element.itemsize

    def read(self) -> torch.Tensor:
        """The tensor, of `shape` and `dtype`. Raises CheckpointError when the file is damaged there or has changed."""
        return self.load()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of axis 0 (a scalar whole), at the cost of their bytes where the layout allows."""
        if isinstance(self.load, StoredTensor) and self.shape:
            return self.load.rows(start, stop)
        whole = self.load()
        return whole[start:stop] if self.shape else whole

    def part(self, place: int) -> TensorRef:
        """Entry `place` of axis 0 as a tensor of its own, for a reader that takes all entries in their order: each
        costs its own bytes then."""
        load = self.load
        if isinstance(load, StoredTensor):
            entry: Callable[[], torch.Tensor] = load.part(place)
        else:

            def entry() -> torch.Tensor:
                return load()[place]

        storage = (*self.storage, place) if self.storage else ()
        return TensorRef(f"{self.name}[{place}]", self.shape[1:], self.element, entry, storage)

    def pieces(self, nbytes: int) -> Iterator[torch.Tensor]:
        """The tensor's values in row-major order: 1-D, at most `nbytes` bytes (but one value at least) at a time."""
        if isinstance(self.load, StoredTensor):
            yield from self.load.pieces(nbytes)
        elif self.numel:
            yield from self.load().reshape(-1).split(max(nbytes // self.element.itemsize, 1))


class NamedTensors(Mapping[str, TensorRef]):
    """Tensors by name, in order: each key is its tensor's own `name`, so that a tensor has one name and no other."""

    def __init__(self, refs: Iterable[TensorRef] = ()) -> None:
        self._refs: dict[str, TensorRef] = {}
        for ref in refs:
            if ref.name in self._refs:
                raise CheckpointError(f"Two tensors are named {ref.name}.")
            self._refs[ref.name] = ref

    def __getitem__(self, name: str) -> TensorRef:
        return self._refs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def renamed(self, new_name: Callable[[str], str]) -> NamedTensors:
        """The same tensors under other names."""
        return NamedTensors(replace(ref, name=new_name(ref.name)) for ref in self.values())

    def without(self, names: Container[str]) -> NamedTensors:
        """All but the tensors of these names."""
        return NamedTensors(ref for ref in self.values() if ref.name not in names)


@dataclass(frozen=True, repr=False)
class Checkpoint(Mapping[str, TensorRef]):
    """An opened checkpoint: tensors by dotted name, and the rest of the file as inert Python data.

    A tensor nested in dictionaries has the names on its way joined with dots: `model` → `encoder.layer_norm.bias` is
    `model.encoder.layer_norm.bias`. In `document` the tensors stand as TensorRef at their places.

    Names are printable: where a file's own name for a tensor holds control characters, their escapes stand there.

    `format` is torch-zip, torch-legacy, torch-sharded, safetensors, safetensors-sharded, npz or zarr-folder. `files`
    are the files that were opened, the index of a sharded checkpoint first, and `states` in which state each was then.
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorRef]
    document: Any = None
    states: Mapping[Path, FileState] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.format}, {len(self.tensors)} tensors)"

    def __getitem__(self, name: str) -> TensorRef:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def folder(self) -> Path:
        """Where companions (config.json, vocabularies) stand: the folder itself, or the file's own."""
        return self.path if self.path.is_dir() else self.path.parent

    def section(self, prefix: str, separator: str = ".") -> NamedTensors:
        """The tensors whose names begin with `prefix` + `separator`, named by the rest, in file order; all tensors
        where `prefix` is empty."""
        start = prefix + separator if prefix else ""
        return NamedTensors(
            replace(ref, name=name.removeprefix(start)) for name, ref in self.tensors.items() if name.startswith(start)
        )
