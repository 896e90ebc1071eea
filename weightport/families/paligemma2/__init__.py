"""PaliGemma 1 and 2: big_vision's .npz files of any size, and what its trainers save."""

from __future__ import annotations

from weightport.families.declaration import Family
from weightport.families.paligemma2.options import PaliGemmaOptions
from weightport.families.signature import Signature

FAMILY = Family(
    name="paligemma2",
    title="PaliGemma",
    original="a big_vision checkpoint of PaliGemma 1 or 2 (an .npz, or a folder that its trainer wrote)",
    model_types=("paligemma",),
    signatures=(
        Signature("a native PaliGemma model", r"(model\.)?multi_modal_projector\.linear\.weight"),
        Signature("PaliGemma (big_vision)", r"(params/|opt/target/)?llm/layers/(\d+/)?attn/(q|qkv)_einsum/w"),
    ),
    options=PaliGemmaOptions,
    licence="gemma",
    licence_note="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
    "Models made from it, fine-tuned ones too, are distributed under the same terms, with this notice.",
    card_prompt='"<image>caption en"',
    bare={"vocabulary": "none"},
    verification_prompt="<image>caption en",
    tasks={"caption": "caption en", "ocr": "ocr"},
    recognition="weightport.families.paligemma2.layouts:is_paligemma",
    conversion_stage="weightport.families.paligemma2.conversion:CONVERSION",
    parity_stage="weightport.families.paligemma2.parity:PALIGEMMA2",
    training_stage="weightport.families.paligemma2.training:TRAINING",
)
