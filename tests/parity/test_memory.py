"""How much memory a run may take."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from weightport.parity import memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "taken"), [("RLIMIT_DATA", 300), ("RLIMIT_AS", 900)])
def test_a_limit_of_the_process_leaves_what_it_has_not_taken(
    kind: str, taken: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmSize:\t     900 kB\nVmData:\t     300 kB\nThreads:\t1\n")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    own = resource.getrlimit
    limited = {getattr(resource, kind): (1000 * 1024, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limited.get(which) or own(which))
    assert memory.free_memory(CPU) == (1000 - taken) * 1024
    limited[getattr(resource, kind)] = (200 * 1024, resource.RLIM_INFINITY)
    assert memory.free_memory(CPU) == 0


def test_without_a_limit_the_systems_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GROUP", Path("/nowhere"))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    stated = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    assert memory.free_memory(CPU) == pytest.approx(int(stated.split()[1]) * 1024, rel=0.2)
