"""The families weightport knows, by name."""

from __future__ import annotations

from weightport.converters.family import Family
from weightport.families.florence2 import Florence2
from weightport.families.ofa import OFA

FAMILIES: dict[str, Family] = {family.name: family for family in (OFA(), Florence2())}
