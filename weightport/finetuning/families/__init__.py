"""The families that can be fine-tuned, by model_type."""

from __future__ import annotations

from weightport.families.florence2.training import Florence2
from weightport.families.ofa.training import OFA
from weightport.finetuning.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (OFA(), Florence2())}
"""A new family is one class and one name here."""
