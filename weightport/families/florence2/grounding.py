"""Words that the original's phrase grounding gives no box to (processing_florence2.py, banned_grounding_tokens)."""

from __future__ import annotations

from typing import Any

BANNED_PHRASES = tuple(
    """
    a|a group|a set|all|an|another|any|anybody|anyone|anything|each|each other|everybody|everyone|everything|few|he|her
    |hers|herself|him|himself|his|I|image|images|it|its|itself|lots|many|me|mine|myself|nobody|none|one|one another
    |oneself|other objects|our|ours|ourselves|several|she|some|somebody|someone|something|that|the|the image|their
    |theirs|them|themselves|these|they|this|those|us|we|what|which|who|whom|whose|you|your|yours|yourself|yourselves
    """.replace("\n", "")
    .replace("    ", "")
    .split("|")
)

_QUAD = "<loc_(\\d+)>" * 8


def post_processor_config() -> dict[str, Any]:
    """What Florence2Processor needs to read answers: every kind that a task has, with the original's settings."""
    return {
        "ocr": {"PATTERN": rf"(.+?){_QUAD}", "AREA_THRESHOLD": 0.0},
        "phrase_grounding": {"banned_grounding_tokens": list(BANNED_PHRASES)},
        "pure_text": {},
        "description_with_bboxes": {},
        "description_with_polygons": {},
        "polygons": {},
        "bboxes": {},
        "description_with_bboxes_or_polygons": {},
    }
