"""Florence-2: folders of the Hub written for the remote code, in every revision and re-saving."""

from __future__ import annotations

from weightport.families.declaration import Family
from weightport.families.florence2.options import Florence2Options
from weightport.families.signature import Signature

FAMILY = Family(
    name="florence2",
    title="Florence-2",
    original="a Florence-2 checkpoint written for the remote code (a released folder, a fine-tuned fork, a training "
    "loop's dump with config.json beside it)",
    model_types=("florence2",),
    signatures=(
        Signature("a native Florence-2 model", r"model\.multi_modal_projector\.image_position_embed\..+"),
        Signature("Florence-2 (remote code)", r"(.+\.)?image_pos_embed\.(row|column)_embeddings\.weight"),
    ),
    options=Florence2Options,
    licence="mit",
    card_prompt='"<CAPTION>"',
    bare={"vocabulary": "none", "image_token": "none"},
    verification_prompt="<CAPTION>",
    recognition="weightport.families.florence2.layouts:is_florence2",
    conversion_stage="weightport.families.florence2.conversion:CONVERSION",
    parity_stage="weightport.families.florence2.parity:FLORENCE2",
    training_stage="weightport.families.florence2.training:TRAINING",
)
