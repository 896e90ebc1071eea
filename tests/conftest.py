"""Options of the whole test suite."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import pytest

# Workers share the cores: threads that wait for one another cost several times what they compute. Set before torch
# is loaded.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


OPTIONAL: dict[str, tuple[Callable[[pytest.Config], Any], str]] = {
    "slow": (lambda config: config.getoption("--slow"), "--slow"),
    "fairseq": (lambda config: os.environ.get("WEIGHTPORT_FAIRSEQ_PYTHON"), "WEIGHTPORT_FAIRSEQ_PYTHON"),
}
"""Marks of tests that run when they are asked for: whether they are, and how to."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what needs minutes or gigabytes")
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="run the files, and the tests in each, in an order of this seed"
    )
    parser.addoption("--offline", action="store_true", help="refuse connections to any other machine")
    parser.addoption(
        "--golden",
        type=Path,
        default=None,
        metavar="DIR",
        help="judge the golden cases below DIR instead of the own ones",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if int(version("pillow").partition(".")[0]) < 13:
        resized_otherwise = pytest.mark.skip(
            reason="Pillow before 13 makes pictures smaller otherwise, by up to 8 levels of 255"
        )
        for item in items:
            if "pillow13" in item.keywords:
                item.add_marker(resized_otherwise)
    seed = config.getoption("--shuffle")
    if seed is not None:
        items[:] = shuffled(items, Random(seed))
    unasked = [mark for mark, (asked, _) in OPTIONAL.items() if not asked(config)]
    left_out = [item for item in items if any(mark in item.keywords for mark in unasked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not any(mark in item.keywords for mark in unasked)]


def pytest_report_header(config: pytest.Config) -> list[str]:
    unasked = [f"{mark} ({how})" for mark, (asked, how) in OPTIONAL.items() if not asked(config)]
    seed = config.getoption("--shuffle")
    return [
        *([f"not selected: {', '.join(unasked)}"] if unasked else []),
        *([f"shuffled by --shuffle {seed}"] if seed is not None else []),
    ]


def shuffled(items: list[pytest.Item], rng: Random) -> list[pytest.Item]:
    """The files in another order, and in each its tests: what a file shares is still made once."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    for own in files.values():
        rng.shuffle(own)
    return [item for path in rng.sample(sorted(files), len(files)) for item in files[path]]


@pytest.fixture(scope="session", autouse=True)
def no_network(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --offline, connections to other machines fail as on a machine without network."""
    if not request.config.getoption("--offline"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _only_here(getattr(socket.socket, name)))
        yield


def _only_here(connect: Callable[..., Any]) -> Callable[..., Any]:
    def connected(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(errno.ENETUNREACH, f"tests run without network ({address[0]})")
        return connect(self, address)

    return connected
