"""How much memory a run may take."""

from __future__ import annotations

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "file "),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache "),
)
"""Of a control group (version 2, version 1): what it may take, what it has taken, and the line that says how much of
that is cached files."""
STATUS = Path("/proc/self/status")
LIMITS = (("RLIMIT_DATA", "VmData:"), ("RLIMIT_AS", "VmSize:"))
"""Of the process (`ulimit -d`, `ulimit -v`): the limit, and the line that says how much of it is taken."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` is torch's for memory that it did not get: on a CPU a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on `device`: the accelerator's, or the system's without swapping (cached files count as
    free), or less under a control group or a limit of the process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = MEMINFO.read_text().splitlines() if MEMINFO.is_file() else []
    system = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 1 << 62)
    return min(
        [system, *_left_to_process(), *(left for names in GROUP_FILES if (left := _left_to_group(*names)) is not None)]
    )


def _left_to_process() -> list[int]:
    """Bytes that the process may still take, by each limit that it has."""
    import resource

    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    taken = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    limits = {line: resource.getrlimit(getattr(resource, name))[0] for name, line in LIMITS}
    return [
        max(limit - taken[line], 0)
        for line, limit in limits.items()
        if limit != resource.RLIM_INFINITY and line in taken
    ]


def _left_to_group(limit: str, taken: str, statistics: str, cached: str) -> int | None:
    """Bytes a control group may still take; None where it is no limit to this process."""
    texts = [path.read_text() if (path := GROUP / name).is_file() else "" for name in (limit, taken, statistics)]
    if not all(text.strip().isdigit() for text in texts[:2]):
        return None
    files = next((int(line.split()[1]) for line in texts[2].splitlines() if line.startswith(cached)), 0)
    return int(texts[0]) - int(texts[1]) + files
