"""The families that can be fine-tuned, by model_type."""

from __future__ import annotations

from .family import Family
from .florence2 import Florence2
from .ofa import OFA

FAMILIES: dict[str, Family] = {family.name: family for family in (OFA(), Florence2())}
"""A new family is one class and one name here."""
