"""Faults within libraries written in Rust (tokenizers, safetensors), as errors that can be handled.

They are raised as `pyo3_runtime.PanicException`, which is no Exception and cannot be imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """While the block runs, a library's panic is a ValueError of the same text."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise ValueError(f"the library that reads it failed ({error})") from error
        raise
