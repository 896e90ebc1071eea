"""Florence-2: every revision and re-saving of the checkpoints that were written for remote code."""

from weightport.families.florence2.conversion import Florence2

__all__ = ["Florence2"]
