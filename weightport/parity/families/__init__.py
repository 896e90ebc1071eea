"""The families whose parity is known, by the name that reference files use."""

from __future__ import annotations

from ..family import Family
from .florence2 import FLORENCE2
from .ofa import OFA

FAMILIES: dict[str, Family] = {family.name: family for family in (OFA, FLORENCE2)}
