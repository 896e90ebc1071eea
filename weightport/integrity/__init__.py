"""Whether a model directory is whole: the bytes that were recorded, and parts that belong together."""
