"""The model that an adapter belongs to: its tensors, what is recorded of it, whether it is the one."""
