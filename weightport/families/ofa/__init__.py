"""OFA and OFA-CN: fairseq checkpoints, and directories of the existing transformers ports."""

from __future__ import annotations

from weightport.families.declaration import Family
from weightport.families.ofa.options import OFAOptions
from weightport.families.ofa.portable import AUTO_MAPS
from weightport.families.signature import Signature

FAMILY = Family(
    name="ofa",
    title="OFA",
    original="an OFA or OFA-CN checkpoint (fairseq .pt, or a directory of an existing port)",
    model_types=("ofa",),
    signatures=(
        Signature("a native OFA model", r"model\.encoder\.image_rel_pos_tables\.0\.weight"),
        Signature("OFA (fairseq)", r"(model\.)?encoder\.image_rel_pos_table_list\.0\.weight"),
    ),
    options=OFAOptions,
    hub_task="image-to-text",
    licence="apache-2.0",
    card_prompt='processor.prompt("caption")',
    bare={"vocabulary": "none"},
    portable=AUTO_MAPS,
    portable_code="weightport.modeling.ofa",
    ties={"model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight"},
    recognition="weightport.families.ofa.layouts:is_ofa",
    conversion_stage="weightport.families.ofa.conversion:CONVERSION",
    parity_stage="weightport.families.ofa.parity:OFA",
    training_stage="weightport.families.ofa.training:TRAINING",
)
