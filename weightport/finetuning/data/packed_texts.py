"""Many texts in two arrays: a few bytes each beside their letters, and shared by forked workers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class PackedTexts:
    """Texts by their number. content: uint8, all texts in UTF-8; ends: int64 [texts]."""

    def __init__(self, texts: Iterable[str]) -> None:
        content, ends = bytearray(), []
        for text in texts:
            content += text.encode()
            ends.append(len(content))
        self.content = np.frombuffer(bytes(content), dtype=np.uint8)
        self.ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return self.content[start : int(self.ends[number])].tobytes().decode()
