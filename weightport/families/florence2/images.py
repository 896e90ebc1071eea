"""The image side of the processor: how pictures become pixels, and how many vectors the model makes of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightport.errors import ConfigurationError

# preprocessor_config.json of every release.
RELEASED = {
    "do_resize": True,
    "size": {"height": 768, "width": 768},
    "resample": 3,
    "do_center_crop": False,
    "crop_size": {"height": 768, "width": 768},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def feature_grid(vision: Any, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of the vision tower's last stage for images of height × width pixels."""
    for patch, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding):
        height, width = ((side + 2 * padding - patch) // stride + 1 for side in (height, width))
    return height, width


def image_vectors(vision: Any, height: int, width: int) -> int:
    """Vectors that stand for one image before the prompt: the average, and one a cell of the last stage (577 at
    768)."""
    rows, columns = feature_grid(vision, height, width)
    return 1 + rows * columns


def image_settings(stated: Mapping[str, Any] | None, vision: Any) -> dict[str, Any]:
    """Arguments of CLIPImageProcessor, image_seq_length among them. None: the releases' own settings.

    Raises ConfigurationError when the size does not give a square grid that the position embeddings cover.
    """
    stated = RELEASED if stated is None else stated
    if not isinstance(stated, Mapping):
        raise ConfigurationError(f"preprocessor_config.json should be a JSON object; found {type(stated).__name__}.")
    settings = {name: stated.get(name, default) for name, default in RELEASED.items()}
    size = settings["size"]
    sides: list[Any] = [size.get(side) for side in ("height", "width")] if isinstance(size, Mapping) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ConfigurationError(
            f"preprocessor_config.json: size is {size!r}; expected a height and a width in pixels."
        )
    rows, columns = feature_grid(vision, *sides)
    if rows != columns or not 0 < rows <= vision.max_position_embeddings:
        raise ConfigurationError(
            f"preprocessor_config.json: images of {sides[0]} × {sides[1]} pixels give {rows} × {columns} features; "
            f"the model takes a square of at most {vision.max_position_embeddings} × {vision.max_position_embeddings}."
        )
    length = image_vectors(vision, *sides)
    declared = stated.get("image_seq_length", length)
    if declared != length:
        raise ConfigurationError(
            f"preprocessor_config.json: image_seq_length is {declared!r}, but images of {sides[0]} × {sides[1]} "
            f"pixels give {length} vectors in this model."
        )
    # The original leaves the conversion to the caller and fails on grey and transparent pictures.
    return {**settings, "do_convert_rgb": True, "image_seq_length": length}
