"""Tensors as torch's pickles describe them: a storage named by the archive, and a layout in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightport.checkpoints.dtypes import ElementType, element_type, is_dtype
from weightport.checkpoints.layout import Layout, Source, StoredTensor
from weightport.checkpoints.pickle.records import Symbol
from weightport.checkpoints.shown import shown
from weightport.checkpoints.types import TensorRef
from weightport.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_UNSUPPORTED = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values (device meta)",
    "_rebuild_wrapper_subclass": "a tensor subclass with its own layout",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device's own format",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device's own format",
    "_rebuild_xla_tensor": "a tensor of another device's own format",
    "_rebuild_mlc_tensor": "a tensor of another device's own format",
}


@dataclass(eq=False)
class Storage:
    """A run of elements that tensors share. `element` is None for an untyped one, whose `count` is in bytes.

    `source` is where the bytes are; in torch's old format it is known only after the pickle was read.
    """

    path: Path
    key: str
    element: ElementType | None
    count: int
    file_size: int
    source: Source | None = None

    @property
    def nbytes(self) -> int:
        return self.count * (self.element.itemsize if self.element else 1)

    def tensor(self, element: ElementType, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> TensorRef:
        """The tensor of this layout (`offset` and `stride` in elements), without a name as yet."""
        layout = Layout(element, shape, stride, offset)
        layout.require_within(self.nbytes, self.file_size)
        first = offset * element.itemsize
        return TensorRef("", shape, element, StoredTensor(layout, self), (str(self.path), self.key, first, stride))

    def in_order(self) -> Source:
        """Itself: tensors share a storage, which is checked whole when one of them is read in part."""
        return self

    def pieces(self, start: int, count: int, dtype: torch.dtype, nbytes: int) -> Iterator[torch.Tensor]:
        """As any `Source` gives its elements."""
        if self.source is None:
            raise CheckpointError(f"{self.path}: the storage {shown(self.key)} was never found in the file.")
        return self.source.pieces(start, count, dtype, nbytes)


@dataclass(frozen=True, eq=False)
class StorageView:
    """Part of a storage, which torch's old format stores under a key of its own. `offset` counts elements."""

    base: Storage
    offset: int
    count: int


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)):
        raise CheckpointError(f"a tensor's shape or strides should be a tuple, but are {shown(values)}.")
    return tuple(values)


def rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any, dtype: Any = None) -> TensorRef:
    """torch._utils._rebuild_tensor and _v2; gradients and hooks are no part of a weight."""
    base, skip, count = storage, 0, None
    if isinstance(storage, StorageView):
        base, skip, count = storage.base, storage.offset, storage.count
    if not isinstance(base, Storage):
        raise CheckpointError(f"a tensor should be made of a storage, but is made of {shown(storage)}.")
    element = element_type(dtype) if is_dtype(dtype) else base.element
    if (dtype and not is_dtype(dtype)) or element is None or type(offset) is not int:
        raise CheckpointError(f"a tensor has dtype {shown(dtype or element)} and offset {shown(offset)}.")
    layout = Layout(element, _whole_numbers(shape), _whole_numbers(stride), offset)
    if count is not None:
        layout.require_within(count * element.itemsize, base.file_size)
    return base.tensor(element, skip + offset, layout.shape, layout.stride)


def rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> TensorRef:
    """torch._utils._rebuild_tensor_v2. `metadata` may say that the values are to be conjugated or negated."""
    return _with_lazy_operations(rebuild_tensor(storage, offset, shape, stride), metadata)


def rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    grad: Any = None,
    hooks: Any = None,
    dtype: Any = None,
    metadata: Any = None,
) -> TensorRef:
    """torch._utils._rebuild_tensor_v3: as v2, of an untyped storage, for the dtypes without a storage class."""
    return _with_lazy_operations(rebuild_tensor(storage, offset, shape, stride, dtype=dtype), metadata)


def _with_lazy_operations(ref: TensorRef, metadata: Any) -> TensorRef:
    if isinstance(metadata, dict) and any(metadata.values()):
        raise CheckpointError(
            f"a tensor is stored with {shown(tuple(metadata))} still to be applied. Load the file with "
            "torch, call resolve_conj().resolve_neg() on its tensors, and save it again."
        )
    return ref


def rebuild_parameter(data: Any, *_: Any) -> Any:
    """torch._utils._rebuild_parameter and _rebuild_parameter_with_state: the parameter is its tensor."""
    if not isinstance(data, TensorRef):
        raise CheckpointError(f"a parameter should hold a tensor, but holds {shown(data)}.")
    return data


def rebuild_from_type(builder: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """torch._tensor._rebuild_from_type and _v2: a tensor with attributes, or of a class of its own."""
    build = TENSOR_BUILDERS.get(builder.type_name) if isinstance(builder, Symbol) else None
    if build is None or not isinstance(args, tuple) or build in (rebuild_from_type,):
        names = [shown(each.type_name if isinstance(each, Symbol) else each) for each in (kind, builder)]
        raise CheckpointError(f"a tensor of type {names[0]} is made by {names[1]}, which is not known.")
    return build(*args)


def _refuse(what: str, name: str) -> Callable[..., Any]:
    def build(*_: Any) -> Any:
        raise CheckpointError(
            f"holds {what} ({name}), which cannot be read as plain values. Load the file where it was made, turn its "
            "tensors into dense floating-point ones on the CPU, and save it again."
        )

    return build


TENSOR_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch.nn.parameter.Parameter": rebuild_parameter,
    "torch.Tensor": _refuse("a tensor that is made of a list", "torch.Tensor"),
    "torch._tensor._rebuild_from_type": rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
    **{f"torch._utils.{name}": _refuse(what, name) for name, what in _UNSUPPORTED.items()},
}
