"""The image side of the processor: how pictures become pixels, and how many vectors the model makes of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightport.errors import ConfigurationError

PREPROCESSOR = "preprocessor_config.json"
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


# The vision towers of the releases, which all take those settings: widths of base and large, and what they share.
RELEASED_WIDTHS = ([128, 256, 512, 1024], [256, 512, 1024, 2048])
RELEASED_TOWER = {
    "depths": [1, 1, 9, 1],
    "patch_size": [7, 3, 3, 3],
    "patch_stride": [4, 2, 2, 2],
    "patch_padding": [3, 1, 1, 1],
    "max_position_embeddings": 50,
}


def is_released(vision: Any) -> bool:
    """Whether a vision configuration is that of a release, base or large."""
    same = all(_plain(getattr(vision, name)) == value for name, value in RELEASED_TOWER.items())
    return same and _plain(vision.embed_dim) in RELEASED_WIDTHS


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


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


def image_settings(stated: Mapping[str, Any] | None, vision: Any, where: str) -> dict[str, Any]:
    """Arguments of CLIPImageProcessor, image_seq_length among them. None: those of the releases, for their vision
    towers; of another tower the checkpoint at `where` does not tell them.

    Raises ConfigurationError when nothing tells the size of pictures, or when it does not give a square grid that the
    position embeddings cover.
    """
    if stated is None and not is_released(vision):
        raise ConfigurationError(
            f"No {PREPROCESSOR} beside {where}: the size of its pictures does not show in the tensors (any that gives "
            f"a square of at most {vision.max_position_embeddings} × {vision.max_position_embeddings} features would "
            "fit), and the vision tower is not a release's.\n"
            f"  Put the {PREPROCESSOR} of the model that was trained into the folder (or into that of --vocab), or "
            "pass --vocab none to convert without a processor."
        )
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
