"""Vocabularies of original implementations, brought to fast tokenizers whose ids are the checkpoint's own rows."""

from weightport.families.ofa.tokenizer import build_ofa_tokenizer
from weightport.tokenizers.dictionary import Dictionary
from weightport.tokenizers.sources import ChineseVocabulary, EnglishVocabulary, read_ofa_vocabulary

__all__ = ["ChineseVocabulary", "Dictionary", "EnglishVocabulary", "build_ofa_tokenizer", "read_ofa_vocabulary"]
