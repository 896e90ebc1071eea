"""OFA and OFA-CN: fairseq checkpoints, and directories of the existing transformers ports."""

from .family import OFA

__all__ = ["OFA"]
