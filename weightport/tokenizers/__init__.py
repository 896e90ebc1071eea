"""Vocabularies of original implementations, brought to fast tokenizers whose ids are the checkpoint's own rows."""
