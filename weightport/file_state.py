"""Whether a file is still the one that was opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from weightport.errors import CheckpointError


@dataclass(frozen=True)
class FileState:
    """What changes when somebody writes to a file, or puts another one in its place. Times are in nanoseconds.

    `changed` is the inode's own time, which a copying tool that restores `modified` cannot set back.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: Path | int) -> FileState:
        """The state of the file at a path, or behind an open descriptor. Raises OSError."""
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def require_same(self, now: FileState, path: Path) -> None:
        """Raises CheckpointError where `now` is another state of the file at `path` than this one."""
        if now != self:
            raise CheckpointError(
                f"{path}: changed while it was read: {self._difference(now)}. Something is still writing to it; try "
                "again when that is done."
            )

    def _difference(self, now: FileState) -> str:
        if (self.device, self.inode) != (now.device, now.inode):
            return "another file has taken its place"
        if self.size != now.size:
            return f"it has {'shrunk' if now.size < self.size else 'grown'} from {self.size} to {now.size} bytes"
        return "it was written to" if self.modified != now.modified else "its entry in the file system is another one"


def require_unchanged(states: dict[Path, FileState]) -> None:
    """Raises CheckpointError unless the file at every path is still in its state."""
    for path, state in states.items():
        try:
            now = FileState.of(path)
        except OSError as error:
            raise CheckpointError(f"{path}: went away while it was read ({error.strerror}).") from error
        state.require_same(now, path)
