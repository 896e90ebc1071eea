"""Tellit as a family of weightport. Importing this imports neither torch nor transformers."""

from __future__ import annotations

from weightport.families.declaration import Family
from weightport.families.signature import Signature
from weightport_tellit.options import TellitOptions

FAMILY = Family(
    name="tellit",
    title="Tellit",
    original="a Tellit checkpoint (.pt)",
    model_types=("git",),
    signatures=(Signature("Tellit", r"model\.text\.attn_norms"),),
    options=TellitOptions,
    hub_task="image-to-text",
    licence="mit",
    bare={"processor": False},
    conversion_stage="weightport_tellit.conversion:CONVERSION",
    parity_stage="weightport_tellit.parity:TELLIT",
    training_stage="weightport_tellit.training:TRAINING",
    cases="weightport_tellit:cases",
)
