"""weightport: a vision-language model's original checkpoint, brought into today's transformers and proven unchanged."""

__version__ = "0.1.0"
