"""LoRA adapters: brought from the original's module names to the native model's."""
