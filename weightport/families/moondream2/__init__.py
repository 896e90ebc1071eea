"""moondream2: folders of every dated revision, written for the remote code of its date."""

from __future__ import annotations

from weightport.families.declaration import Family, Source
from weightport.families.moondream2.options import MoondreamOptions
from weightport.families.moondream2.portable import AUTO_MAPS
from weightport.families.moondream2.revisions import UNDECIDED
from weightport.families.signature import Signature

FAMILY = Family(
    name="moondream2",
    title="moondream2",
    original="a moondream2 checkpoint (a folder of the Hub at any dated revision, or what its training scripts saved)",
    model_types=("moondream",),
    signatures=(
        Signature("a native Moondream model", r"model\.multi_modal_projector\.linear_1\.weight"),
        Signature(
            "moondream2 (remote code)",
            r"(.+\.)?(text_model\.transformer\.h\.0\.(_orig_mod\.)?mixer\.Wqkv\.weight|text\.blocks\.0\.attn\.qkv\..+)",
        ),
    ),
    options=MoondreamOptions,
    sources=(
        Source(
            "variant",
            "--variant-file",
            "A variant of a model of 2025 (final.pt, low-rank pairs without a base), to be merged into it.",
            metavar="FILE",
        ),
    ),
    licence="apache-2.0",
    card_prompt='processor.prompt("query", "What is in the picture?")',
    bare={"vocabulary": "none", "revision": UNDECIDED},
    portable=AUTO_MAPS,
    portable_code="weightport.modeling.moondream",
    verification_prompt="<image>\n\nQuestion: What is this?\n\nAnswer:",
    about_stage="weightport.families.moondream2.conversion:about",
    recognition="weightport.families.moondream2.layouts:is_moondream2",
    conversion_stage="weightport.families.moondream2.conversion:CONVERSION",
    parity_stage="weightport.families.moondream2.parity:MOONDREAM2",
    training_stage="weightport.families.moondream2.training:TRAINING",
)
