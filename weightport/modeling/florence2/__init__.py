"""Florence-2's model is transformers' own; here is its processor with the original's behaviour."""

from __future__ import annotations

from .processing_florence2 import Florence2OriginalProcessor

__all__ = ["Florence2OriginalProcessor"]
