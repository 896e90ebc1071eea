"""Configuration of moondream2 in all its dated revisions, for transformers 5."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PhiConfig, PreTrainedConfig, SiglipVisionConfig

FEATURE_MERGES = ("none", "grid", "tiles")
REGION_KINDS = ("points", "bins")
SIZE_SCALES = ("log", "linear")

# The released tower: SigLIP so400m at 378 pixels, without its pooling head.
RELEASED_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 378,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-5,
    "vision_use_head": False,
}


@strict
class MoondreamConfig(PreTrainedConfig):
    r"""Configuration of a [`MoondreamModel`]. The defaults are those of the revision of 2024-04-02.

    Args:
        text_config (`dict` or [`PhiConfig`]): the text model; PhiConfig's defaults are the released sizes.
        vision_config (`dict` or [`SiglipVisionConfig`]): the vision tower, without its pooling head.
        projector_hidden_size (`int`, defaults to 8192): width between the projector's two layers.
        projector_hidden_act (`str`, defaults to `"gelu_pytorch_tanh"`): `"gelu"` in the revisions of March 2024.
        image_token_id (`int`, defaults to 50295): stands where image features are put. The released embeddings have
            rows at this id that no token uses; the rows are never looked up.
        feature_merge (`str`, defaults to `"none"`): what becomes of several views of a picture. `"none"`: there is
            one. `"grid"` (2024-05-20 to 2024-08-26): features of non-overlapping crops, averaged to one view's grid,
            beside those of the whole view; a picture without crops has its whole view twice. `"tiles"` (2025): the
            same with overlapping crops, stitched without their inner margins.
        overlap_margin (`int`, defaults to 4): patches at a tile's inner borders that are left out.
        prefix_bidirectional (`bool`, defaults to `False`): the start token and the image see each other in both
            directions (2025).
        region_config (`dict`, *optional*): the head for coordinates. `kind` is `"points"` (2024-08-26: regresses
            numbers, and no public method uses it) or `"bins"` (2025), which has `coord_feat_dim`, `coord_out_dim`,
            `size_feat_dim`, `size_out_dim`, `inner_dim` and `size_scale` (`"log"`, or `"linear"` in 2025-01-09).
        answer_token_id (`int`, *optional*): an id that may be the first of an answer, and no later one (2025-06-21);
            it ends thoughts.
        reasoning_config (`dict`, *optional*): of a revision that reasons (2025-06-21): `coord_token_id` stands for a
            number read by the region head, `size_token_id` is never thought, and `answer_prefix` are the ids between
            thoughts and answer.
    """

    model_type = "moondream"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs = {"text_config": PhiConfig, "vision_config": SiglipVisionConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projector_hidden_size: int = 8192
    projector_hidden_act: str = "gelu_pytorch_tanh"
    image_token_id: int = 50295
    feature_merge: str = "none"
    overlap_margin: int = 4
    prefix_bidirectional: bool = False
    region_config: dict[str, Any] | None = None
    answer_token_id: int | None = None
    reasoning_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = PhiConfig(**(self.text_config or {}))
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = SiglipVisionConfig(**{**RELEASED_VISION, **(self.vision_config or {})})
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the `@strict` validation: what has to fit each other."""
        vision: Any = self.vision_config
        if self.feature_merge not in FEATURE_MERGES:
            raise ValueError(f"feature_merge is {self.feature_merge!r}; it is one of {', '.join(FEATURE_MERGES)}")
        if vision.image_size % vision.patch_size:
            raise ValueError(f"image_size ({vision.image_size}) is not a multiple of patch_size ({vision.patch_size})")
        grid = vision.image_size // vision.patch_size
        if self.feature_merge == "tiles" and not 0 <= 2 * self.overlap_margin < grid:
            raise ValueError(f"overlap_margin ({self.overlap_margin}) leaves nothing of a grid of {grid}")
        region = self.region_config
        if region is not None and region.get("kind") not in REGION_KINDS:
            raise ValueError(f"region_config.kind is {region.get('kind')!r}; it is one of {', '.join(REGION_KINDS)}")
        if self.reasoning_config is not None:
            missing = {"coord_token_id", "size_token_id", "answer_prefix"} - set(self.reasoning_config)
            if missing:
                raise ValueError(f"reasoning_config lacks {', '.join(sorted(missing))}")
            if self.answer_token_id is None:
                raise ValueError("reasoning_config needs answer_token_id beside it, which ends thoughts")

    @property
    def image_seq_length(self) -> int:
        """Vectors that stand for a picture in the text: one a patch of a single view, whatever the number of views."""
        vision: Any = self.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    @property
    def image_grid(self) -> int:
        """Patches along a side of a view."""
        return math.isqrt(self.image_seq_length)


__all__ = ["MoondreamConfig"]
