"""Outputs of frozen parts, computed once, kept on disk and read in every epoch (docs/feature_cache.md)."""
