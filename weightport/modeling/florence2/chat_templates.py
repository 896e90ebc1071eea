"""Chat templates for transformers' Florence2Processor.

Its constructor names no `chat_template` (transformers 5.23), and loading passes on only what a constructor names: the
chat_template.jinja of a directory would be left unread, and a chat pipeline fail.
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from transformers import Florence2Processor


def accept_chat_templates() -> None:
    """Let Florence2Processor load the chat template of a directory. Does nothing where it does by itself."""
    original = Florence2Processor.__init__
    if "chat_template" in inspect.signature(original).parameters:
        return

    @wraps(original)
    def init(
        self: Any,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_additional_image_tokens: int = 0,
        post_processor_config: dict[str, Any] | None = None,
        chat_template: str | dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        original(
            self,
            image_processor,
            tokenizer,
            num_additional_image_tokens,
            post_processor_config,
            chat_template=chat_template,
            **kwargs,
        )

    # What `wraps` copies would hide the new parameter.
    del init.__wrapped__
    setattr(Florence2Processor, "__init__", init)  # noqa: B010 - mypy does not let a method be assigned
