"""weightport: a vision-language model's original checkpoint, brought into today's transformers and proven unchanged.

Importing it teaches transformers' `AutoConfig`, `AutoModel…` and `AutoProcessor` the families that transformers itself
does not have. It imports neither torch nor transformers for that.
"""

from weightport.modeling.registration import install

__version__ = "0.1.0"

install()
