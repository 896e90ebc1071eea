"""transformers without what a command that runs no model never calls: torch's compiler and its distributed tensors.

They are half of what importing transformers' model classes costs. transformers does without distributed tensors by
itself where torch was built without them, and asks the compiler at import for marks on functions only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


@contextmanager
def without_compiler() -> Iterator[None]:
    """Lets modules that are imported in the block mark functions for a compiler that is not loaded, and leave out
    what needs torch.distributed. Nothing happens where transformers' model classes or the compiler are there already.

    For processes that import, convert and end: what was imported so stays without both.
    """
    import torch

    if "torch._dynamo" in sys.modules or "transformers.modeling_utils" in sys.modules:
        yield
        return
    # Modules below it that need no compiler are the real ones.
    marks = _Marks("torch._dynamo", [str(Path(torch.__file__).parent / "_dynamo")])
    is_available = torch.distributed.is_available
    sys.modules[marks.__name__] = marks
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
        del sys.modules[marks.__name__]


class _Marks(ModuleType):
    """A module of which every attribute is a decorator that changes nothing, with or without arguments."""

    def __init__(self, name: str, path: list[str]) -> None:
        super().__init__(name)
        self.__path__ = path

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


def _unchanged(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    return function if function is not None else lambda marked: marked
