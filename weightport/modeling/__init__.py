"""Model families that transformers lacks, written as transformers writes them. Importing this package registers them
with the Auto classes."""

from weightport.modeling.registration import register

register()
