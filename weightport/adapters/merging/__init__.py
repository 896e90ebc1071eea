"""LoRA adapters merged into a model directory, tensor by tensor, on files."""
