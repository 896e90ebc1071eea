"""A large file written front to back: one thread fills blocks, others hash them, look at them and write them.

Where the file system allows it, blocks go to the disk past the page cache (O_DIRECT). The file must be on the disk
before it takes its name, so the cache would only add a copy of every byte, and push out the source that is being read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from weightport.writing.written_hashes import remember

BLOCK_BYTES = 8 << 20
BLOCKS = 12
"""Blocks on their way at a time: the memory that a file takes while it is written is at most BLOCKS · BLOCK_BYTES."""

# What every file system with O_DIRECT accepts as the alignment of addresses, sizes and offsets.
_ALIGNMENT = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)

_Queue = queue.Queue[tuple[mmap.mmap, int] | None]
"""Blocks on their way from one thread to the next, with the bytes used of each; None after the last."""


class HashedFile:
    """A context manager: `write` copies bytes, so the caller's buffer is free again when it returns.

    `watch` is called with the file's bytes, run after run, in a thread of its own, before they are written. `write`
    and the end of the block raise OSError when the disk does (ENOSPC …), and what `watch` raises, perhaps a few blocks
    later. `size` is what was given to `write`; `sha256` is complete once the file is closed.
    """

    def __init__(self, path: Path, watch: Callable[[memoryview], None] | None = None) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._digest = hashlib.sha256()
        self._error: Exception | None = None
        self._blocks: list[mmap.mmap] = []
        self._free: queue.Queue[mmap.mmap] = queue.Queue()
        self._filled = _Queue()
        self._block: mmap.mmap | None = None
        self._used = 0
        stages = [self._digest.update, *([watch] if watch is not None else []), self._write_block]
        queues = [self._filled, *(_Queue() for _ in stages[1:]), None]
        self._threads = [
            threading.Thread(target=self._run, args=stage, daemon=True) for stage in zip(stages, queues, queues[1:])
        ]
        for thread in self._threads:
            thread.start()
        self.size = 0

    def write(self, data: memoryview | bytes) -> None:
        source = np.frombuffer(data, dtype=np.uint8) if len(data) else np.empty(0, dtype=np.uint8)
        start = 0
        while start < len(source):
            if self._error is not None:
                raise self._error
            if self._block is None:
                self._block, self._used = self._empty_block(), 0
            count = min(BLOCK_BYTES - self._used, len(source) - start)
            target = np.frombuffer(self._block, dtype=np.uint8, count=count, offset=self._used)
            # Other threads run while numpy copies.
            np.copyto(target, source[start : start + count])
            self._used += count
            start += count
            if self._used == BLOCK_BYTES:
                self._pass_on()
        self.size += len(source)

    @property
    def sha256(self) -> str:
        """Hexadecimal; complete once the file is closed."""
        return self._digest.hexdigest()

    def _empty_block(self) -> mmap.mmap:
        with suppress(queue.Empty):
            return self._free.get_nowait()
        if len(self._blocks) < BLOCKS:
            block = mmap.mmap(-1, BLOCK_BYTES)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without huge pages
                    block.madvise(mmap.MADV_HUGEPAGE)
            self._blocks.append(block)
            return block
        return self._free.get()

    def _pass_on(self) -> None:
        if self._block is not None:
            self._filled.put((self._block, self._used))
        self._block = None

    def _run(self, stage: Callable[[memoryview], None], filled: _Queue, onward: _Queue | None) -> None:
        """Do `stage` with each block of `filled`, and hand it on, or back to who fills it. After an error blocks only
        pass."""
        while (item := filled.get()) is not None:
            block, used = item
            if self._error is None:
                try:
                    stage(memoryview(block)[:used])
                except Exception as error:
                    self._error = error
            if onward is not None:
                onward.put(item)
            else:
                self._free.put(block)
        if onward is not None:
            onward.put(None)

    def _write_block(self, rest: memoryview) -> None:
        """Write past the page cache what is whole pages, the file's last bytes through it."""
        whole = len(rest) - len(rest) % _ALIGNMENT
        if whole and self._set_direct(True):
            while whole:
                try:
                    count = os.write(self._descriptor, rest[:whole])
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    break
                rest, whole = rest[count:], whole - count
        if rest:
            self._set_direct(False)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def _set_direct(self, direct: bool) -> bool:
        """Ask for writes past the page cache, or for ordinary ones; whether they are direct now."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        wanted = flags | _DIRECT if direct else flags & ~_DIRECT
        if wanted != flags:
            try:
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, wanted)
            except OSError:  # a file system that has no direct writes
                wanted = flags
        return bool(wanted & _DIRECT)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._pass_on()
        self._filled.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._descriptor)
        if kind is None and self._error is not None:
            raise self._error
        if kind is None:
            remember(self._path, self.sha256)
