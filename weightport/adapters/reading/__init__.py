"""An adapter as files: its settings, its tensors by module, dumps that are told apart from adapters."""
