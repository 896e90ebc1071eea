"""Florence-2: every revision and re-saving of the checkpoints that were written for remote code."""

from .family import Florence2

__all__ = ["Florence2"]
