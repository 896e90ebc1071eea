"""SHA-256 of source files, computed beside the conversion in a thread of its own."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

# Large: between blocks the thread waits for its turn with the interpreter.
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class FileDigest:
    """A file as it was read: its name, size in bytes, and SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


def likely_weights(folder: Path) -> tuple[Path, ...]:
    """The files that opening the model directory `folder` will name, where it is laid out as save_pretrained does it;
    none where only a look into its files can tell."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return (index, *sorted(folder.glob("model-*-of-*.safetensors")))
    single = folder / "model.safetensors"
    return (single,) if single.is_file() else ()


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
                found = self._digest(path)
                if found is None:
                    return
                self._digests.append(found)
        except OSError as error:
            self._error = error

    def _digest(self, path: Path) -> FileDigest | None:
        """The digest of one file, from its pages in the system's cache (no copy is made); None when told to stop."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size:
                with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
                    for start in range(0, size, BLOCK_BYTES):
                        if self._stop.is_set():
                            return None
                        # Touching a page that the file has lost since would kill the process, so ask first.
                        if mapped.size() < size:
                            raise OSError(f"{path} has shrunk from {size} to {mapped.size()} bytes while it was read")
                        digest.update(content[start : start + BLOCK_BYTES])
        return FileDigest(path.name, size, digest.hexdigest())
