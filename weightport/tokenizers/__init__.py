"""Vocabularies of original implementations, brought to fast tokenizers whose ids are the checkpoint's own rows."""

from .dictionary import Dictionary
from .ofa import build_ofa_tokenizer
from .sources import ChineseVocabulary, EnglishVocabulary, read_ofa_vocabulary

__all__ = ["ChineseVocabulary", "Dictionary", "EnglishVocabulary", "build_ofa_tokenizer", "read_ofa_vocabulary"]
