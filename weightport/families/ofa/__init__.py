"""OFA and OFA-CN: fairseq checkpoints, and directories of the existing transformers ports."""

from weightport.families.ofa.conversion import OFA

__all__ = ["OFA"]
