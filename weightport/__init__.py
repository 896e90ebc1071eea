"""weightport: a vision-language model's original checkpoint, brought into today's transformers and proven unchanged.

Importing it imports neither torch nor transformers. `import weightport.modeling` teaches transformers' `AutoConfig`,
`AutoModel…` and `AutoProcessor` the families that transformers itself does not have.
"""

from typing import Any

from weightport.version import __version__

_PUBLIC = (
    "check_parity",
    "convert",
    "export",
    "extract_lora",
    "generate",
    "load_native",
    "merge_lora",
    "plan_conversion",
    "port_adapter",
    "release",
    "verify",
)

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from weightport import api

        return getattr(api, name)
    raise AttributeError(f"module 'weightport' has no attribute {name!r}")
