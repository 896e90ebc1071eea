"""SHA-256 of source files, computed beside the conversion in a thread of its own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from weightport.errors import CheckpointError
from weightport.file_state import FileState, require_unchanged

# Not smaller: between blocks the thread waits for its turn with the interpreter. Not larger: a block is to be hashed
# while it is in the processor's cache.
BLOCK_BYTES = 4 << 20


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
        self._states: dict[Path, FileState] = {}
        self._error: CheckpointError | None = None
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

    def result(self, opened: Mapping[Path, FileState] | None = None) -> tuple[FileDigest, ...]:
        """The digests, in the files' order.

        `opened` are the states in which the files were opened by whoever used their bytes: what was hashed is then
        what was used. Raises CheckpointError when a file could not be read, or was not the same from its opening until
        now.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        for path, state in (opened or {}).items():
            if path in self._states:
                state.require_same(self._states[path], path)
        require_unchanged({**self._states, **(opened or {})})
        return tuple(self._digests)

    def _run(self) -> None:
        for path in self.files:
            try:
                found = self._digest(path)
            except OSError as error:
                self._error = CheckpointError(f"{path}: cannot be read ({error.strerror or error}).")
                return
            except CheckpointError as error:
                self._error = error
                return
            if found is None:
                return
            self._digests.append(found)

    def _digest(self, path: Path) -> FileDigest | None:
        """The digest of one file; None when told to stop. Read, not mapped: a file that shrinks is then an error."""
        digest = hashlib.sha256()
        block = memoryview(bytearray(BLOCK_BYTES))
        size = 0
        with path.open("rb", buffering=0) as file:
            state = self._states[path] = FileState.of(file.fileno())
            while count := file.readinto(block):
                if self._stop.is_set():
                    return None
                digest.update(block[:count])
                size += count
            state.require_same(FileState.of(file.fileno()), path)
        return FileDigest(path.name, size, digest.hexdigest())
