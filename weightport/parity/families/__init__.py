"""The families whose parity is known, by the name that reference files use."""

from __future__ import annotations

from weightport.families.florence2.parity import FLORENCE2
from weightport.families.ofa.parity import OFA
from weightport.parity.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (OFA, FLORENCE2)}
