"""A file that is read piece by piece, and must stay as it was when it was opened."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

from weightport.errors import CheckpointError
from weightport.file_state import FileState


def require_file(path: Path) -> None:
    """Raises CheckpointError unless `path` is a regular file (or a link to one) with something in it."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise CheckpointError(
                f"{path}: is a link to {os.readlink(path)}, which does not exist. Download the file it stands for."
            ) from error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"{path}: expected a checkpoint, found nothing that can be opened ({reason})."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a file, found a folder, pipe or device.")
    if status.st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes). The download or copy did not finish; fetch it again.")


class SourceFile:
    """One open file. Nothing is read until it is asked for, and nothing is mapped.

    A map would save a copy, but a page of it that the file has lost kills the process (SIGBUS), and no check
    beforehand can exclude that. Every reading compares the file's state with that at its opening, so that bytes of
    two versions of a file are never taken for one.
    """

    def __init__(self, path: Path) -> None:
        require_file(path)
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            self.state = FileState.of(self._descriptor)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error

    @property
    def size(self) -> int:
        return self.state.size

    def require(self, offset: int, length: int, what: str) -> None:
        """Raises CheckpointError unless the file holds `length` bytes at `offset`."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.path}: {what} should be {length} bytes at byte {offset}, but the file has {self.size}. "
                "It is truncated or damaged; fetch it again."
            )

    def read(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes at `offset`; `what` they are is for the error message."""
        self.require(offset, length, what)
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset, what)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int, what: str) -> None:
        """Fills `buffer` (of bytes) with what stands at `offset`."""
        self.require(offset, len(buffer), what)
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                if not count:
                    break
                done += count
            now = FileState.of(self._descriptor)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {what} at byte {offset + done} cannot be read ({error.strerror})."
            ) from error
        self.state.require_same(now, self.path)
        if done < len(buffer):
            raise CheckpointError(f"{self.path}: ended at byte {offset + done}, inside {what}. Fetch it again.")

    def find_last(self, needle: bytes, start: int, stop: int) -> int:
        """Position of the last `needle` that lies within [start, stop), or -1."""
        start = max(start, 0)
        found = self.read(start, stop - start, "its end").rfind(needle)
        return found if found < 0 else start + found
