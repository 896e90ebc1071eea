"""From a model directory to the Hub: checked, described by what the directory knows, uploaded."""

from __future__ import annotations

from .card import model_card
from .checking import CheckedDirectory, check_directory
from .publishing import Release, ReleaseOptions, release

__all__ = ["CheckedDirectory", "Release", "ReleaseOptions", "check_directory", "model_card", "release"]
