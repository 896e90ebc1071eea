"""SHA-256 of source files, computed beside the conversion in a thread of its own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

# Large: between blocks the thread waits for its turn with the interpreter.
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class FileDigest:
    """A file as it was read: its name, size in bytes, and SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


class BackgroundDigests:
    """Hashes `files` while the block runs; `result()` waits for what is left."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._digests: list[FileDigest] = []
        self._error: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> BackgroundDigests:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def result(self) -> tuple[FileDigest, ...]:
        """The digests, in the files' order. Raises OSError when a file could not be read."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return tuple(self._digests)

    def _run(self) -> None:
        try:
            for path in self.files:
                digest, size = hashlib.sha256(), 0
                with path.open("rb", buffering=0) as file:
                    block = memoryview(bytearray(BLOCK_BYTES))
                    while count := file.readinto(block):
                        if self._stop.is_set():
                            return
                        digest.update(block[:count])
                        size += count
                self._digests.append(FileDigest(path.name, size, digest.hexdigest()))
        except OSError as error:
            self._error = error
