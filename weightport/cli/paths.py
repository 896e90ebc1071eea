"""Paths given on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class ExistingPath(click.ParamType):
    """A file or folder that is read. One that is not there is a mistake of usage (exit status 2), in every command."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path. A link that leads nowhere passes: what opens it says what it should lead to."""
        if not os.path.lexists(value):
            self.fail(f"{os.fspath(value)} does not exist.", param, ctx)
        return Path(value)
