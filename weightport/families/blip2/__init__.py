"""BLIP-2 of LAVIS: what was trained in one .pth, the vision encoder and the language model in files of their own."""

from __future__ import annotations

from weightport.families.blip2.options import Blip2Options
from weightport.families.blip2.portable import AUTO_MAPS, CODE
from weightport.families.declaration import Family, Source
from weightport.families.signature import Signature

FAMILY = Family(
    name="blip2",
    title="BLIP-2",
    original="a BLIP-2 checkpoint of LAVIS (a released .pth, or one that its trainer wrote)",
    model_types=("blip-2", "blip-2-lavis"),
    signatures=(
        Signature("a native BLIP-2 model", r"qformer\.encoder\.layer\.0\..+"),
        Signature("InstructBLIP (LAVIS)", r"(model\.)?llm_proj\.weight"),
        Signature("BLIP-2 (LAVIS)", r"(model\.)?Qformer\.bert\.encoder\.layer\.0\..+"),
    ),
    options=Blip2Options,
    sources=(
        Source(
            "llm",
            "--llm",
            "The folder of the language model that SOURCE was trained with (OPT or Flan-T5, with its tokenizer), or "
            "its Hub id. A stage-1 checkpoint (image-text matching) has none.",
            metavar="DIR|HUB_ID",
            hub=True,
        ),
        Source(
            "vision",
            "--vision",
            "The vision encoder's file (eva_vit_g.pth, or clip_vit_L.pth of a model with ViT-L), where it was not "
            "fine-tuned and so is not in SOURCE.",
            metavar="FILE",
        ),
    ),
    licence_note="The weights hold those of a language model, which has terms of its own: OPT's are Meta's OPT-175B "
    "licence (non-commercial research), Flan-T5's Apache 2.0. LAVIS is BSD-3.",
    card_prompt='"a photo of"',
    bare={"vocabulary": "none"},
    portable=AUTO_MAPS,
    portable_code=CODE,
    verification_prompt="a photo of",
    tasks={"caption": "a photo of"},
    recognition="weightport.families.blip2.layouts:is_blip2",
    conversion_stage="weightport.families.blip2.conversion:CONVERSION",
    parity_stage="weightport.families.blip2.parity:BLIP2",
    training_stage="weightport.families.blip2.training:TRAINING",
    retrieval_stage="weightport.families.blip2.retrieval:retrieval",
)
