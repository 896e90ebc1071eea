"""Which pictures are decoded, and what a damaged one raises."""

from __future__ import annotations

import struct
from functools import cache

from PIL import Image

BROKEN_PICTURE = (
    OSError, ValueError, SyntaxError, TypeError, EOFError, LookupError, ArithmeticError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise for damaged files, and for those that would fill the memory."""


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's formats but EPS: it is a program, which Pillow hands to Ghostscript to run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")
