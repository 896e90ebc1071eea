"""The version of weightport."""

__version__ = "0.1.0"
