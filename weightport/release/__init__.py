"""From a model directory to the Hub: checked, described by what the directory knows, uploaded."""

from __future__ import annotations

from weightport.release.card import model_card
from weightport.release.checking import CheckedDirectory, check_directory
from weightport.release.publishing import Release, ReleaseOptions, release

__all__ = ["CheckedDirectory", "Release", "ReleaseOptions", "check_directory", "model_card", "release"]
