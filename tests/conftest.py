"""Options of the whole test suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Workers share the cores: threads that wait for one another cost several times what they compute. Set before torch
# is loaded.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what needs minutes or gigabytes")
    parser.addoption(
        "--golden",
        type=Path,
        default=None,
        metavar="DIR",
        help="judge the golden cases below DIR instead of the own ones",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]
