"""Regular expressions in an adapter_config.json: written by strangers, so they are tried with a time limit first."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from weightport.errors import AdapterError

SECONDS = 10
"""Processor time that all patterns of an adapter may take for all names. peft's own need milliseconds."""

_PATIENCE = 60
"""Seconds of waiting for one of them, on a machine that has much else to do."""

_LONGEST_PATTERN = 20_000
_LONGEST_NAME = 1_000

# Characters without which a pattern has one way to match only, so that no text makes it slow.
_BRANCHING = re.compile(r"[*+?{(|]")

# Python's matcher cannot be interrupted, hence a process of its own, which can be ended.
_TRIAL = (
    "import json, re, sys\n"
    "seconds, patterns, names = json.load(sys.stdin)\n"
    "try:\n"
    "    import resource\n"
    "    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))\n"
    "except (ImportError, ValueError, OSError):\n"
    "    pass\n"
    "for pattern in patterns:\n"
    "    found = re.compile(pattern)\n"
    "    for name in names:\n"
    "        found.fullmatch(name), found.match(name)\n"
)


def of_ending(key: str) -> str:
    """How peft matches the keys of rank_pattern and alpha_pattern: the end of a module's name, from a dot on."""
    return rf"(.*\.)?({key})$"


def of_saved(name: str) -> str:
    """How peft matches an entry of modules_to_save: a module's name or the module around it."""
    return rf"(^|.*\.){name}($|\..*)"


def of_layer(pattern: str) -> str:
    """How peft finds the number of a layer (layers_pattern); the first number is the layer's, a later one may be an
    expert's."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def shown(value: Any) -> str:
    """A value of a settings file, for a message."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:
        # Python refuses to write an integer of thousands of digits.
        text = "an enormous number"
    return text if len(text) <= 120 else f"{text[:120]}…"


def require_pattern(raw: str, framed: str, where: str) -> None:
    """Raises AdapterError unless `raw`, in the frame that it is matched in, is a regular expression of ordinary
    length."""
    if len(raw) > _LONGEST_PATTERN:
        raise AdapterError(
            f"{where}: a pattern of {len(raw):,} characters; at most {_LONGEST_PATTERN:,} are read as a regular "
            "expression. List the module names instead."
        )
    try:
        re.compile(framed)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{where}: {shown(raw)} is not a regular expression ({error}).") from error


def require_bounded(patterns: Iterable[tuple[str, str]], names: Iterable[str], where: str) -> None:
    """Raises AdapterError when matching every pattern (raw, framed) with every name takes longer than SECONDS.

    A pattern such as `(.*a|.*o)*!` doubles its work with every character. The trial runs in a process of its own, on
    the names that the pattern will be matched with, by the same matcher that this process and peft use.
    """
    risky = {framed: raw for raw, framed in patterns if _BRANCHING.search(raw)}
    texts = sorted(set(names))
    longest = max(map(len, texts), default=0)
    if longest > _LONGEST_NAME:
        raise AdapterError(f"{where}: a module name of {longest:,} characters; at most {_LONGEST_NAME:,} are read.")
    if not risky:
        return
    some = ", ".join(shown(raw) for raw in list(risky.values())[:3])
    if not _ends(risky, texts):
        raise AdapterError(
            f"{where}: matching {len(risky)} patterns ({some}) with {len(texts)} module names takes longer than "
            f"{SECONDS} seconds, which is the limit. List the module names instead."
        )


def _ends(patterns: Iterable[str], texts: Iterable[str]) -> bool:
    """Whether the trial ended by itself. Its limit is of processor time where the system has such limits, so that a
    busy machine refuses nothing."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=json.dumps([SECONDS, list(patterns), list(texts)]).encode("ascii"),
            timeout=SECONDS * _PATIENCE,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return False
    # A signal ended it.
    return done.returncode >= 0
